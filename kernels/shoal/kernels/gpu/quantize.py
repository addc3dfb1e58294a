"""Rows of activations as eight-bit codes and scales, made while a step runs.

`x = codes * scale`, symmetric: an int8 code is in [-127, 127], a float8_e4m3fn code in
[-448, 448], and the largest magnitude that shares a scale gets the largest code. A scale covers a
row (Dettmers et al., "LLM.int8()", 2022, without its outliers) or 128 columns of one
(DeepSeek-V3, 2024, section 3.3.2).

A GPU before compute capability 8.9 has no instruction for float8_e4m3fn and Triton no type for
it there: `encode_e4m3` and `decode_e4m3` do the conversions with integer arithmetic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.gpu.checks import expect, expect_together
from shoal.kernels.gpu.variant import Variant

GROUP = 128  # columns that share a scale of `quantize_groups`
INT8_LIMIT = 127.0
FP8_LIMIT = 448.0
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_NATIVE_FP8 = (8, 9)  # first compute capability that converts and multiplies float8_e4m3fn
SMALLEST = 1e-12  # magnitude below which a scale does not follow, so that none is zero
_WIDEST = 16384  # columns that one program holds in registers


def native_fp8(device: torch.device) -> bool:
    """Whether kernels on this device may name float8_e4m3fn; else they see its bytes."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= _NATIVE_FP8


def addressed(codes: Tensor, native: bool) -> Tensor:
    """The tensor of codes as a kernel takes it: float8_e4m3fn as bytes where it is not native."""
    if codes.dtype == torch.float8_e4m3fn and not native:
        return codes.view(torch.uint8)
    return codes


