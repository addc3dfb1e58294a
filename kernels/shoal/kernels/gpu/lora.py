"""Low-rank adapters: y = W x + scale * up (down x), another adapter for each row of a batch.

Hu et al., "LoRA", 2021. The rows of one adapter are gathered into tiles, so that each tile is two
small matrix products whatever order the rows have in the batch: shrink to the rank, then expand
into the output (the segmented gather of Chen et al., "Punica", 2023). A step of one row an adapter
and one of long prompts differ in nothing but the size of the tiles.

Shrink splits the long sum over the hidden size between programs; each writes its part and expand
adds the parts in their order, so results do not vary from run to run.
"""

from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.gpu.checks import expect, expect_together
from shoal.kernels.gpu.quantize import FLOATS
from shoal.kernels.gpu.variant import Variant

_SMALL, _LARGE = 16, 64  # rows of a tile: one row an adapter, and long prompts
_STEP = 64  # hidden columns that shrink takes at a time
_COLUMNS = 128  # output columns of one program of expand
_PROGRAMS = 264  # of shrink, about: two for each multiprocessor of a large device
_MAX_RANK = 256


@dataclass(frozen=True, slots=True)
class LoraBatch:
    """Which rows of a batch go through which adapter. Rows without an adapter are in no tile."""

    rows: Tensor  # [rows] int32: numbers of rows in the batch, those of a tile side by side
    starts: Tensor  # [tiles] int32: first place of a tile in `rows`
    counts: Tensor  # [tiles] int32: rows of a tile, at most `tile`; 0 is a tile that pads
    adapters: Tensor  # [tiles] int32
    tile: int  # 16 or 64

    @classmethod
    def of(cls, adapters: Tensor, device: torch.device, tiles: int | None = None) -> Self:
        """The tiles of a batch whose row i uses adapters[i] (int64, on the CPU; -1: none).

        `tiles`: pads to this many, for launches that are recorded once; raises ValueError where
        the batch needs more.
        """
        expect("adapters", adapters, (None,), torch.int64)
        order = adapters.argsort(stable=True)
        order = order[int((adapters < 0).sum()) :]
        names, sizes = adapters[order].unique_consecutive(return_counts=True)
        tile = _LARGE if len(sizes) and int(sizes.max()) >= _LARGE else _SMALL
        parts = (sizes + tile - 1) // tile  # tiles of each adapter
        segment = torch.repeat_interleave(torch.arange(len(sizes)), parts)
        before = parts.cumsum(0) - parts
        within = (torch.arange(len(segment)) - before[segment]) * tile
        starts = (sizes.cumsum(0) - sizes)[segment] + within
        counts = (sizes[segment] - within).clamp(max=tile)
        spare = 0 if tiles is None else tiles - len(segment)
        if spare < 0:
            raise ValueError(f"the batch needs {len(segment)} tiles of adapters, tiles is {tiles}")

        def moved(values: Tensor, padding: int) -> Tensor:
            filled = torch.nn.functional.pad(values, (0, padding)).int()
            return filled.to(device, non_blocking=True)

        return cls(
            rows=moved(order, len(adapters) - len(order)),
            starts=moved(starts, spare),
            counts=moved(counts, spare),
            adapters=moved(names[segment], spare),
            tile=tile,
        )


def add_lora_reference(
    out: Tensor, x: Tensor, down: Tensor, up: Tensor, scales: Tensor, adapters: Tensor
) -> Tensor:
    """What `add_lora` leaves in `out`, in float32; adapters [rows], -1 for none."""
    total = out.float()
    for row, adapter in enumerate(adapters.tolist()):
        if adapter >= 0:
            low = down[adapter].float() @ x[row].float()
            total[row] += scales[adapter] * (up[adapter].float() @ low)
    return total


