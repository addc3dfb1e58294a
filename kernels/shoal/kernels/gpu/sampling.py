"""Draws the next token of every row of a batch on the device, without a word to the host.

The order is that of the CPU's sampler: biases, forbidden ids, penalties, temperature, min_p,
top_k, top_p, typical_p, and the inverse CDF in the order of ids at the number that the seed and
the position give. So a seed draws the same token here and there, up to rounding. The oracle is
`shoal.kernels.sampling`; the kernels and their algorithm are in `sampling_passes`.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Self

import torch
import triton
from torch import Tensor

from shoal.kernels.gpu.checks import expect, expect_together
from shoal.kernels.gpu.quantize import FLOATS
from shoal.kernels.gpu.sampling_passes import (
    EDGES,
    finish_kernel,
    gather_kernel,
    process_kernel,
    survey_kernel,
)
from shoal.kernels.gpu.variant import Variant

_TILE = 4096  # tokens of one program
_LISTED = 4096  # tokens whose list spares a row from being read as a whole again
_CHUNK = 512  # tokens of the history that are counted at once
_COUNTED = 1024  # tokens of the vocabulary that are: Triton keeps counts in registers
_WARPS = 8


class Status(IntEnum):
    """What became of a row."""

    OK = 0
    NOT_FINITE = 1  # a logit is NaN or infinite, or all are minus infinity
    NOTHING_LEFT = 2  # every token is forbidden


@dataclass(frozen=True, slots=True)
class Penalties:
    """As `shoal.kernels.sampling.penalize_` defines them, by slot."""

    repetition: Tensor  # [slots] float32, 1 for none
    frequency: Tensor  # [slots] float32, 0 for none
    presence: Tensor  # [slots] float32, 0 for none
    history: Tensor  # [slots, at least every position] int32, the tokens known, rows dense
    prompt_lengths: Tensor  # [slots] int64, how many of them are the prompt


@dataclass(frozen=True, slots=True)
class Entries:
    """A list of ids for each slot, all in one pool."""

    starts: Tensor  # [slots] int32, where a slot's list begins
    counts: Tensor  # [slots] int32, how long it is
    ids: Tensor  # [pool] int32


@dataclass(frozen=True, slots=True)
class Bias:
    """What is added to the logits of some ids."""

    entries: Entries
    amounts: Tensor  # [pool] float32


@dataclass(frozen=True, slots=True)
class Forbidden:
    """Ids that are not drawn as long as a sequence is short."""

    entries: Entries
    until: Tensor  # [slots] int64, the position from which on they may be drawn


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Who is drawn for, and by which parameters. The values must be such as requests may have."""

    slots: Tensor  # [rows] int64, negative for a row of padding
    positions: Tensor  # [rows] int64, tokens known, so that the token drawn is at that position
    greedy: Tensor  # [slots] bool: the likeliest token, whatever the parameters below
    temperature: Tensor  # [slots] float32 > 0
    top_k: Tensor  # [slots] int32, 0 for all
    top_p: Tensor  # [slots] float32, 1 for all
    min_p: Tensor  # [slots] float32, 0 for all
    typical_p: Tensor  # [slots] float32, 1 for all
    seeds: Tensor  # [slots] int64, the bits of an unsigned seed
    penalties: Penalties | None = None
    bias: Bias | None = None
    forbidden: Forbidden | None = None
    all_greedy: bool = False  # every row is taken as greedy, which saves two launches

    def check(self) -> None:
        """Raises ValueError for tensors that no kernel can take together."""
        rows, slots = self.slots.shape[0], self.greedy.shape[0]
        wanted = {
            "slots": (self.slots, rows, torch.int64),
            "positions": (self.positions, rows, torch.int64),
            "greedy": (self.greedy, slots, torch.bool),
            "temperature": (self.temperature, slots, torch.float32),
            "top_k": (self.top_k, slots, torch.int32),
            "top_p": (self.top_p, slots, torch.float32),
            "min_p": (self.min_p, slots, torch.float32),
            "typical_p": (self.typical_p, slots, torch.float32),
            "seeds": (self.seeds, slots, torch.int64),
        }
        if (penalties := self.penalties) is not None:
            expect("penalties.history", penalties.history, (slots, None), torch.int32)
            wanted |= {
                "penalties.repetition": (penalties.repetition, slots, torch.float32),
                "penalties.frequency": (penalties.frequency, slots, torch.float32),
                "penalties.presence": (penalties.presence, slots, torch.float32),
                "penalties.prompt_lengths": (penalties.prompt_lengths, slots, torch.int64),
            }
        if (bias := self.bias) is not None:
            wanted |= _wanted("bias", bias.entries, slots)
            wanted["bias.amounts"] = (bias.amounts, bias.entries.ids.shape[0], torch.float32)
        if (forbidden := self.forbidden) is not None:
            wanted |= _wanted("forbidden", forbidden.entries, slots)
            wanted["forbidden.until"] = (forbidden.until, slots, torch.int64)
        for name, (tensor, size, dtype) in wanted.items():
            expect(name, tensor, (size,), dtype)
        expect_together(**{name: tensor for name, (tensor, _, _) in wanted.items()})