@triton.jit
def decode_e4m3(codes):
    """uint8 bits of float8_e4m3fn -> the same values in float16, exact. NaN is not decoded.

    The fields land on those of float16, whose exponent is biased by 8 more.
    """
    wide = codes.to(tl.uint16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def encode_e4m3(x):
    """float32 -> uint8 bits of float8_e4m3fn, to nearest even, beyond 448 cut to it."""
    sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(x), 448.0)
    bits = magnitude.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # A float32 near 2^14 counts in steps of 2^-9, those of a subnormal code.
    subnormal = (magnitude + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    return (sign | tl.where(magnitude < 0.015625, subnormal, normal)).to(tl.uint8)


@triton.jit
def round_even(x):
    """float32 of magnitude below 2^22 -> the nearest integer, the even one between two."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def encode(x, INTEGER: tl.constexpr, NATIVE: tl.constexpr):
    """float32 within the codes' range -> codes of the kind that a kernel stores."""
    if INTEGER:
        codes = round_even(x).to(tl.int8)
    elif NATIVE:
        codes = x.to(tl.float8e4nv)
    else:
        codes = encode_e4m3(x)
    return codes


@triton.jit
def magnitude(x):
    """|x|, infinite for NaN, which a maximum on a GPU would pass over: the scale of what is not
    finite is infinite, and so nothing finite comes of its codes."""
    return tl.where(x != x, float("inf"), tl.abs(x))


@triton.jit
def _quantize_rows_kernel(
    x_ptr,  # [rows, columns]
    codes_ptr,  # [rows, columns]
    scales_ptr,  # [rows]
    columns,
    x_stride,
    LIMIT: tl.constexpr,
    SMALLEST: tl.constexpr,
    INTEGER: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # a row fits BLOCK: it is read once
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    codes_ptr += row * columns
    at = tl.arange(0, BLOCK)
    if WHOLE:
        x = tl.load(x_ptr + at, mask=at < columns, other=0.0).to(tl.float32)
        scale = tl.maximum(tl.max(magnitude(x), 0), SMALLEST) / LIMIT
        x = tl.clamp(x / scale, -LIMIT, LIMIT)
        tl.store(codes_ptr + at, encode(x, INTEGER, NATIVE), mask=at < columns)
    else:
        most = tl.zeros([BLOCK], tl.float32)
        for start in range(0, columns, BLOCK):
            here = start + at
            x = tl.load(x_ptr + here, mask=here < columns, other=0.0).to(tl.float32)
            most = tl.maximum(most, magnitude(x))
        scale = tl.maximum(tl.max(most, 0), SMALLEST) / LIMIT
        for start in range(0, columns, BLOCK):
            here = start + at
            x = tl.load(x_ptr + here, mask=here < columns, other=0.0).to(tl.float32)
            x = tl.clamp(x / scale, -LIMIT, LIMIT)
            tl.store(codes_ptr + here, encode(x, INTEGER, NATIVE), mask=here < columns)
    tl.store(scales_ptr + row, scale)


@triton.jit
def _quantize_groups_kernel(
    x_ptr,  # [rows, columns]
    codes_ptr,  # [rows, columns]
    scales_ptr,  # [rows, groups]
    columns,
    groups,
    x_stride,
    LIMIT: tl.constexpr,
    SMALLEST: tl.constexpr,
    INTEGER: tl.constexpr,
    NATIVE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,  # of one program
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + row * x_stride + at, mask=at < columns, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(magnitude(x), 1), SMALLEST) / LIMIT
    x = tl.clamp(x / scale[:, None], -LIMIT, LIMIT)
    tl.store(codes_ptr + row * columns + at, encode(x, INTEGER, NATIVE), mask=at < columns)
    tl.store(scales_ptr + row * groups + group, scale, mask=group < groups)


def quantize_rows(
    x: Tensor, dtype: torch.dtype, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """One scale for each row.

    x [rows, columns] of a float dtype, rows dense; dtype: int8 or float8_e4m3fn. Returns, or
    writes to `out`, codes [rows, columns] and scales [rows] float32. Raises ValueError for
    tensors that do not fit.
    """
    rows, columns = _rows_of(x, dtype)
    codes, scales = out or (
        torch.empty(rows, columns, dtype=dtype, device=x.device),
        torch.empty(rows, dtype=torch.float32, device=x.device),
    )
    expect("codes", codes, (rows, columns), dtype, dense=2)
    expect("scales", scales, (rows,), torch.float32)
    expect_together(x=x, codes=codes, scales=scales)
    if rows:
        native = native_fp8(x.device)
        block = min(triton.next_power_of_2(columns), _WIDEST)
        _quantize_rows_kernel[(rows,)](
            x,
            addressed(codes, native),
            scales,
            columns,
            x.stride(0),
            LIMIT=INT8_LIMIT if dtype == torch.int8 else FP8_LIMIT,
            SMALLEST=SMALLEST,
            INTEGER=dtype == torch.int8,
            NATIVE=native,
            BLOCK=block,
            WHOLE=columns <= block,
            num_warps=max(1, min(16, block // 1024)),
        )
    return codes, scales


def quantize_groups(
    x: Tensor, dtype: torch.dtype, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """One scale for each 128 columns of a row; the last group may be shorter.

    As `quantize_rows`, but scales are [rows, ceil(columns / 128)].
    """
    rows, columns = _rows_of(x, dtype)
    groups = triton.cdiv(columns, GROUP)
    codes, scales = out or (
        torch.empty(rows, columns, dtype=dtype, device=x.device),
        torch.empty(rows, groups, dtype=torch.float32, device=x.device),
    )
    expect("codes", codes, (rows, columns), dtype, dense=2)
    expect("scales", scales, (rows, groups), torch.float32, dense=2)
    expect_together(x=x, codes=codes, scales=scales)
    if rows:
        native = native_fp8(x.device)
        together = min(16, triton.next_power_of_2(groups))
        _quantize_groups_kernel[(rows, triton.cdiv(groups, together))](
            x,
            addressed(codes, native),
            scales,
            columns,
            groups,
            x.stride(0),
            LIMIT=INT8_LIMIT if dtype == torch.int8 else FP8_LIMIT,
            SMALLEST=SMALLEST,
            INTEGER=dtype == torch.int8,
            NATIVE=native,
            GROUP=GROUP,
            GROUPS=together,
            num_warps=4,
        )
    return codes, scales


def quantize_reference(x: Tensor, dtype: torch.dtype, group: int) -> tuple[Tensor, Tensor]:
    """What the kernels compute, for groups of any size: codes as x, scales [rows, groups]."""
    limit = INT8_LIMIT if dtype == torch.int8 else FP8_LIMIT
    columns = x.shape[1]
    groups = -(-columns // group)
    padded = torch.nn.functional.pad(x.float(), (0, groups * group - columns))
    grouped = padded.view(len(x), groups, group)
    scales = grouped.abs().amax(-1).clamp_min(SMALLEST) / limit
    scaled = (grouped / scales.unsqueeze(-1)).clamp(-limit, limit)
    if dtype == torch.int8:
        scaled = scaled.round()
    return scaled.flatten(1)[:, :columns].to(dtype), scales


def _rows_of(x: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    expect("x", x, (None, None), FLOATS)
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"dtype is {dtype}, expected torch.int8 or torch.float8_e4m3fn")
    return x.shape[0], x.shape[1]


def variants() -> tuple[Variant, ...]:
    def rows(codes: str, integer: bool, native: bool) -> Variant:
        return Variant(
            name=f"quantize_rows bf16 to {'int8' if integer else 'fp8'}"
            + ("" if integer or native else " by bits"),
            kernel=_quantize_rows_kernel,
            signature={
                "x_ptr": "*bf16",
                "codes_ptr": codes,
                "scales_ptr": "*fp32",
                "columns": "i32",
                "x_stride": "i32",
            },
            constants={
                "LIMIT": INT8_LIMIT if integer else FP8_LIMIT,
                "SMALLEST": SMALLEST,
                "INTEGER": integer,
                "NATIVE": native,
                "BLOCK": 4096,
                "WHOLE": True,
            },
            aligned=("x_ptr", "codes_ptr", "columns", "x_stride"),
        )

    groups = Variant(
        name="quantize_groups bf16 to fp8 by bits",
        kernel=_quantize_groups_kernel,
        signature={
            "x_ptr": "*bf16",
            "codes_ptr": "*u8",
            "scales_ptr": "*fp32",
            "columns": "i32",
            "groups": "i32",
            "x_stride": "i32",
        },
        constants={
            "LIMIT": FP8_LIMIT,
            "SMALLEST": SMALLEST,
            "INTEGER": False,
            "NATIVE": False,
            "GROUP": GROUP,
            "GROUPS": 16,
        },
        aligned=("x_ptr", "codes_ptr", "columns", "x_stride"),
    )
    return (rows("*i8", True, False), rows("*u8", False, False), groups)
