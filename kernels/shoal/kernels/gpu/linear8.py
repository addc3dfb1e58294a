"""Linear layers whose weights and activations are int8 or float8_e4m3fn codes with scales.

`y = x W^T + b`, and products run on codes: int8 into int32, float8 into float32. Scales are

- one for each row of x and one for each output (LLM.int8(), Dettmers et al., 2022), applied to
  the sums, or
- one for each 128 columns of a row of x and one for each 128 x 128 block of W (DeepSeek-V3, 2024,
  section 3.3.2), applied every 128 columns, which also bounds the error of Hopper's narrow
  float8 sums.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.gpu import configs
from shoal.kernels.gpu.checks import expect, expect_together
from shoal.kernels.gpu.configs import Config, Shape, Tunable
from shoal.kernels.gpu.pack8 import Weight8, quantize8
from shoal.kernels.gpu.quantize import (
    FLOATS,
    GROUP,
    addressed,
    decode_e4m3,
    native_fp8,
    quantize_groups,
    quantize_rows,
)
from shoal.kernels.gpu.split import COLD_BYTES, add_parts, part_steps, parts_for, room_for
from shoal.kernels.gpu.variant import Variant


@triton.jit
def multiply8(w, x, total, INTEGER: tl.constexpr, NATIVE: tl.constexpr):
    """total + w x, of tiles of codes; a float8 that is not native is seen as bytes."""
    if INTEGER:
        total = tl.dot(w, x, total, out_dtype=tl.int32)
    elif NATIVE:
        total = tl.dot(w, x, total, max_num_imprecise_acc=128)
    else:
        total = tl.dot(decode_e4m3(w), decode_e4m3(x), total)
    return total


@triton.jit
def products8(
    x_rows,  # pointers [TILE_M] to codes of rows
    x_inside,  # [TILE_M] whether a row exists
    x_scales,  # pointers [TILE_M] to scales of rows, each for one or all groups of columns
    w_rows,  # pointers [TILE_N] to codes of outputs
    w_scales,  # pointers [TILE_N] to scales of outputs, or one to those of the outputs' block
    first,  # columns to multiply: from `first`, a multiple of TILE_K, to `last`
    last,
    inputs,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    BLOCKED: tl.constexpr,
    INTEGER: tl.constexpr,
    NATIVE: tl.constexpr,
    EVEN: tl.constexpr,  # inputs is a multiple of TILE_K
):
    """Scaled sums [TILE_N, TILE_M] float32: outputs in the first dimension, so that Hopper's
    matrix instruction, of 64 by 8 at least, fits a few rows. With BLOCKED, TILE_K is 128 and
    TILE_N divides it."""
    ZERO: tl.constexpr = 0.0 if x_rows.dtype.element_ty.is_fp8() else 0
    at = tl.arange(0, TILE_K)
    sums = tl.zeros([TILE_N, TILE_M], tl.int32 if INTEGER else tl.float32)
    total = tl.zeros([TILE_N, TILE_M], tl.float32)
    for start in range(first, last, TILE_K):
        here = start + at
        w_at = w_rows[:, None] + here[None, :]
        x_at = x_rows[None, :] + here[:, None]
        if EVEN:
            w = tl.load(w_at)
            x = tl.load(x_at, mask=x_inside[None, :], other=ZERO)
        else:
            w = tl.load(w_at, mask=(here < inputs)[None, :], other=ZERO)
            x = tl.load(x_at, mask=x_inside[None, :] & (here < inputs)[:, None], other=ZERO)
        if BLOCKED:
            scale = tl.load(x_scales + start // TILE_K, mask=x_inside, other=0.0)
            scale *= tl.load(w_scales + start // TILE_K)
            total += multiply8(w, x, sums, INTEGER, NATIVE).to(tl.float32) * scale[None, :]
        else:
            sums = multiply8(w, x, sums, INTEGER, NATIVE)
    if not BLOCKED:
        x_scale = tl.load(x_scales, mask=x_inside, other=0.0)
        total = sums.to(tl.float32) * tl.load(w_scales)[:, None] * x_scale[None, :]
    return total


@triton.jit
def tile_of(tile, rows, outputs, TILE_M: tl.constexpr, TILE_N: tl.constexpr):
    """(row tile, output tile) of a program: eight row tiles share the weights that L2 holds."""
    across = tl.cdiv(outputs, TILE_N)
    band = tile // (8 * across)
    height = tl.minimum(tl.cdiv(rows, TILE_M) - band * 8, 8)
    inner = tile % (8 * across)
    return band * 8 + inner % height, inner // height


@triton.jit(do_not_specialize=["rows"])
def _linear8_kernel(
    x_ptr,  # [rows, inputs] codes
    x_scales_ptr,  # [rows] or [rows, groups]
    w_ptr,  # [outputs, inputs] codes
    w_scales_ptr,  # [outputs] or [blocks, groups]
    bias_ptr,  # [outputs] or None
    out_ptr,  # [parts, rows, outputs]
    rows,
    outputs,
    inputs,
    groups,
    span,  # columns of one part
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    BLOCKED: tl.constexpr,
    INTEGER: tl.constexpr,
    NATIVE: tl.constexpr,
    EVEN: tl.constexpr,
):
    row_tile, output_tile = tile_of(tl.program_id(0), rows, outputs, TILE_M, TILE_N)
    part = tl.program_id(1)
    row = row_tile.to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    output = output_tile.to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    here = output % outputs  # outputs beyond the last read others' weights and are not stored
    total = products8(
        x_ptr + row * inputs,
        row < rows,
        x_scales_ptr + row * groups,
        w_ptr + here * inputs,
        w_scales_ptr + (output_tile * TILE_N // 128 * groups if BLOCKED else here),
        part * span,
        tl.minimum(part * span + span, inputs),
        inputs,
        TILE_M,
        TILE_N,
        TILE_K,
        BLOCKED,
        INTEGER,
        NATIVE,
        EVEN,
    )
    if bias_ptr is not None:
        total += tl.load(bias_ptr + here).to(tl.float32)[:, None]
    to = out_ptr + (part.to(tl.int64) * rows + row)[None, :] * outputs + output[:, None]
    stored = (row < rows)[None, :] & (output < outputs)[:, None]
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=stored)


def linear8(
    x: Tensor,
    x_scales: Tensor,
    weight: Weight8,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """`y = x W^T + b` on codes.

    x [rows, inputs] of the weight's dtype; x_scales [rows] float32, or [rows, ceil(inputs / 128)]
    where the weight has blocks (`quantize_rows`, `quantize_groups`); weight: one matrix; bias
    [outputs] of a float dtype. Returns, or writes to `out`, [rows, outputs] of out_dtype.
    workspace: float32 elements, `workspace8` of them at least, else they are allocated where
    inputs are cut into parts. Raises ValueError for tensors that do not fit.
    """
    expect("weight", weight.codes, (None, None), weight.codes.dtype)
    outputs, inputs = weight.shape
    expect("x", x, (None, inputs), weight.codes.dtype, dense=2)
    rows = x.shape[0]
    scales = (rows, triton.cdiv(inputs, GROUP)) if weight.blocked else (rows,)
    expect("x_scales", x_scales, scales, torch.float32, dense=len(scales))
    if out is None:
        out = torch.empty(rows, outputs, dtype=out_dtype, device=x.device)
    expect("out", out, (rows, outputs), out_dtype, dense=2)
    together = {"x": x, "x_scales": x_scales, "weight": weight.codes, "out": out}
    if bias is not None:
        expect("bias", bias, (outputs,), FLOATS)
        together["bias"] = bias
    expect_together(**together)
    if rows:
        _launch(x, x_scales, weight, bias, out, workspace, _config(rows, weight))
    return out


def _launch(
    x: Tensor,
    x_scales: Tensor,
    weight: Weight8,
    bias: Tensor | None,
    out: Tensor,
    workspace: Tensor | None,
    config: Config,
) -> None:
    rows, (outputs, inputs) = x.shape[0], weight.shape
    parts, span = _parts(rows, weight, config)
    cut = parts > 1
    into = room_for(workspace, parts, rows, outputs, x.device) if cut else out
    native = native_fp8(x.device)
    tiles = triton.cdiv(rows, config["TILE_M"]) * triton.cdiv(outputs, config["TILE_N"])
    _linear8_kernel[(tiles, parts)](
        addressed(x, native),
        x_scales,
        addressed(weight.codes, native),
        weight.scales,
        None if cut else bias,
        into,
        rows,
        outputs,
        inputs,
        x_scales.numel() // rows,
        span,
        BLOCKED=weight.blocked,
        INTEGER=x.dtype == torch.int8,
        NATIVE=native,
        EVEN=inputs % config["TILE_K"] == 0,
        **config,
    )
    if cut:
        add_parts(into, parts, bias, out)


def workspace8(rows: int, weight: Weight8) -> int:
    """float32 elements that `linear8` needs for so many rows; none where it does not cut."""
    parts, _ = _parts(rows, weight, _config(rows, weight))
    return parts * rows * weight.shape[0] if parts > 1 else 0


@dataclass(frozen=True, slots=True)
class Linear8:
    """A layer that codes its activations while it runs: x [rows, inputs] of a float dtype to
    [rows, outputs] of the same."""

    weight: Weight8
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        quantize = quantize_groups if self.weight.blocked else quantize_rows
        codes, scales = quantize(x, self.weight.codes.dtype)
        return linear8(codes, scales, self.weight, self.bias, x.dtype)


def linear8_reference(
    x: Tensor, x_scales: Tensor, weight: Weight8, bias: Tensor | None = None
) -> Tensor:
    """What `linear8` computes: [rows, outputs] float32."""
    if weight.blocked:
        scales = x_scales.repeat_interleave(GROUP, 1)[:, : x.shape[1]]
    else:
        scales = x_scales.unsqueeze(1)
    return torch.nn.functional.linear(
        x.float() * scales, weight.dequantized(), None if bias is None else bias.float()
    )


def default_config(rows: int, outputs: int, blocked: bool, native: bool) -> dict[str, int]:
    """Few rows: as many bytes of weights on their way as hide the memory's delay, and narrow
    tiles where the layer is narrow. `native`: codes are multiplied as they are."""
    if rows > 64:
        if blocked:
            return _tiles(64, 128, GROUP, 8, 3)
        return _tiles(128, 128, 128, 8, 3) if native else _tiles(128, 128, 64, 8, 3)
    tile = max(16, triton.next_power_of_2(rows))
    if tile == 16:
        return _tiles(16, 64 if outputs > 8192 else 32, GROUP if blocked else 256, 4, 4)
    return _tiles(tile, 64, GROUP, 4, 4)


def _tiles(rows: int, outputs: int, inner: int, warps: int, stages: int) -> dict[str, int]:
    return {
        "TILE_M": rows,
        "TILE_N": outputs,
        "TILE_K": inner,
        "num_warps": warps,
        "num_stages": stages,
    }


def _config(rows: int, weight: Weight8) -> dict[str, int]:
    outputs, inputs = weight.shape
    device = weight.codes.device
    native = weight.codes.dtype == torch.int8 or native_fp8(device)
    return configs.choose(
        f"linear8_{weight.kind}",
        default_config(rows, outputs, weight.blocked, native),
        device,
        rows=rows,
        columns=outputs,
        inner=inputs,
    )


def _parts(rows: int, weight: Weight8, config: Config) -> tuple[int, int]:
    """(parts, columns of each)."""
    outputs, inputs = weight.shape
    tiles = triton.cdiv(rows, config["TILE_M"]) * triton.cdiv(outputs, config["TILE_N"])
    steps = triton.cdiv(inputs, config["TILE_K"])
    parts, each = part_steps(steps, parts_for(tiles, steps, weight.codes.device))
    return parts, each * config["TILE_K"]


def _variant(kind: str, config: Config, architectures: tuple[int, ...]) -> Variant:
    codes = {"int8": "*i8", "fp8": "*fp8e4nv", "fp8_blocks": "*fp8e4nv", "bytes": "*u8"}[kind]
    return Variant(
        name=f"linear8 {kind} {config['TILE_M']} rows",
        kernel=_linear8_kernel,
        signature={
            "x_ptr": codes,
            "x_scales_ptr": "*fp32",
            "w_ptr": codes,
            "w_scales_ptr": "*fp32",
            "out_ptr": "*bf16",
            "rows": "i32",
            "outputs": "i32",
            "inputs": "i32",
            "groups": "i32",
            "span": "i32",
        },
        constants={
            "bias_ptr": None,
            "BLOCKED": kind == "fp8_blocks",
            "INTEGER": kind == "int8",
            "NATIVE": kind in ("fp8", "fp8_blocks"),
            "EVEN": True,
            **{name: config[name] for name in ("TILE_M", "TILE_N", "TILE_K")},
        },
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        aligned=("x_ptr", "w_ptr", "out_ptr", "outputs", "inputs", "span"),
        tensor_cores=True,
        wgmma=config["TILE_M"] >= 64 and config["TILE_N"] >= 64,
        architectures=architectures,
    )


def variants() -> tuple[Variant, ...]:
    every, native = (80, 90, 100), (90, 100)
    return (
        _variant("int8", default_config(16, 4096, False, True), every),
        _variant("int8", default_config(1024, 4096, False, True), every),
        _variant("fp8", default_config(16, 28672, False, True), native),
        _variant("fp8", default_config(1024, 4096, False, True), native),
        _variant("fp8_blocks", default_config(16, 4096, True, True), native),
        _variant("fp8_blocks", default_config(1024, 4096, True, True), native),
        _variant("bytes", default_config(16, 4096, False, False), every),
        _variant("bytes", default_config(1024, 4096, False, False), (80,)),
    )


def tunables() -> tuple[Tunable, ...]:
    """Layers of an 8B Llama, at sizes of decode steps and of a prefill."""
    shapes = tuple(
        {"rows": rows, "columns": columns, "inner": inner}
        for columns, inner in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
        for rows in (1, 16, 64, 1024)
    )

    def tunable(kind: str) -> Tunable:
        blocked = kind == "fp8_blocks"
        dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
        sizes = (
            (16, 32, 128, 4, 6),
            (16, 32, 256, 4, 4),
            (16, 64, 128, 4, 6),
            (16, 64, 256, 4, 4),
            (16, 128, 128, 4, 5),
            (64, 64, 128, 4, 4),
            (64, 128, 128, 4, 4),
            (64, 128, 128, 8, 3),
            (128, 128, 128, 8, 3),
            (128, 128, 128, 8, 4),
        )

        def prepare(shape: Shape, device: torch.device) -> Callable[[Config], None]:
            rows, columns, inner = shape["rows"], shape["columns"], shape["inner"]
            weight = quantize8(torch.randn(columns, inner, device=device), dtype, blocked=blocked)
            # Copies enough that none is still in the cache when its turn comes.
            copies = [
                Weight8(weight.codes.clone(), weight.scales)
                for _ in range(max(1, COLD_BYTES // weight.codes.nbytes))
            ]
            turns = cycle(copies)
            quantize = quantize_groups if blocked else quantize_rows
            codes, scales = quantize(torch.randn(rows, inner, device=device), dtype)
            out = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
            return lambda config: _launch(codes, scales, next(turns), None, out, None, config)

        return Tunable(
            kernel=f"linear8_{kind}",
            shapes=shapes,
            configs=tuple(_tiles(*size) for size in sizes if not blocked or size[2] == GROUP),
            prepare=prepare,
            variant=lambda shape, config: _variant(
                kind, config, (80, 90, 100) if kind == "int8" else (90, 100)
            ),
        )

    return tuple(map(tunable, ("int8", "fp8", "fp8_blocks")))