@triton.jit(do_not_specialize=["part_stride"])
def _shrink_kernel(
    x_ptr,  # [rows, hidden]
    down_ptr,  # [adapters, rank, hidden]
    low_ptr,  # [splits, rows, RANK] float32
    rows_ptr,
    starts_ptr,
    counts_ptr,
    adapters_ptr,
    hidden,
    rank,
    chunk,  # hidden columns of one split, a multiple of STEP
    x_stride,
    adapter_stride,
    down_stride,
    part_stride,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,  # of products of float32; of others there is one
):
    tile, split = tl.program_id(0), tl.program_id(1)
    count = tl.load(counts_ptr + tile)
    if count == 0:
        return
    place = tl.arange(0, ROWS)
    present = place < count
    row = tl.load(rows_ptr + tl.load(starts_ptr + tile) + place, mask=present, other=0).to(tl.int64)
    adapter = tl.load(adapters_ptr + tile).to(tl.int64)
    lane = tl.arange(0, RANK)
    column = tl.arange(0, STEP)
    x_rows = x_ptr + row[:, None] * x_stride
    down_rows = down_ptr + adapter * adapter_stride + lane[None, :] * down_stride
    total = tl.zeros((ROWS, RANK), tl.float32)
    first = split * chunk
    for start in range(first, min(first + chunk, hidden), STEP):
        at = start + column
        x = tl.load(x_rows + at[None, :], mask=present[:, None] & (at < hidden)[None, :], other=0.0)
        down = tl.load(
            down_rows + at[:, None],
            mask=(at < hidden)[:, None] & (lane < rank)[None, :],
            other=0.0,
        )
        total = tl.dot(x, down, total, input_precision=PRECISION)
    low = low_ptr + split.to(tl.int64) * part_stride + row[:, None] * RANK + lane[None, :]
    tl.store(low, total, mask=present[:, None])


@triton.jit(do_not_specialize=["part_stride", "splits"])
def _expand_kernel(
    low_ptr,  # [splits, rows, RANK] float32
    up_ptr,  # [adapters, columns, rank]
    scales_ptr,  # [adapters] float32
    out_ptr,  # [rows, columns]
    rows_ptr,
    starts_ptr,
    counts_ptr,
    adapters_ptr,
    columns,
    rank,
    splits,
    adapter_stride,
    up_stride,
    out_stride,
    part_stride,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,  # of products of float32; of others there is one
):
    tile = tl.program_id(0)
    count = tl.load(counts_ptr + tile)
    if count == 0:
        return
    place = tl.arange(0, ROWS)
    present = place < count
    row = tl.load(rows_ptr + tl.load(starts_ptr + tile) + place, mask=present, other=0).to(tl.int64)
    adapter = tl.load(adapters_ptr + tile).to(tl.int64)
    lane = tl.arange(0, RANK)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    up = tl.load(
        up_ptr + adapter * adapter_stride + column[None, :] * up_stride + lane[:, None],
        mask=inside[None, :] & (lane < rank)[:, None],
        other=0.0,
    )
    part = low_ptr + row[:, None] * RANK + lane[None, :]
    low = tl.zeros((ROWS, RANK), tl.float32)
    for _ in range(splits):
        low += tl.load(part, mask=present[:, None], other=0.0)
        part += part_stride
    change = tl.dot(low.to(up.dtype), up, input_precision=PRECISION)
    out = out_ptr + row[:, None] * out_stride + column[None, :]
    mask = present[:, None] & inside[None, :]
    total = tl.load(out, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(scales_ptr + adapter) * change
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask)


def lora_workspace(rows: int, hidden: int, rank: int, device: torch.device) -> Tensor:
    """Room for the parts of `add_lora` with at most so many rows, hidden columns and ranks."""
    return torch.empty(_most_splits(hidden) * rows * _padded(rank), device=device)


