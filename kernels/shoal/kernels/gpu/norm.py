"""Norms of rows, alone or with the sum of the residual before and eight-bit codes behind; norms
of heads.

A program holds a whole row in registers, reads it once and computes in float32. The oracles are
the CPU's ops in `shoal.kernels.norm`, whose formulas and papers hold here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.gpu.checks import expect, expect_together
from shoal.kernels.gpu.quantize import (
    FLOATS,
    FP8_LIMIT,
    INT8_LIMIT,
    SMALLEST,
    addressed,
    encode,
    native_fp8,
)
from shoal.kernels.gpu.variant import Variant

WIDEST = 32768  # columns that one program holds in registers
_TILE = 2048  # elements of the heads that one program norms


@triton.jit
def _norm_kernel(
    x_ptr,  # [rows, hidden]
    delta_ptr,  # [rows, hidden] or none: x becomes x + delta
    weight_ptr,  # [hidden] or none
    bias_ptr,  # [hidden] or none
    out_ptr,  # [rows, hidden]
    scales_ptr,  # [rows] where out are codes, else none
    hidden,
    eps,
    x_stride,
    delta_stride,
    out_stride,
    CENTERED: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    LIMIT: tl.constexpr,
    SMALLEST: tl.constexpr,
    INTEGER: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < hidden
    x = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    if delta_ptr is not None:
        delta = tl.load(delta_ptr + row * delta_stride + at, mask=inside, other=0.0)
        # What the next layer reads is what is normed here: the sum as it is stored.
        rounded = (x + delta.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + row * x_stride + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    if CENTERED:
        x = tl.where(inside, x - tl.sum(x, 0) / hidden, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / hidden + eps)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if PLUS_ONE:
            weight += 1.0
        y *= weight
    if bias_ptr is not None:
        y += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if scales_ptr is not None:
        broken = tl.max((y != y).to(tl.int32), 0) > 0
        scale = tl.maximum(tl.max(tl.where(inside, tl.abs(y), 0.0), 0), SMALLEST) / LIMIT
        codes = encode(tl.clamp(y / scale, -LIMIT, LIMIT), INTEGER, NATIVE)
        tl.store(out_ptr + row * out_stride + at, codes, mask=inside)
        # A maximum passes over NaN, and codes have none to tell of it.
        tl.store(scales_ptr + row, tl.where(broken, float("nan"), scale))
    else:
        tl.store(out_ptr + row * out_stride + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_heads_kernel(
    heads_ptr,  # [tokens, heads, SIZE], in place
    weight_ptr,  # [SIZE]
    heads,
    eps,
    token_stride,
    head_stride,
    SIZE: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, BLOCK)
    inside = (head < heads)[:, None] & (at < SIZE)[None, :]
    pointers = heads_ptr + token * token_stride + head[:, None] * head_stride + at[None, :]
    x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / SIZE + eps)
    weight = tl.load(weight_ptr + at, mask=at < SIZE, other=0.0).to(tl.float32)
    if PLUS_ONE:
        weight += 1.0
    y = x * inverse[:, None] * weight[None, :]
    tl.store(pointers, y.to(heads_ptr.dtype.element_ty), mask=inside)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    *,
    plus_one: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` of each row; with `plus_one` the weight counts as
    `1 + weight`, as Gemma stores it.

    x [rows, hidden] float, rows dense; weight [hidden] float -> [rows, hidden] `out_dtype`,
    written to `out` if given. Raises ValueError for tensors that do not fit, as do all below.
    """
    return _normed(x, None, weight, None, eps, out_dtype, out, plus_one=plus_one)


