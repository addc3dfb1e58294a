"""What an MLP does between its matrices, in one pass over the rows.

The oracle is `shoal.kernels.activation.ACTIVATIONS`, which names them too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.activation import ACTIVATIONS
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

_BLOCK = 1024
_CODED_BLOCK = 4096  # columns of a row that a program codes at a time


@triton.jit
def _sigmoid(x):
    """Without an overflow on either side."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, small, 1.0) / (1.0 + small)


@triton.jit
def _activate(x, NAME: tl.constexpr):
    """float32 -> float32, element by element."""
    if NAME == "silu":
        y = x * _sigmoid(x)
    elif NAME == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        # 1 + tanh(u) = 2 * sigmoid(2 * u)
        y = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(NAME == "relu" or NAME == "relu_squared")
        y = tl.where(x < 0.0, 0.0, x)  # a NaN stays one
        if NAME == "relu_squared":
            y = y * y
    return y


@triton.jit
def _product(x_ptr, at, columns, NAME: tl.constexpr, GATED: tl.constexpr):
    """The activated elements `at` of a row, times those of the other half where gated."""
    gate = tl.load(x_ptr + at, mask=at < columns, other=0.0).to(tl.float32)
    y = _activate(gate, NAME)
    if GATED:
        # Rounded between the two as the separate operations of a model's reference are.
        up = tl.load(x_ptr + columns + at, mask=at < columns, other=0.0)
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32) * up.to(tl.float32)
    return y


