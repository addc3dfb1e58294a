"""What a decode step reads and leaves behind, so that its host sends three numbers a row and no
more: the token that the step before drew, the place of its keys and values, the block table.

The state has a row a slot and stays on the device; a token drawn is written to it by the step that
drew it, and read by the next, without the host in between.
"""

from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.gpu.checks import expect, expect_together
from shoal.kernels.gpu.variant import Variant

_BLOCK = 256  # entries of a table that one program copies


@dataclass(frozen=True, slots=True)
class SlotRows:
    """The state of all slots; the last row is nobody's, for the rows that pad a step."""

    tokens: Tensor  # [slots + 1, positions] int32
    tables: Tensor  # [slots + 1, blocks] int32

    @classmethod
    def allocate(cls, slots: int, positions: int, blocks: int, device: torch.device) -> Self:
        tokens = torch.zeros(slots + 1, positions, dtype=torch.int32, device=device)
        return cls(tokens, torch.zeros(slots + 1, blocks, dtype=torch.int32, device=device))

    @property
    def padding(self) -> int:
        """The slot that is nobody's."""
        return self.tokens.shape[0] - 1


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """What `gather_decode` makes of a step's rows."""

    ids: Tensor  # [rows] int64
    places: Tensor  # [rows] int64: block * block_size + offset; -1 for padding
    lengths: Tensor  # [rows] int32, this step's token included; 0 for padding
    tables: Tensor  # [rows, blocks] int32: only the blocks of a row's length are written

    @classmethod
    def allocate(cls, rows: int, blocks: int, device: torch.device) -> Self:
        ids, places = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        tables = torch.zeros(rows, blocks, dtype=torch.int32, device=device)
        return cls(ids, places, lengths, tables)

    def first(self, rows: int) -> "DecodeRows":
        """Views of the first rows."""
        return DecodeRows(
            self.ids[:rows], self.places[:rows], self.lengths[:rows], self.tables[:rows]
        )


