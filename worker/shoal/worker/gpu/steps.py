"""What a step's plan becomes before the device sees it: arrays, made by arithmetic alone.

A step of decodes is three numbers a row, since the device knows the rest (see
`shoal.kernels.gpu.step_inputs`); any other step says for each token whose it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shoal.kernels.flat import Ints
from shoal.worker.step import Row, SlotInit, StepPlan

_SMALL = (1, 2, 4)
_STEP = 8  # between sizes, at least


@dataclass(frozen=True, slots=True)
class PromptAsk:
    """A sequence whose prompt's logprobs are wanted."""

    token_ids: tuple[int, ...]
    prompt_len: int
    likeliest: int

    def rows(self, row: Row) -> int:
        """Of so many of its first tokens the next one is of the prompt."""
        return max(0, min(row.count, self.prompt_len - 1 - row.start))


@dataclass(frozen=True, slots=True)
class MixedStep:
    """A step with prefills."""

    history: Ints  # token ids of the sequences that enter, one after the other
    updates: Ints  # [3, n]: slot, place in its table, block
    tokens: Ints  # [2, tokens]: slot, position
    slots: Ints  # [sequences]
    query_starts: Ints  # [sequences + 1]
    lengths: Ints  # [sequences], this step's tokens included
    sampling: Ints  # [3, n]: slot, position and 0 of the rows that draw, as in a step of decodes
    wanted: Ints  # flat tokens whose hidden states are wanted: those that draw, then the prompts'
    chosen: Ints  # the tokens behind the latter
    max_queries: int
    max_length: int

    @property
    def arrays(self) -> tuple[Ints, ...]:
        """All of it that the device reads, in the order of the fields."""
        return (
            self.history,
            self.updates,
            self.tokens,
            self.slots,
            self.query_starts,
            self.lengths,
            self.sampling,
            self.wanted,
            self.chosen,
        )


def graph_sizes(most: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, 24 ... 64, 80 ... 128, 160 ... up to `most` rows, which is one itself: from
    8 on no step is rounded up by more than a fourth of the next size, nor by less than 8."""
    sizes = [size for size in _SMALL if size < most]
    size = _STEP
    while size < most:
        sizes.append(size)
        size += max(_STEP, 1 << (size.bit_length() - 3))
    return (*sizes, most)


def decode_rows(plan: StepPlan) -> Ints | None:
    """[3, rows]: slot, position and new block (0: none) of a step whose rows are decodes; None
    where there are others. A sequence's last token alone counts as a decode."""
    if plan.init:
        return None
    rows = plan.rows
    out = np.zeros((3, len(rows)), np.int64)
    out[0] = [row.slot for row in rows]
    out[1] = [row.start for row in rows]
    if not all(row.sample and row.count == 1 for row in rows):
        return None
    if plan.grow:
        place = {row.slot: index for index, row in enumerate(rows)}
        for grow in plan.grow:
            if grow.slot not in place or len(grow.block_ids) != 1:
                return None
            out[2, place[grow.slot]] = grow.block_ids[0]
    return out


def even(size: int) -> int:
    """The next even number: int64 that begin there lie on 16 bytes, as kernels are compiled for."""
    return size + size % 2


def joined(arrays: Sequence[Ints]) -> tuple[Ints, list[int]]:
    """All of them, of one dimension or two, in one, each row on 16 bytes; and how long each is
    there, to take them apart."""
    parts = []
    for array in arrays:
        rows = array if array.ndim == 2 else array[None]
        part = np.zeros((len(rows), even(rows.shape[1])), np.int64)
        part[:, : rows.shape[1]] = rows
        parts.append(part.reshape(-1))
    return np.concatenate(parts), [len(part) for part in parts]


def padded(rows: Ints, size: int, padding: int) -> Ints:
    """Rows of a step of decodes, filled up to `size` with rows of the slot that is nobody's."""
    out = np.zeros((3, size), np.int64)
    out[0] = padding
    out[:, : rows.shape[1]] = rows
    return out


def mixed_step(plan: StepPlan, table_len: Ints, asks: Mapping[int, PromptAsk]) -> MixedStep:
    """`table_len` [slots]: blocks in each table, which are counted on; `asks`: by slot, those of
    the sequences that enter included."""
    rows = plan.rows
    slots, starts, counts = (
        np.array([getattr(row, name) for row in rows], np.int64)
        for name in ("slot", "start", "count")
    )
    ends = np.cumsum(counts)
    owner = np.repeat(np.arange(len(rows)), counts)
    positions = starts[owner] + np.arange(len(owner)) - (ends - counts)[owner]
    sampling = np.array([row.sample for row in rows], bool)
    drawing = np.zeros((3, int(sampling.sum())), np.int64)
    drawing[0], drawing[1] = slots[sampling], (starts + counts - 1)[sampling]
    wanted, chosen = [(ends - 1)[sampling]], [np.zeros(0, np.int64)]
    for row, end in zip(rows, ends.tolist(), strict=True):
        if (ask := asks.get(row.slot)) is not None and (count := ask.rows(row)):
            wanted.append(np.arange(end - row.count, end - row.count + count))
            chosen.append(np.array(ask.token_ids[row.start + 1 : row.start + 1 + count], np.int64))
    history = [np.array(init.token_ids, np.int64) for init in plan.init]
    return MixedStep(
        history=np.concatenate(history) if history else np.zeros(0, np.int64),
        updates=_updates(plan, table_len),
        tokens=np.stack((slots[owner], positions)),
        slots=slots,
        query_starts=np.concatenate(([0], ends)),
        lengths=starts + counts,
        sampling=drawing,
        wanted=np.concatenate(wanted),
        chosen=np.concatenate(chosen),
        # Rounded up, as kernels are compiled for some of these.
        max_queries=1 << (int(counts.max()) - 1).bit_length(),
        max_length=int((starts + counts).max()),
    )


def history_parts(init: tuple[SlotInit, ...]) -> list[tuple[int, int, int]]:
    """slot, first and end of each sequence's ids in `MixedStep.history`."""
    ends = np.cumsum([len(each.token_ids) for each in init]).tolist()
    return [
        (each.slot, end - len(each.token_ids), end) for each, end in zip(init, ends, strict=True)
    ]


def _updates(plan: StepPlan, table_len: Ints) -> Ints:
    parts = []
    for init in plan.init:
        table_len[init.slot] = 0
    for slot, blocks in (
        *((init.slot, init.block_ids) for init in plan.init),
        *((grow.slot, grow.block_ids) for grow in plan.grow),
    ):
        first = table_len[slot]
        part = np.zeros((3, len(blocks)), np.int64)
        part[0], part[1], part[2] = slot, np.arange(first, first + len(blocks)), blocks
        parts.append(part)
        table_len[slot] = first + len(blocks)
    return np.concatenate(parts, axis=1) if parts else np.zeros((3, 0), np.int64)
