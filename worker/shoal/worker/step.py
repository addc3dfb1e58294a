"""One step's plan and its result: all that passes between engine and executor.

A plan is a frozen diff that can be pickled to ranks. The executor keeps a row of state (token
ids, block table, sampling parameters, counts for penalties) for every slot in use; the plan
says what changed. A sampled token is written to the slot's row by the executor itself, so the
next plan need not carry it.

What is made per row and step (`Row`, `Sampled`) is a NamedTuple: immutable as the rest, and
built in a third of a frozen dataclass's time.
"""

from dataclasses import dataclass
from typing import NamedTuple

from shoal.worker.request import SamplingParams


@dataclass(frozen=True, slots=True)
class SlotInit:
    """A sequence enters a slot: newly admitted, or resumed after preemption. In full."""

    slot: int
    token_ids: tuple[int, ...]  # prompt, then what was generated so far
    prompt_len: int
    sampling: SamplingParams
    seed: (
        int  # mixed of the request's seed and the sample's index; draws are keyed (seed, position)
    )
    block_ids: tuple[int, ...]
    weights: int = 0  # number of the set that computes it: see shoal.worker.weight_sets


@dataclass(frozen=True, slots=True)
class SlotBlocks:
    """A slot's block table grows by these blocks."""

    slot: int
    block_ids: tuple[int, ...]


class Row(NamedTuple):
    """Tokens `start .. start + count` of a slot are computed in this step.

    `sample` is set where the last of them is the last token known, so that the next is drawn.
    """

    slot: int
    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nothing calls
    sample: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What to compute in one step. Within a layer all rows store their KV before any attends,
    so a row may read blocks that another row of the same step fills."""

    step: int
    init: tuple[SlotInit, ...]
    grow: tuple[SlotBlocks, ...]
    rows: tuple[Row, ...]

    @property
    def num_tokens(self) -> int:
        return sum(row.count for row in self.rows)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Logprobs at one position: the chosen token first, then the likeliest in falling order."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    rank: int  # of the chosen token; 1 is the likeliest


class Sampled(NamedTuple):
    """The token drawn for a slot, or why none could be."""

    slot: int
    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None  # e.g. logits not finite: ends this sequence alone


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Logprobs of prompt tokens `start .. start + len(entries)` of a slot (position 0 has none)."""

    slot: int
    start: int
    entries: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    sampled: tuple[Sampled, ...]
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
