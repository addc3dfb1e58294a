"""Rotary position embedding of heads, in place (Su et al., "RoFormer", 2021).

The table holds the cosines and the sines of every position, whatever scaling made their angles:
row p is `cos(p * f_0), ..., cos(p * f_n-1), sin(p * f_0), ..., sin(p * f_n-1)` for n = rotary_dim
/ 2 frequencies. Element 2i is paired with 2i + 1 where `interleaved`, else i with i + n. Elements
from rotary_dim on stay as they are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.gpu.checks import expect, expect_together
from shoal.kernels.gpu.quantize import FLOATS
from shoal.kernels.gpu.variant import Variant

_TILE = 1024  # pairs that one program turns


@triton.jit
def _rope_kernel(
    heads_ptr,  # [tokens, heads, at least 2 * PAIRS], in place
    table_ptr,  # [positions, 2 * PAIRS]
    positions_ptr,  # [tokens]
    heads,
    token_stride,
    head_stride,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, BLOCK)
    turns = table_ptr + tl.load(positions_ptr + token) * (2 * PAIRS)
    cosine = tl.load(turns + pair, mask=pair < PAIRS, other=0.0)[None, :]
    sine = tl.load(turns + PAIRS + pair, mask=pair < PAIRS, other=0.0)[None, :]
    rows = heads_ptr + token * token_stride + head[:, None] * head_stride
    present = (head < heads)[:, None]
    inside = present & (pair < PAIRS)[None, :]
    if INTERLEAVED:
        # Whole rows are moved, since one load of neighbours is wider than two of every other.
        at = tl.arange(0, 2 * BLOCK)
        within = present & (at < 2 * PAIRS)[None, :]
        x = tl.load(rows + at[None, :], mask=within, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (HEADS, BLOCK, 2)))
        turned = tl.join(first * cosine - second * sine, second * cosine + first * sine)
        y = tl.reshape(turned, (HEADS, 2 * BLOCK))
        tl.store(rows + at[None, :], y.to(heads_ptr.dtype.element_ty), mask=within)
    else:
        low, high = rows + pair[None, :], rows + PAIRS + pair[None, :]
        first = tl.load(low, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(high, mask=inside, other=0.0).to(tl.float32)
        kind = heads_ptr.dtype.element_ty
        tl.store(low, (first * cosine - second * sine).to(kind), mask=inside)
        tl.store(high, (second * cosine + first * sine).to(kind), mask=inside)


def cos_sin_table(turns: Tensor) -> Tensor:
    """The table of `apply_rope_` from complex `turns` [positions, n], a `kernels.rope.rope_table`
    -> [positions, 2 * n] float32."""
    return torch.cat((turns.real, turns.imag), dim=1).float().contiguous()


def apply_rope_(heads: Tensor, table: Tensor, positions: Tensor, *, interleaved: bool) -> None:
    """Turns the first rotary_dim elements of every head by the angles of its token's position.

    heads [tokens, n, head_dim] float, any strides with a dense last dimension; table [positions,
    rotary_dim] float32, dense, rotary_dim even and at most head_dim; positions [tokens] int64,
    each a row of the table. Raises ValueError for tensors that do not fit.
    """
    expect("heads", heads, (None, None, None), FLOATS)
    expect("table", table, (None, None), torch.float32, dense=2)
    tokens, count, head_dim = heads.shape
    rotary_dim = table.shape[1]
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(
            f"table turns {rotary_dim} elements, expected an even number from 2 to the "
            f"{head_dim} of a head"
        )
    expect("positions", positions, (tokens,), torch.int64)
    expect_together(heads=heads, table=table, positions=positions)
    block = triton.next_power_of_2(rotary_dim // 2)
    together = max(1, min(triton.next_power_of_2(count), _TILE // block))
    if tokens and count:
        _rope_kernel[(tokens, triton.cdiv(count, together))](
            heads,
            table,
            positions,
            count,
            heads.stride(0),
            heads.stride(1),
            PAIRS=rotary_dim // 2,
            INTERLEAVED=interleaved,
            HEADS=together,
            BLOCK=block,
            num_warps=_warps(together * block),
        )


def _warps(pairs: int) -> int:
    return max(1, min(4, pairs // 256))


def variants() -> tuple[Variant, ...]:
    def variant(name: str, pairs: int, *, interleaved: bool) -> Variant:
        block = triton.next_power_of_2(pairs)
        return Variant(
            name=f"apply_rope_ bf16 {name}",
            kernel=_rope_kernel,
            signature={
                "heads_ptr": "*bf16",
                "table_ptr": "*fp32",
                "positions_ptr": "*i64",
                **dict.fromkeys(("heads", "token_stride", "head_stride"), "i32"),
            },
            constants={
                "PAIRS": pairs,
                "INTERLEAVED": interleaved,
                "HEADS": _TILE // block,
                "BLOCK": block,
            },
            num_warps=_warps(_TILE),
            aligned=("heads_ptr", "table_ptr", "positions_ptr", "token_stride", "head_stride"),
        )

    return (
        variant("interleaved d128", 64, interleaved=True),
        variant("halves d128", 64, interleaved=False),
        variant("interleaved, 40 pairs", 40, interleaved=True),
    )