@triton.jit(do_not_specialize=["step_width"])
def _gather_kernel(
    step,
    tokens,
    tables,
    ids,
    places,
    lengths,
    row_tables,
    step_width,
    positions_width,
    blocks_width,
    row_width,
    padding,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(step + row)
    position = tl.load(step + step_width + row)
    fresh = tl.load(step + 2 * step_width + row)
    used = slot != padding
    last = position // BLOCK_SIZE
    first = tl.program_id(1).to(tl.int64) * BLOCK
    if first <= last:
        end = tl.where(used, last, -1)
        begun = tl.where(fresh > 0, end, -1)  # the place of the new block
        places_of = first + tl.arange(0, BLOCK)
        source = tables + slot * blocks_width
        blocks = tl.load(source + places_of, mask=places_of <= end, other=0)
        blocks = tl.where(places_of == begun, fresh.to(tl.int32), blocks)
        target = row_tables + row.to(tl.int64) * row_width
        tl.store(target + places_of, blocks, mask=places_of <= end)
        tl.store(source + places_of, blocks, mask=places_of == begun)
        if last < first + BLOCK:
            block = tl.sum(tl.where(places_of == last, blocks, 0)).to(tl.int64)
            place = block * BLOCK_SIZE + position % BLOCK_SIZE
            tl.store(places + row, tl.where(used, place, -1))
            tl.store(lengths + row, tl.where(used, position + 1, 0).to(tl.int32))
            token = tl.load(tokens + slot * positions_width + position)
            tl.store(ids + row, token.to(tl.int64))


@triton.jit(do_not_specialize=["rows", "step_width"])
def _relay_kernel(
    step, drawn, tokens, rows, step_width, positions_width, padding, BLOCK: tl.constexpr
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    slot = tl.load(step + row, mask=inside, other=0)
    position = tl.load(step + step_width + row, mask=inside, other=0)
    token = tl.load(drawn + row, mask=inside, other=0)
    place = tokens + slot * positions_width + position + 1
    tl.store(place, token.to(tl.int32), mask=inside & (slot != padding))


def gather_decode(step: Tensor, state: SlotRows, block_size: int, out: DecodeRows) -> None:
    """Reads what each row of a decode step computes, and enters new blocks into the tables.

    step [3, rows] int64, each row dense: slot, position of the token to compute, and the block that
    it begins (0: none, it goes on in the last one). Rows of one step have distinct slots, but for
    padding, at position 0.
    """
    rows = out.ids.shape[0]
    blocks = state.tables.shape[1]
    expect("step", step, (3, rows), torch.int64)
    expect("state.tokens", state.tokens, (None, None), torch.int32, dense=2)
    expect("state.tables", state.tables, (None, None), torch.int32, dense=2)
    expect("out.tables", out.tables, (rows, blocks), torch.int32, dense=1)
    expect_together(step=step, tokens=state.tokens, tables=state.tables, ids=out.ids)
    _gather_kernel[(rows, triton.cdiv(blocks, _BLOCK))](
        step,
        state.tokens,
        state.tables,
        out.ids,
        out.places,
        out.lengths,
        out.tables,
        step.stride(0),
        state.tokens.stride(0),
        state.tables.stride(0),
        out.tables.stride(0),
        state.padding,
        BLOCK_SIZE=block_size,
        BLOCK=_BLOCK,
    )


def relay_drawn(step: Tensor, drawn: Tensor, state: SlotRows) -> None:
    """Writes the token that each row drew, drawn [rows] int64, behind the one that it computed;
    step as for `gather_decode`."""
    rows = drawn.shape[0]
    expect("step", step, (3, rows), torch.int64)
    expect("drawn", drawn, (rows,), torch.int64)
    expect("state.tokens", state.tokens, (None, None), torch.int32, dense=2)
    expect_together(step=step, drawn=drawn, tokens=state.tokens)
    _relay_kernel[(triton.cdiv(rows, 128),)](
        step,
        drawn,
        state.tokens,
        rows,
        step.stride(0),
        state.tokens.stride(0),
        state.padding,
        BLOCK=128,
    )


def gather_decode_reference(
    step: Tensor, state: SlotRows, block_size: int
) -> tuple[SlotRows, DecodeRows]:
    """The oracle: the state afterwards, and the rows, their tables zero beyond a row's length."""
    tokens, tables = state.tokens.clone(), state.tables.clone()
    rows = DecodeRows.allocate(step.shape[1], tables.shape[1], tables.device)
    for row, (slot, position, fresh) in enumerate(step.t().tolist()):
        last = position // block_size
        if slot == state.padding:
            rows.places[row] = -1
            rows.ids[row] = tokens[slot, position]
            continue
        if fresh:
            tables[slot, last] = fresh
        rows.tables[row, : last + 1] = tables[slot, : last + 1]
        rows.ids[row] = tokens[slot, position]
        rows.places[row] = int(tables[slot, last]) * block_size + position % block_size
        rows.lengths[row] = position + 1
    return SlotRows(tokens, tables), rows


def variants() -> tuple[Variant, ...]:
    gather = {
        **dict.fromkeys(("step", "ids", "places"), "*i64"),
        **dict.fromkeys(("tokens", "tables", "lengths", "row_tables"), "*i32"),
        **dict.fromkeys(
            ("step_width", "positions_width", "blocks_width", "row_width", "padding"), "i32"
        ),
    }
    ordered = (
        "step",
        "tokens",
        "tables",
        "ids",
        "places",
        "lengths",
        "row_tables",
        "step_width",
        "positions_width",
        "blocks_width",
        "row_width",
        "padding",
    )
    relay = {
        "step": "*i64",
        "drawn": "*i64",
        "tokens": "*i32",
        "rows": "i32",
        "step_width": "i32",
        "positions_width": "i32",
        "padding": "i32",
    }
    return (
        Variant(
            "gather_decode block 16",
            _gather_kernel,
            {name: gather[name] for name in ordered},
            {"BLOCK_SIZE": 16, "BLOCK": _BLOCK},
        ),
        Variant("relay_drawn", _relay_kernel, relay, {"BLOCK": 128}),
    )
