"""Plans and results as msgpack carries them between a group's driver and its ranks.

A plan carries the tokens that were drawn for its rows elsewhere, beside what the engine planned:
a rank knows the tokens that its slots entered with, and the newest one of a row from here. Rows
and numbers go as flat lists, since a plan is made and read for every step.
"""

from collections import deque
from dataclasses import fields
from types import MappingProxyType
from typing import Any, NamedTuple

import msgpack

from shoal.worker.request import SamplingParams
from shoal.worker.step import (
    PromptLogprobs,
    Row,
    Sampled,
    SlotBlocks,
    SlotInit,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

_SAMPLING = tuple(field.name for field in fields(SamplingParams))
_ROW = len(Row._fields)


class Drawn(NamedTuple):
    """A token that the answering rank drew: it stands at `position` of the slot."""

    slot: int
    position: int
    token_id: int


class WirePlan(NamedTuple):
    plan: StepPlan
    drawn: tuple[Drawn, ...]  # newest tokens of the plan's rows


class StepFailed(NamedTuple):
    """A rank's last answer: what ended its step."""

    error: str


def pack_plan(plan: StepPlan, drawn: tuple[Drawn, ...]) -> bytes:
    return _packed(
        (
            plan.step,
            [
                (
                    *(init.slot, init.token_ids, init.prompt_len, _sampling(init.sampling)),
                    *(init.seed, init.block_ids, init.weights),
                )
                for init in plan.init
            ],
            [(grow.slot, grow.block_ids) for grow in plan.grow],
            [number for row in plan.rows for number in row],
            [number for token in drawn for number in token],
        )
    )


def unpack_plan(data: bytes) -> WirePlan:
    step, init, grow, rows, drawn = _unpacked(data)
    return WirePlan(
        StepPlan(
            step,
            tuple(
                SlotInit(
                    slot,
                    tuple(token_ids),
                    prompt_len,
                    _sampling_params(sampling),
                    seed,
                    tuple(block_ids),
                    weights,
                )
                for slot, token_ids, prompt_len, sampling, seed, block_ids, weights in init
            ),
            tuple(SlotBlocks(slot, tuple(blocks)) for slot, blocks in grow),
            tuple(Row(*rows[place : place + _ROW]) for place in range(0, len(rows), _ROW)),
        ),
        tuple(Drawn(*drawn[place : place + 3]) for place in range(0, len(drawn), 3)),
    )


def pack_result(result: StepResult | StepFailed) -> bytes:
    if isinstance(result, StepFailed):
        return _packed(result.error)
    return _packed(
        (
            [
                (part.slot, part.token_id, _logprobs(part.logprobs), part.error)
                for part in result.sampled
            ],
            [
                (part.slot, part.start, [_logprobs(entry) for entry in part.entries])
                for part in result.prompt_logprobs
            ],
        )
    )


def unpack_result(data: bytes) -> StepResult | StepFailed:
    content = _unpacked(data)
    if isinstance(content, str):
        return StepFailed(content)
    sampled, prompts = content
    return StepResult(
        tuple(
            Sampled(slot, token_id, _token_logprobs(logprobs), error)
            for slot, token_id, logprobs, error in sampled
        ),
        tuple(
            PromptLogprobs(slot, start, tuple(_known_logprobs(entry) for entry in entries))
            for slot, start, entries in prompts
        ),
    )


class Relay:
    """Remembers the newest token of each slot, which ranks that did not draw it learn with the
    next plan. A token that was drawn for an earlier occupant of its slot is dropped."""

    def __init__(self) -> None:
        self._stays: dict[int, int] = {}  # slot -> how often it was entered
        self._newest: dict[int, Drawn] = {}
        # (slot, stay, position) of what each plan under way draws
        self._under_way: deque[list[tuple[int, int, int]]] = deque()

    def submitted(self, plan: StepPlan) -> tuple[Drawn, ...]:
        """What the plan's rows need to know."""
        for init in plan.init:
            self._stays[init.slot] = self._stays.get(init.slot, 0) + 1
            self._newest.pop(init.slot, None)
        drawn = []
        for row in plan.rows:
            newest = self._newest.get(row.slot)
            if newest is not None and row.start <= newest.position < row.start + row.count:
                drawn.append(newest)
        self._under_way.append(
            [
                (row.slot, self._stays.get(row.slot, 0), row.start + row.count)
                for row in plan.rows
                if row.sample
            ]
        )
        return tuple(drawn)

    def collected(self, result: StepResult) -> None:
        """Takes note of the oldest plan's tokens."""
        for (slot, stay, position), sampled in zip(
            self._under_way.popleft(), result.sampled, strict=True
        ):
            if self._stays.get(slot, 0) == stay and sampled.error is None:
                self._newest[slot] = Drawn(slot, position, sampled.token_id)


def _sampling(sampling: SamplingParams) -> list[Any]:
    values = {name: getattr(sampling, name) for name in _SAMPLING}
    return list({**values, "logit_bias": list(sampling.logit_bias.items())}.values())


def _sampling_params(values: list[Any]) -> SamplingParams:
    given = dict(zip(_SAMPLING, values, strict=True))
    given["logit_bias"] = MappingProxyType(dict(given["logit_bias"]))
    given["stop_token_ids"] = tuple(given["stop_token_ids"])
    return SamplingParams(**given)


def _logprobs(entry: TokenLogprobs | None) -> tuple[Any, ...] | None:
    return None if entry is None else (entry.token_ids, entry.logprobs, entry.rank)


def _token_logprobs(entry: list[Any] | None) -> TokenLogprobs | None:
    return None if entry is None else _known_logprobs(entry)


def _known_logprobs(entry: list[Any]) -> TokenLogprobs:
    token_ids, logprobs, rank = entry
    return TokenLogprobs(tuple(token_ids), tuple(logprobs), rank)


def _packed(content: Any) -> bytes:
    return bytes(msgpack.packb(content))


def _unpacked(data: bytes) -> Any:
    return msgpack.unpackb(data)