@triton.jit
def _activation_kernel(
    x_ptr,  # [rows, 2 * columns] where gated, else [rows, columns]
    out_ptr,  # [rows, columns]
    columns,
    x_stride,
    out_stride,
    NAME: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = _product(x_ptr + row * x_stride, at, columns, NAME, GATED)
    tl.store(out_ptr + row * out_stride + at, y.to(out_ptr.dtype.element_ty), mask=at < columns)


@triton.jit
def _coded_activation_kernel(
    x_ptr,  # as above
    codes_ptr,  # [rows, columns]
    scales_ptr,  # [rows]
    columns,
    x_stride,
    codes_stride,
    NAME: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    SMALLEST: tl.constexpr,
    INTEGER: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    codes_ptr += row * codes_stride
    most = tl.zeros([BLOCK], tl.float32)
    broken = tl.zeros([BLOCK], tl.int32)
    for start in range(0, columns, BLOCK):
        y = _product(x_ptr, start + tl.arange(0, BLOCK), columns, NAME, GATED)
        most = tl.maximum(most, tl.abs(y))
        broken |= (y != y).to(tl.int32)
    scale = tl.maximum(tl.max(most, 0), SMALLEST) / LIMIT
    # A maximum passes over NaN, and codes have none to tell of it.
    tl.store(scales_ptr + row, tl.where(tl.max(broken, 0) > 0, float("nan"), scale))
    # Computed twice rather than kept: a row may be wider than the registers.
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        y = tl.clamp(_product(x_ptr, at, columns, NAME, GATED) / scale, -LIMIT, LIMIT)
        tl.store(codes_ptr + at, encode(y, INTEGER, NATIVE), mask=at < columns)


def gated(gate_up: Tensor, activation: str, *, out: Tensor | None = None) -> Tensor:
    """`act(gate) * up`: gate_up [rows, 2 * n], the gates first, rows dense -> [rows, n].

    activation: a name of ACTIVATIONS. Raises ValueError for arguments that do not fit, as do all
    below.
    """
    return _activated(gate_up, activation, True, out)


def activated(x: Tensor, activation: str, *, out: Tensor | None = None) -> Tensor:
    """`act(x)`: x [rows, n], rows dense -> [rows, n]; `out` may be x."""
    return _activated(x, activation, False, out)


def quantized_gated(
    gate_up: Tensor,
    activation: str,
    codes_dtype: torch.dtype,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`gated` as codes (int8 or float8_e4m3fn) [rows, n] and scales [rows] float32, as
    `quantize_rows` makes them. A row with a NaN has the scale NaN."""
    rows, columns = _shape(gate_up, activation, True)
    if codes_dtype not in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(
            f"codes_dtype is {codes_dtype}, expected torch.int8 or torch.float8_e4m3fn"
        )
    codes, scales = out or (
        torch.empty(rows, columns, dtype=codes_dtype, device=gate_up.device),
        torch.empty(rows, dtype=torch.float32, device=gate_up.device),
    )
    expect("codes", codes, (rows, columns), codes_dtype)
    expect("scales", scales, (rows,), torch.float32)
    expect_together(gate_up=gate_up, codes=codes, scales=scales)
    if rows:
        native = native_fp8(gate_up.device)
        integer = codes_dtype == torch.int8
        block = min(_CODED_BLOCK, triton.next_power_of_2(columns))
        _coded_activation_kernel[(rows,)](
            gate_up,
            addressed(codes, native),
            scales,
            columns,
            gate_up.stride(0),
            codes.stride(0),
            NAME=activation,
            GATED=True,
            LIMIT=INT8_LIMIT if integer else FP8_LIMIT,
            SMALLEST=SMALLEST,
            INTEGER=integer,
            NATIVE=native,
            BLOCK=block,
            num_warps=max(1, min(8, block // 512)),
        )
    return codes, scales


def _activated(x: Tensor, activation: str, two: bool, out: Tensor | None) -> Tensor:
    rows, columns = _shape(x, activation, two)
    if out is None:
        out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    expect("out", out, (rows, columns), FLOATS)
    expect_together(x=x, out=out)
    if rows and columns:
        block = min(_BLOCK, triton.next_power_of_2(columns))
        _activation_kernel[(rows, triton.cdiv(columns, block))](
            x,
            out,
            columns,
            x.stride(0),
            out.stride(0),
            NAME=activation,
            GATED=two,
            BLOCK=block,
            num_warps=max(1, min(4, block // 256)),
        )
    return out


def _shape(x: Tensor, activation: str, two: bool) -> tuple[int, int]:
    """Rows and columns of the result."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation is {activation!r}, expected one of {', '.join(sorted(ACTIVATIONS))}"
        )
    expect("gate_up" if two else "x", x, (None, None), FLOATS)
    rows, width = x.shape
    if two and width % 2:
        raise ValueError(f"gate_up has {width} columns, expected as many gates as other inputs")
    return rows, width // 2 if two else width


def variants() -> tuple[Variant, ...]:
    def plain(name: str) -> Variant:
        return Variant(
            name=f"gated {name} bf16",
            kernel=_activation_kernel,
            signature={
                "x_ptr": "*bf16",
                "out_ptr": "*bf16",
                **dict.fromkeys(("columns", "x_stride", "out_stride"), "i32"),
            },
            constants={"NAME": name, "GATED": True, "BLOCK": _BLOCK},
            aligned=("x_ptr", "out_ptr", "columns", "x_stride", "out_stride"),
        )

    def coded(codes: str) -> Variant:
        return Variant(
            name=f"gated silu bf16 to {'int8' if codes == '*i8' else 'fp8'}",
            kernel=_coded_activation_kernel,
            signature={
                "x_ptr": "*bf16",
                "codes_ptr": codes,
                "scales_ptr": "*fp32",
                **dict.fromkeys(("columns", "x_stride", "codes_stride"), "i32"),
            },
            constants={
                "NAME": "silu",
                "GATED": True,
                "LIMIT": INT8_LIMIT if codes == "*i8" else FP8_LIMIT,
                "SMALLEST": SMALLEST,
                "INTEGER": codes == "*i8",
                "NATIVE": False,
                "BLOCK": _CODED_BLOCK,
            },
            num_warps=8,
            aligned=("x_ptr", "codes_ptr", "columns", "x_stride", "codes_stride"),
        )

    return (*map(plain, ("silu", "gelu", "gelu_tanh", "relu_squared")), coded("*i8"), coded("*u8"))