def _wanted(name: str, entries: Entries, slots: int) -> dict[str, tuple[Tensor, int, torch.dtype]]:
    return {
        f"{name}.starts": (entries.starts, slots, torch.int32),
        f"{name}.counts": (entries.counts, slots, torch.int32),
        f"{name}.ids": (entries.ids, entries.ids.shape[0], torch.int32),
    }


@dataclass(frozen=True, slots=True)
class SamplingWorkspace:
    """What the kernels write between them, for up to so many rows. Of one stream at a time."""

    logits: Tensor  # [rows, vocab] float32
    raw: Tensor  # [rows, tiles] int64
    best: Tensor  # [rows, tiles] int64
    counts: Tensor  # [rows, tiles, EDGES] int32
    masses: Tensor  # [rows, tiles, EDGES] int64
    listed: Tensor  # [rows, longest list] float32
    listed_ids: Tensor  # [rows, longest list] int32
    tile: int

    @classmethod
    def allocate(
        cls,
        rows: int,
        vocab: int,
        device: torch.device,
        *,
        tile: int = _TILE,
        listed: int = _LISTED,
    ) -> Self:
        """tile: how many tokens a program takes, a power of two; listed: see `_LISTED`."""
        tiles = triton.cdiv(vocab, tile)

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(
            logits=empty(rows, vocab, dtype=torch.float32),
            raw=empty(rows, tiles, dtype=torch.int64),
            best=empty(rows, tiles, dtype=torch.int64),
            counts=empty(rows, tiles, EDGES, dtype=torch.int32),
            masses=empty(rows, tiles, EDGES, dtype=torch.int64),
            listed=empty(rows, listed, dtype=torch.float32),
            listed_ids=empty(rows, listed, dtype=torch.int32),
            tile=tile,
        )


def sample(
    logits: Tensor,
    batch: SamplingBatch,
    *,
    ids: Tensor | None = None,
    status: Tensor | None = None,
    workspace: SamplingWorkspace | None = None,
) -> tuple[Tensor, Tensor]:
    """The token drawn for every row, and what became of the row.

    logits [rows, vocab] float, rows dense, which stay as they are -> ids [rows] int64, 0 where
    nothing could be drawn, and status [rows] int32, each a `Status`; written to `ids` and `status`
    if given. Raises ValueError for tensors that do not fit.
    """
    expect("logits", logits, (batch.slots.shape[0], None), FLOATS)
    batch.check()
    rows, vocab = logits.shape
    device = logits.device
    if ids is None:
        ids = torch.empty(rows, dtype=torch.int64, device=device)
    if status is None:
        status = torch.empty(rows, dtype=torch.int32, device=device)
    expect("ids", ids, (rows,), torch.int64)
    expect("status", status, (rows,), torch.int32)
    if workspace is None:
        workspace = SamplingWorkspace.allocate(rows, vocab, device)
    if workspace.logits.shape[0] < rows or workspace.logits.shape[1] != vocab:
        raise ValueError(
            f"workspace is for up to {workspace.logits.shape[0]} rows of "
            f"{workspace.logits.shape[1]} tokens, logits have {rows} of {vocab}"
        )
    expect_together(
        logits=logits, slots=batch.slots, ids=ids, status=status, workspace=workspace.logits
    )
    if rows:
        _launch(logits, batch, ids, status, workspace)
    return ids, status


def _launch(
    logits: Tensor, batch: SamplingBatch, ids: Tensor, status: Tensor, work: SamplingWorkspace
) -> None:
    rows, vocab = logits.shape
    tiles = work.raw.shape[1]
    grid = (rows, tiles)
    bias, forbidden, penalties = batch.bias, batch.forbidden, batch.penalties
    sizes = {"EDGES": EDGES, "TILES": triton.next_power_of_2(tiles)}
    process_kernel[grid](
        logits,
        work.logits,
        work.raw,
        work.best,
        batch.slots,
        batch.positions,
        batch.greedy,
        batch.temperature,
        *_pointers(None if bias is None else bias.entries),
        None if bias is None else bias.amounts,
        *_pointers(None if forbidden is None else forbidden.entries),
        None if forbidden is None else forbidden.until,
        None if penalties is None else penalties.repetition,
        None if penalties is None else penalties.frequency,
        None if penalties is None else penalties.presence,
        None if penalties is None else penalties.history,
        None if penalties is None else penalties.prompt_lengths,
        vocab,
        logits.stride(0),
        0 if penalties is None else penalties.history.stride(0),
        BLOCK=work.tile,
        PART=work.tile if penalties is None else min(_COUNTED, work.tile),
        CHUNK=_CHUNK,
        num_warps=_WARPS,
    )
    filters = (batch.greedy, batch.temperature, batch.min_p, batch.top_k, batch.top_p)
    listed = work.listed.shape[1]
    if not batch.all_greedy:
        survey_kernel[grid](
            work.logits,
            work.raw,
            work.best,
            work.counts,
            work.masses,
            batch.slots,
            batch.greedy,
            batch.temperature,
            batch.min_p,
            vocab,
            BLOCK=work.tile,
            **sizes,
            num_warps=_WARPS,
        )
        gather_kernel[grid](
            work.logits,
            work.raw,
            work.best,
            work.counts,
            work.masses,
            work.listed,
            work.listed_ids,
            batch.slots,
            *filters,
            batch.typical_p,
            vocab,
            BLOCK=work.tile,
            **sizes,
            LISTED=listed,
            num_warps=_WARPS,
        )
    finish_kernel[(rows,)](
        ids,
        status,
        work.logits,
        work.raw,
        work.best,
        work.counts,
        work.masses,
        work.listed,
        work.listed_ids,
        batch.slots,
        batch.positions,
        *filters,
        batch.typical_p,
        batch.seeds,
        vocab,
        tiles,
        TILE=work.tile,
        **sizes,
        LISTED=listed,
        BLOCK=_finishing(work.tile),
        ALL_GREEDY=batch.all_greedy,
        num_warps=_WARPS,
    )