def add_rms_norm(
    residual: Tensor,
    delta: Tensor,
    weight: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    *,
    plus_one: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Adds `delta` [rows, hidden] to `residual` in place, then norms the sum (see `rms_norm`)."""
    return _normed(residual, delta, weight, None, eps, out_dtype, out, plus_one=plus_one)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` of each row, arguments as above."""
    return _normed(x, None, weight, bias, eps, out_dtype, out, centered=True)


def add_layer_norm(
    residual: Tensor,
    delta: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Adds `delta` to `residual` in place, then norms the sum (see `layer_norm`)."""
    return _normed(residual, delta, weight, bias, eps, out_dtype, out, centered=True)


def quantized_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    codes_dtype: torch.dtype,
    *,
    delta: Tensor | None = None,
    plus_one: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The norm as codes (int8 or float8_e4m3fn) [rows, hidden] and scales [rows] float32, as
    `quantize_rows` makes them; `delta` is added to x in place first. A row that holds a NaN has
    the scale NaN."""
    codes, scales = out or _codes(x, codes_dtype)
    _check_codes(x, codes, scales, codes_dtype)
    _launch(x, delta, weight, None, eps, codes, scales, plus_one=plus_one)
    return codes, scales


def quantized_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    codes_dtype: torch.dtype,
    *,
    delta: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `quantized_rms_norm`, of a `layer_norm`."""
    codes, scales = out or _codes(x, codes_dtype)
    _check_codes(x, codes, scales, codes_dtype)
    _launch(x, delta, weight, bias, eps, codes, scales, centered=True)
    return codes, scales


def norm_heads_(heads: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False) -> None:
    """Root-mean-square norm over the last dimension, in place.

    heads [tokens, heads, n], any strides with a dense last dimension, or [tokens, n]; weight [n].
    """
    if heads.dim() == 2:
        heads = heads.unsqueeze(1)
    expect("heads", heads, (None, None, None), FLOATS)
    tokens, count, size = heads.shape
    expect("weight", weight, (size,), FLOATS)
    expect_together(heads=heads, weight=weight)
    block = _block("heads", size)
    together = max(1, min(triton.next_power_of_2(count), _TILE // block))
    if tokens and count:
        _norm_heads_kernel[(tokens, triton.cdiv(count, together))](
            heads,
            weight,
            count,
            eps,
            heads.stride(0),
            heads.stride(1),
            SIZE=size,
            PLUS_ONE=plus_one,
            HEADS=together,
            BLOCK=block,
            num_warps=_warps(together * block),
        )


def _normed(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    out: Tensor | None,
    *,
    centered: bool = False,
    plus_one: bool = False,
) -> Tensor:
    if out is None:
        out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    if out_dtype not in FLOATS:
        raise ValueError(f"out_dtype is {out_dtype}, expected {' or '.join(map(str, FLOATS))}")
    expect("out", out, tuple(x.shape), out_dtype)
    _launch(x, delta, weight, bias, eps, out, None, centered=centered, plus_one=plus_one)
    return out


def _launch(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
    scales: Tensor | None,
    *,
    centered: bool = False,
    plus_one: bool = False,
) -> None:
    expect("x" if delta is None else "residual", x, (None, None), FLOATS)
    rows, hidden = x.shape
    given = {"x": x, "out": out}
    if delta is not None:
        expect("delta", delta, (rows, hidden), FLOATS)
        given["delta"] = delta
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            expect(name, vector, (hidden,), FLOATS)
            given[name] = vector
    expect_together(**given)
    block = _block("x", hidden)
    if not rows:
        return
    native = native_fp8(x.device)
    integer = out.dtype == torch.int8
    _norm_kernel[(rows,)](
        x,
        delta,
        weight,
        bias,
        addressed(out, native),
        scales,
        hidden,
        eps,
        x.stride(0),
        0 if delta is None else delta.stride(0),
        out.stride(0),
        CENTERED=centered,
        PLUS_ONE=plus_one,
        LIMIT=INT8_LIMIT if integer else FP8_LIMIT,
        SMALLEST=SMALLEST,
        INTEGER=integer,
        NATIVE=native,
        BLOCK=block,
        num_warps=_warps(block),
    )


def _block(name: str, size: int) -> int:
    if not 0 < size <= WIDEST:
        raise ValueError(f"{name} has rows of {size}, expected 1 to {WIDEST}")
    block: int = triton.next_power_of_2(size)
    return block


def _warps(elements: int) -> int:
    return max(1, min(16, elements // 512))


def _codes(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(x.shape, dtype=dtype, device=x.device),
        torch.empty(x.shape[0], dtype=torch.float32, device=x.device),
    )


def _check_codes(x: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"codes_dtype is {dtype}, expected torch.int8 or torch.float8_e4m3fn")
    expect("codes", codes, tuple(x.shape), dtype)
    expect("scales", scales, (x.shape[0],), torch.float32)
    expect_together(x=x, codes=codes, scales=scales)


def variants() -> tuple[Variant, ...]:
    def norm(
        name: str,
        residual: str,
        out: str,
        *,
        block: int,
        bias: bool = False,
        centered: bool = False,
    ) -> Variant:
        codes = out in ("*i8", "*u8")
        pointers = {"x_ptr": residual, "delta_ptr": "*bf16", "weight_ptr": "*bf16"}
        return Variant(
            name=f"norm {name}",
            kernel=_norm_kernel,
            signature={
                **pointers,
                "bias_ptr": "*bf16" if bias else "constexpr",
                "out_ptr": out,
                "scales_ptr": "*fp32" if codes else "constexpr",
                "hidden": "i32",
                "eps": "fp32",
                **dict.fromkeys(("x_stride", "delta_stride", "out_stride"), "i32"),
            },
            constants={
                **({} if bias else {"bias_ptr": None}),
                **({} if codes else {"scales_ptr": None}),
                "CENTERED": centered,
                "PLUS_ONE": False,
                "LIMIT": INT8_LIMIT if out == "*i8" else FP8_LIMIT,
                "SMALLEST": SMALLEST,
                "INTEGER": out == "*i8",
                "NATIVE": False,
                "BLOCK": block,
            },
            num_warps=_warps(block),
            aligned=(*pointers, "out_ptr", "hidden", "x_stride", "delta_stride", "out_stride"),
        )

    heads = Variant(
        name="norm_heads_ bf16 d128",
        kernel=_norm_heads_kernel,
        signature={
            "heads_ptr": "*bf16",
            "weight_ptr": "*bf16",
            "heads": "i32",
            "eps": "fp32",
            "token_stride": "i32",
            "head_stride": "i32",
        },
        constants={"SIZE": 128, "PLUS_ONE": False, "HEADS": 16, "BLOCK": 128},
        num_warps=_warps(2048),
        aligned=("heads_ptr", "weight_ptr", "token_stride", "head_stride"),
    )
    return (
        norm("add rms fp32 to bf16", "*fp32", "*bf16", block=4096),
        norm("add rms bf16 to bf16, widest rows", "*bf16", "*bf16", block=16384),
        norm("add rms bf16 to int8", "*bf16", "*i8", block=4096),
        norm("add rms bf16 to fp8", "*bf16", "*u8", block=8192),
        norm("add layer bf16 to bf16", "*bf16", "*bf16", block=4096, bias=True, centered=True),
        heads,
    )
