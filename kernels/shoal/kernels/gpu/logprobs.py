"""Log-probabilities of the chosen and of the likeliest tokens of a batch, on the device.

Two launches and no sort: every tile takes its own likeliest tokens one after the other, and one
program a row then takes the likeliest of those. The oracle is
`shoal.kernels.sampling.token_logprobs`; of tokens that tie the smaller id comes first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.gpu.checks import expect, expect_together
from shoal.kernels.gpu.quantize import FLOATS
from shoal.kernels.gpu.sampling_passes import LOWEST, ranked, ranked_value
from shoal.kernels.gpu.variant import Variant

MOST = 64  # likeliest tokens that a row may ask for
_TILE = 4096  # tokens of one program
_WARPS = 8
_ID = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _tiles_kernel(
    logits_ptr,  # [rows, vocab]
    ids_ptr,  # [rows]
    maxima_ptr,  # [rows, tiles] float32
    sums_ptr,  # [rows, tiles] float32, relative to the tile's maximum
    above_ptr,  # [rows, tiles] int32, tokens likelier than the chosen one
    likeliest_ptr,  # [rows, tiles, TOP] int64, `ranked`, falling
    vocab,
    stride,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    partial = row * tl.num_programs(1) + tile
    logits_ptr += row * stride
    at = tile * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    chosen = tl.load(logits_ptr + tl.load(ids_ptr + row)).to(tl.float32)
    most = tl.max(x, 0)
    # A tile of minus infinities sums to nothing, whatever it is compared with.
    base = tl.where(most > float("-inf"), most, 0.0)
    tl.store(maxima_ptr + partial, most)
    tl.store(sums_ptr + partial, tl.sum(tl.exp(x - base), 0))
    tl.store(above_ptr + partial, tl.sum((x > chosen).to(tl.int32), 0))
    if TOP > 0:
        ranks = tl.where(at < vocab, ranked(x, at), LOWEST)
        for place in range(TOP):
            best = tl.max(ranks, 0)
            tl.store(likeliest_ptr + partial * TOP + place, best)
            ranks = tl.where(ranks == best, LOWEST, ranks)


@triton.jit
def _rows_kernel(
    logits_ptr,  # [rows, vocab]
    ids_ptr,  # [rows]
    maxima_ptr,  # [rows, tiles]
    sums_ptr,
    above_ptr,
    likeliest_ptr,  # [rows, tiles, TOP]
    logprob_ptr,  # [rows] float32
    rank_ptr,  # [rows] int64
    top_ids_ptr,  # [rows, TOP] int64
    top_logprobs_ptr,  # [rows, TOP] float32
    tiles,
    stride,
    TOP: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, TILES)
    maxima = tl.load(maxima_ptr + row * tiles + at, mask=at < tiles, other=float("-inf"))
    sums = tl.load(sums_ptr + row * tiles + at, mask=at < tiles, other=0.0)
    above = tl.load(above_ptr + row * tiles + at, mask=at < tiles, other=0)
    most = tl.max(maxima, 0)
    norm = most + tl.log(tl.sum(sums * tl.exp(maxima - most), 0))
    chosen = tl.load(logits_ptr + row * stride + tl.load(ids_ptr + row)).to(tl.float32)
    tl.store(logprob_ptr + row, chosen - norm)
    tl.store(rank_ptr + row, (tl.sum(above, 0) + 1).to(tl.int64))
    if TOP > 0:
        # One maximum at a time below the last one: nothing is kept but the last.
        last = tl.full([], -(LOWEST + 1), tl.int64)
        for place in range(TOP):
            best = tl.full([], LOWEST, tl.int64)
            for begin in range(0, tiles * TOP, BLOCK):
                here = begin + tl.arange(0, BLOCK)
                ranks = tl.load(
                    likeliest_ptr + row * tiles * TOP + here, mask=here < tiles * TOP, other=LOWEST
                )
                best = tl.maximum(best, tl.max(tl.where(ranks < last, ranks, LOWEST), 0))
            tl.store(top_ids_ptr + row * TOP + place, (best & _ID) ^ _ID)
            tl.store(top_logprobs_ptr + row * TOP + place, ranked_value(best) - norm)
            last = best


def logprobs(
    logits: Tensor,
    ids: Tensor,
    top: int,
    *,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    tile: int = _TILE,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-softmax in float32 at the chosen tokens and at the `top` likeliest.

    logits [rows, vocab] float, rows dense, finite or -inf; ids [rows] int64, each a token ->
    logprob [rows] float32, rank [rows] int64 (1 is the likeliest), likeliest ids [rows, top]
    int64, their logprobs [rows, top] float32 in falling order; written to `out` if given. tile:
    how many tokens a program takes, a power of two. Raises ValueError for what does not fit.
    """
    expect("logits", logits, (None, None), FLOATS)
    rows, vocab = logits.shape
    expect("ids", ids, (rows,), torch.int64)
    if not 0 <= top <= min(MOST, vocab):
        raise ValueError(f"top is {top}, expected 0 to {min(MOST, vocab)}")
    device = logits.device
    if out is None:
        out = (
            torch.empty(rows, dtype=torch.float32, device=device),
            torch.empty(rows, dtype=torch.int64, device=device),
            torch.empty(rows, top, dtype=torch.int64, device=device),
            torch.empty(rows, top, dtype=torch.float32, device=device),
        )
    shapes = ((rows,), (rows,), (rows, top), (rows, top))
    for index, (tensor, shape) in enumerate(zip(out, shapes, strict=True)):
        dtype = torch.int64 if index in (1, 2) else torch.float32
        expect(f"out[{index}]", tensor, shape, dtype, dense=len(shape) if top else 1)
    expect_together(logits=logits, ids=ids, out=out[0])
    if not rows:
        return out
    tiles = triton.cdiv(vocab, tile)
    floats = torch.empty(2, rows, tiles, dtype=torch.float32, device=device)
    above = torch.empty(rows, tiles, dtype=torch.int32, device=device)
    likeliest = torch.empty(rows, tiles, top, dtype=torch.int64, device=device)
    partials = (floats[0], floats[1], above, likeliest)
    _tiles_kernel[(rows, tiles)](
        logits, ids, *partials, vocab, logits.stride(0), TOP=top, BLOCK=tile, num_warps=_WARPS
    )
    _rows_kernel[(rows,)](
        logits,
        ids,
        *partials,
        *out,
        tiles,
        logits.stride(0),
        TOP=top,
        TILES=triton.next_power_of_2(tiles),
        BLOCK=_merged(tiles, top),
        num_warps=4,
    )
    return out


