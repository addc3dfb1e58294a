"""Tokens sorted by the expert that they go through, in tiles of rows that share one.

A grouped product wants every tile of rows to meet one matrix, so each expert's rows are filled up
to whole tiles (the layout of MegaBlocks, Gale et al., 2022, and of vLLM's fused experts). All is
counted on the device: buffers and grids have the sizes of the worst case, which follow from the
shapes alone, and tiles without work say so. Within an expert tokens keep their order, so that a
step gives the same bits when it is run again.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.gpu.checks import expect
from shoal.kernels.gpu.variant import Variant

_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Placement:
    """Where each pair of a token and one of its experts went; pair = token * per_token + choice."""

    pairs: Tensor  # [tiles * tile] int32, -1 where a tile is filled up
    experts: Tensor  # [tiles] int32: the expert of a tile, -1 for a tile without rows
    tile: int  # rows of one

    @property
    def tiles(self) -> int:
        return self.experts.shape[0]


@triton.jit(do_not_specialize=["pairs"])
def _count_kernel(
    ids_ptr,  # [pairs]
    counts_ptr,  # [experts]
    pairs,
    BLOCK: tl.constexpr,
):
    expert = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, pairs, BLOCK):
        here = start + at
        count += (tl.load(ids_ptr + here, mask=here < pairs, other=-1) == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(count, 0))


@triton.jit(do_not_specialize=["pairs", "tiles"])
def _place_kernel(
    ids_ptr,  # [pairs]
    counts_ptr,  # [experts]
    order_ptr,  # [tiles * TILE]
    tile_experts_ptr,  # [tiles]
    pairs,
    tiles,
    experts,
    TILE: tl.constexpr,
    EXPERTS: tl.constexpr,  # a power of two, `experts` or more
    BLOCK: tl.constexpr,
):
    """A program places the rows of one expert; one more marks the tiles that are left."""
    expert = tl.program_id(0)
    every = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + every, mask=every < experts, other=0)
    taken = (counts + TILE - 1) // TILE
    first = tl.sum(tl.where(every < expert, taken, 0), 0)
    at = tl.arange(0, BLOCK)
    if expert < experts:
        count = tl.sum(tl.where(every == expert, counts, 0), 0)
        last = first + (count + TILE - 1) // TILE
        for start in range(first, last, BLOCK):
            tl.store(tile_experts_ptr + start + at, expert, mask=start + at < last)
        written = first * TILE
        for start in range(0, pairs, BLOCK):
            here = start + at
            mine = tl.load(ids_ptr + here, mask=here < pairs, other=-1) == expert
            rank = tl.cumsum(mine.to(tl.int32), 0)
            tl.store(order_ptr + written + rank - 1, here, mask=mine)
            written += tl.max(rank, 0)
        filling = written + tl.arange(0, TILE)
        tl.store(order_ptr + filling, -1, mask=filling < last * TILE)
    else:
        for start in range(first, tiles, BLOCK):
            tl.store(tile_experts_ptr + start + at, -1, mask=start + at < tiles)


def most_tiles(pairs: int, experts: int, tile: int) -> int:
    """The most tiles that so many pairs can need: all but one row of a tile may be filling."""
    return (pairs + min(experts, pairs) * (tile - 1)) // tile


def place_tokens(ids: Tensor, experts: int, tile: int) -> Placement:
    """ids [tokens, per_token] int32 or int64, dense; those outside [0, experts) are left out, as
    of rows that only fill a batch or experts of another device. tile: a power of two."""
    expect("ids", ids, (None, None), (torch.int32, torch.int64), dense=2)
    pairs = ids.numel()
    tiles = most_tiles(pairs, experts, tile)
    room = torch.empty(experts + tiles + tiles * tile, dtype=torch.int32, device=ids.device)
    counts, tile_experts, order = room.split([experts, tiles, tiles * tile])
    if pairs:
        _count_kernel[(experts,)](ids, counts, pairs, BLOCK=_BLOCK, num_warps=4)
        _place_kernel[(experts + 1,)](
            ids,
            counts,
            order,
            tile_experts,
            pairs,
            tiles,
            experts,
            TILE=tile,
            EXPERTS=triton.next_power_of_2(experts),
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return Placement(pairs=order, experts=tile_experts, tile=tile)


def variants() -> tuple[Variant, ...]:
    return (
        Variant(
            name="count tokens of experts",
            kernel=_count_kernel,
            signature={"ids_ptr": "*i64", "counts_ptr": "*i32", "pairs": "i32"},
            constants={"BLOCK": _BLOCK},
            aligned=("ids_ptr",),
        ),
        Variant(
            name="place tokens of 128 experts",
            kernel=_place_kernel,
            signature={
                "ids_ptr": "*i64",
                "counts_ptr": "*i32",
                "order_ptr": "*i32",
                "tile_experts_ptr": "*i32",
                "pairs": "i32",
                "tiles": "i32",
                "experts": "i32",
            },
            constants={"TILE": 16, "EXPERTS": 128, "BLOCK": _BLOCK},
            aligned=("ids_ptr",),
        ),
    )