def _most_splits(hidden: int) -> int:
    return max(1, min(16, -(-hidden // (4 * _STEP))))


def _padded(rank: int) -> int:
    return max(16, 1 << (rank - 1).bit_length())


def add_lora(
    out: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scales: Tensor,
    batch: LoraBatch,
    workspace: Tensor | None = None,
) -> Tensor:
    """Adds scales[a] * up[a] (down[a] x) to `out`, in place, for each row with an adapter a.

    out [rows, columns], a slice of a fused projection's columns where it has several adapters;
    x [rows, hidden]; down [adapters, rank, hidden]; up [adapters, columns, rank]; scales [adapters]
    float32. Adapters of smaller rank are padded with zeros; ranks up to 256. `workspace`: what
    `lora_workspace` returned, for launches that allocate nothing. Returns `out`.
    Raises ValueError for tensors that do not fit.
    """
    expect("x", x, (None, None), FLOATS)
    rows, hidden = x.shape
    expect("down", down, (None, None, hidden), x.dtype)
    adapters, rank, _ = down.shape
    expect("out", out, (rows, None), FLOATS)
    columns = out.shape[1]
    expect("up", up, (adapters, columns, rank), x.dtype)
    expect("scales", scales, (adapters,), torch.float32)
    expect("batch.rows", batch.rows, (rows,), torch.int32)
    expect_together(out=out, x=x, down=down, up=up, scales=scales, rows=batch.rows)
    if not 0 < rank <= _MAX_RANK:
        raise ValueError(f"down has rank {rank}, expected 1 to {_MAX_RANK}")
    tiles = len(batch.counts)
    if not tiles:
        return out
    padded = _padded(rank)
    splits = min(_most_splits(hidden), max(1, _PROGRAMS // tiles))
    chunk = triton.cdiv(triton.cdiv(hidden, _STEP), splits) * _STEP
    splits = triton.cdiv(hidden, chunk)
    if workspace is None:
        workspace = torch.empty(splits * rows * padded, device=x.device)
    expect("workspace", workspace, (None,), torch.float32)
    if len(workspace) < splits * rows * padded:
        raise ValueError(
            f"workspace holds {len(workspace)} numbers, {splits * rows * padded} are needed: "
            f"make it with lora_workspace({rows}, {hidden}, {rank}, device)"
        )
    places = (batch.rows, batch.starts, batch.counts, batch.adapters)
    _shrink_kernel[(tiles, splits)](
        x,
        down,
        workspace,
        *places,
        hidden,
        rank,
        chunk,
        x.stride(0),
        down.stride(0),
        down.stride(1),
        rows * padded,
        ROWS=batch.tile,
        RANK=padded,
        STEP=_STEP,
        PRECISION="ieee",
        num_warps=4,
        num_stages=3,
    )
    _expand_kernel[(tiles, triton.cdiv(columns, _COLUMNS))](
        workspace,
        up,
        scales,
        out,
        *places,
        columns,
        rank,
        splits,
        up.stride(0),
        up.stride(1),
        out.stride(0),
        rows * padded,
        ROWS=batch.tile,
        RANK=padded,
        COLUMNS=_COLUMNS,
        PRECISION="ieee",
        num_warps=4,
        num_stages=2,
    )
    return out


def variants() -> tuple[Variant, ...]:
    """Both halves for one row an adapter and for prompts, at small and large rank."""
    places = dict.fromkeys(("rows_ptr", "starts_ptr", "counts_ptr", "adapters_ptr"), "*i32")
    shrink = {"x_ptr": "*bf16", "down_ptr": "*bf16", "low_ptr": "*fp32", **places}
    sizes = ("hidden", "rank", "chunk", "x_stride", "adapter_stride", "down_stride")
    expand = {"low_ptr": "*fp32", "up_ptr": "*bf16", "scales_ptr": "*fp32", "out_ptr": "*bf16"}
    others = ("columns", "rank", "adapter_stride", "up_stride", "out_stride")
    return tuple(
        variant
        for rows, rank in ((_SMALL, 16), (_SMALL, 128), (_LARGE, 64))
        for variant in (
            Variant(
                name=f"lora shrink {rows} rows r{rank}",
                kernel=_shrink_kernel,
                signature={**shrink, **dict.fromkeys((*sizes, "part_stride"), "i32")},
                constants={"ROWS": rows, "RANK": rank, "STEP": _STEP, "PRECISION": "ieee"},
                aligned=(*shrink, *sizes),
                tensor_cores=True,
                wgmma=rows == _LARGE,
            ),
            Variant(
                name=f"lora expand {rows} rows r{rank}",
                kernel=_expand_kernel,
                signature={
                    **expand,
                    **places,
                    **dict.fromkeys((*others, "part_stride", "splits"), "i32"),
                },
                constants={"ROWS": rows, "RANK": rank, "COLUMNS": _COLUMNS, "PRECISION": "ieee"},
                num_stages=2,
                aligned=(*expand, *places, *others),
                tensor_cores=True,
                wgmma=rows == _LARGE,
            ),
        )
    )
