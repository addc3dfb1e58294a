"""Rows of the embedding table for a step's tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.gpu.checks import expect, expect_together
from shoal.kernels.gpu.quantize import FLOATS
from shoal.kernels.gpu.variant import Variant

_BLOCK = 1024


@triton.jit
def _embed_kernel(
    ids_ptr,  # [tokens]
    table_ptr,  # [vocab, hidden]
    out_ptr,  # [tokens, hidden]
    vocab,
    hidden,
    scale,
    table_stride,
    out_stride,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(ids_ptr + token).to(tl.int64)
    known = tl.where((index >= 0) & (index < vocab), hidden, 0)
    row = table_ptr + index * table_stride
    x = tl.load(row + at, mask=at < known, other=0.0).to(tl.float32) * scale
    tl.store(out_ptr + token * out_stride + at, x.to(out_ptr.dtype.element_ty), mask=at < hidden)


def embed(
    ids: Tensor,
    table: Tensor,
    out_dtype: torch.dtype,
    scale: float = 1.0,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """`table[ids] * scale`, the product in float32: ids [tokens] int64 or int32, table [vocab,
    hidden] float, rows dense -> [tokens, hidden] `out_dtype`, written to `out` if given.

    An id outside the table gives zeros: a padding token, or one whose row another rank holds.
    Raises ValueError for tensors that do not fit.
    """
    expect("ids", ids, (None,), (torch.int64, torch.int32))
    expect("table", table, (None, None), FLOATS)
    if out_dtype not in FLOATS:
        raise ValueError(f"out_dtype is {out_dtype}, expected {' or '.join(map(str, FLOATS))}")
    tokens, (vocab, hidden) = ids.shape[0], table.shape
    if out is None:
        out = torch.empty(tokens, hidden, dtype=out_dtype, device=ids.device)
    expect("out", out, (tokens, hidden), out_dtype)
    expect_together(ids=ids, table=table, out=out)
    if tokens and hidden:
        block = min(_BLOCK, triton.next_power_of_2(hidden))
        _embed_kernel[(tokens, triton.cdiv(hidden, block))](
            ids,
            table,
            out,
            vocab,
            hidden,
            scale,
            table.stride(0),
            out.stride(0),
            BLOCK=block,
            num_warps=max(1, min(4, block // 256)),
        )
    return out


def variants() -> tuple[Variant, ...]:
    return tuple(
        Variant(
            name=f"embed bf16 to {out[1:]}",
            kernel=_embed_kernel,
            signature={
                "ids_ptr": "*i64",
                "table_ptr": "*bf16",
                "out_ptr": out,
                **dict.fromkeys(("vocab", "hidden"), "i32"),
                "scale": "fp32",
                **dict.fromkeys(("table_stride", "out_stride"), "i32"),
            },
            constants={"BLOCK": _BLOCK},
            aligned=("ids_ptr", "table_ptr", "out_ptr", "hidden", "table_stride", "out_stride"),
        )
        for out in ("*bf16", "*fp32")
    )