def _merged(tiles: int, top: int) -> int:
    """Candidates that the last kernel reads at once."""
    size: int = triton.next_power_of_2(max(1, tiles * top))
    return min(2048, size)


def variants() -> tuple[Variant, ...]:
    """For a vocabulary of 128k; only requests that ask for logprobs run these."""
    source = {"logits_ptr": "*fp32", "ids_ptr": "*i64"}
    partials = {"maxima_ptr": "*fp32", "sums_ptr": "*fp32", "above_ptr": "*i32"}
    likeliest = {"likeliest_ptr": "*i64"}
    results = {
        "logprob_ptr": "*fp32",
        "rank_ptr": "*i64",
        "top_ids_ptr": "*i64",
        "top_logprobs_ptr": "*fp32",
    }
    return tuple(
        variant
        for top in (0, 20)
        for variant in (
            Variant(
                name=f"logprobs: tiles, top {top}",
                kernel=_tiles_kernel,
                signature={**source, **partials, **likeliest, "vocab": "i32", "stride": "i32"},
                constants={"TOP": top, "BLOCK": _TILE},
                num_warps=_WARPS,
                aligned=("logits_ptr", "vocab", "stride"),
                hot=False,
            ),
            Variant(
                name=f"logprobs: rows, top {top}",
                kernel=_rows_kernel,
                signature={
                    **source,
                    **partials,
                    **likeliest,
                    **results,
                    "tiles": "i32",
                    "stride": "i32",
                },
                constants={"TOP": top, "TILES": 32, "BLOCK": _merged(32, top)},
                aligned=("logits_ptr", "stride"),
                hot=False,
            ),
        )
    )