def _pointers(entries: Entries | None) -> tuple[Tensor | None, ...]:
    return (None,) * 3 if entries is None else (entries.starts, entries.counts, entries.ids)


def _finishing(tile: int) -> int:
    """Tokens that the last kernel reads at once, whose accumulators are three times as wide."""
    return min(2048, tile)


def variants() -> tuple[Variant, ...]:
    """For a vocabulary of 128k; the first with everything that a row may ask for, and plain."""
    row = {"slots_ptr": "*i64", "positions_ptr": "*i64", "greedy_ptr": "*i1"}
    partials = {"raw_ptr": "*i64", "best_ptr": "*i64"}
    survey = {"counts_ptr": "*i32", "masses_ptr": "*i64"}
    listed = {"listed_ptr": "*fp32", "listed_ids_ptr": "*i32"}
    scale = {"greedy_ptr": "*i1", "temperature_ptr": "*fp32", "min_p_ptr": "*fp32"}
    filters = {"top_k_ptr": "*i32", "top_p_ptr": "*fp32", "typical_p_ptr": "*fp32"}
    work = {"work_ptr": "*fp32", **partials}
    asked = {
        **{f"bias_{name}": "*i32" for name in ("starts", "counts", "ids")},
        "bias_amounts": "*fp32",
        **{f"forbidden_{name}": "*i32" for name in ("starts", "counts", "ids")},
        "forbidden_until": "*i64",
        **{f"{name}_ptr": "*fp32" for name in ("repetition", "frequency", "presence")},
        "history_ptr": "*i32",
        "prompt_lengths_ptr": "*i64",
    }
    tiles = {"EDGES": EDGES, "TILES": 32}

    def process(name: str, logits: str, extras: dict[str, str], none: tuple[str, ...]) -> Variant:
        return Variant(
            name=f"sample: process {name}",
            kernel=process_kernel,
            signature={
                "logits_ptr": logits,
                "work_ptr": "*fp32",
                **partials,
                **row,
                "temperature_ptr": "*fp32",
                **extras,
                **dict.fromkeys(("vocab", "logits_stride", "history_stride"), "i32"),
            },
            constants={
                "BLOCK": _TILE,
                "PART": _TILE if none else _COUNTED,
                "CHUNK": _CHUNK,
                **dict.fromkeys(none),
            },
            num_warps=_WARPS,
            aligned=("logits_ptr", "work_ptr", "vocab", "logits_stride"),
        )

    def later(name: str, kernel: object, signature: dict[str, str], **constants: int) -> Variant:
        return Variant(
            name=f"sample: {name}",
            kernel=kernel,
            signature=signature,
            constants={**tiles, **constants},
            num_warps=_WARPS,
            aligned=("work_ptr", "vocab"),
        )

    vocab = {"vocab": "i32"}
    slots = {"slots_ptr": "*i64"}
    return (
        process("all, fp32", "*fp32", asked, ()),
        process("plain, bf16", "*bf16", dict.fromkeys(asked, "constexpr"), tuple(asked)),
        later("survey", survey_kernel, {**work, **survey, **slots, **scale, **vocab}, BLOCK=_TILE),
        later(
            "gather",
            gather_kernel,
            {**work, **survey, **listed, **slots, **scale, **filters, **vocab},
            BLOCK=_TILE,
            LISTED=_LISTED,
        ),
        later(
            "finish",
            finish_kernel,
            {
                "ids_ptr": "*i64",
                "status_ptr": "*i32",
                **work,
                **survey,
                **listed,
                **row,
                **scale,
                **filters,
                "seeds_ptr": "*i64",
                **vocab,
                "tiles": "i32",
            },
            TILE=_TILE,
            LISTED=_LISTED,
            BLOCK=_finishing(_TILE),
            ALL_GREEDY=False,
        ),
    )
