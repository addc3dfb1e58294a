"""Linear layers whose weights are four-bit codes in groups, times rows of floats.

`y = x W^T + b` with W of `pack4`. Codes become floats in registers by or-ing them into the
mantissa of a power of two (Kim et al., "Who Says Elephants Can't Run", 2022): 0x4300 | code is
128 + code in bfloat16, 0x6400 | code is 1024 + code in float16, and the subtraction of the power
and the zero is exact. Scales multiply the sums of a group, not the weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.gpu import configs
from shoal.kernels.gpu.checks import expect, expect_together
from shoal.kernels.gpu.configs import Config, Shape, Tunable
from shoal.kernels.gpu.linear8 import tile_of
from shoal.kernels.gpu.pack4 import Weight4, quantize4
from shoal.kernels.gpu.quantize import FLOATS
from shoal.kernels.gpu.split import COLD_BYTES, add_parts, part_steps, parts_for, room_for
from shoal.kernels.gpu.variant import Variant

_GATHERED_ROWS = 32  # up to so many the kernel itself reads x by the order of the inputs


@triton.jit
def floats4(codes, zeros, DTYPE: tl.constexpr):
    """codes uint8 from 0 to 15 minus zeros float32, as DTYPE; exact."""
    if DTYPE.is_bf16():
        raised = (codes.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
        values = raised - (zeros + 128.0).to(tl.bfloat16)
    elif DTYPE.is_fp16():
        raised = (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
        values = raised - (zeros + 1024.0).to(tl.float16)
    else:
        values = codes.to(tl.float32) - zeros
    return values


@triton.jit
def products4(
    x_rows,  # pointers [TILE_M] to rows
    x_inside,  # [TILE_M] whether a row exists
    w_rows,  # pointers [TILE_N] to an output's bytes
    scales,  # pointers [TILE_N] to an output's scale in the first group
    zeros,  # pointers like them, or None: 8
    order_ptr,  # [inputs] or None
    first,  # chunks to multiply: from `first` to `last`, a multiple of CHUNKS apart
    last,
    inputs,
    outputs,
    group_chunks,  # chunks of a group, where it has several
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    HALF: tl.constexpr,  # inputs of half a chunk
    CHUNKS: tl.constexpr,  # of one turn of the loop
    HALVED: tl.constexpr,  # a group is half a chunk
    EVEN: tl.constexpr,  # inputs fill the chunks
):
    """Scaled sums [TILE_N, TILE_M] float32: outputs in the first dimension, so that codes turn
    into an operand that tensor cores take from registers."""
    DTYPE: tl.constexpr = x_rows.dtype.element_ty
    at = tl.arange(0, HALF)
    total = tl.zeros([TILE_N, TILE_M], tl.float32)
    for turn in range(first, last, CHUNKS):
        for step in tl.static_range(CHUNKS):
            chunk = turn + step
            packed = tl.load(w_rows[:, None] + (chunk * HALF + at)[None, :])
            sums = tl.zeros([TILE_N, TILE_M], tl.float32)
            for half in tl.static_range(2):
                here = (chunk * 2 + half) * HALF + at
                inside = x_inside[None, :]
                if not EVEN:
                    inside = inside & (here < inputs)[:, None]
                if order_ptr is not None:
                    if EVEN:
                        here = tl.load(order_ptr + here)
                    else:
                        here = tl.load(order_ptr + here, mask=here < inputs, other=0)
                x = tl.load(x_rows[None, :] + here[:, None], mask=inside, other=0.0)
                group = chunk * 2 + half if HALVED else chunk // group_chunks
                if HALVED and not EVEN:  # the last half may lie beyond the last group
                    group = tl.minimum(group, inputs // HALF - 1)
                # Without zeros the middle is a constant that folds into the subtraction.
                if zeros is None:
                    zero = tl.full([TILE_N], 8.0, tl.float32)
                else:
                    zero = tl.load(zeros + group * outputs).to(tl.float32)
                nibble = packed & 15 if half == 0 else packed >> 4
                w = floats4(nibble, zero[:, None], DTYPE)
                sums = tl.dot(w, x, sums, input_precision="ieee")
                if HALVED or half == 1:
                    scale = tl.load(scales + group * outputs).to(tl.float32)
                    total += sums * scale[:, None]
                    sums = tl.zeros([TILE_N, TILE_M], tl.float32)
    return total


@triton.jit(do_not_specialize=["rows"])
def _linear4_kernel(
    x_ptr,  # [rows, inputs]
    w_ptr,  # [outputs, row_bytes]
    scales_ptr,  # [groups, outputs]
    zeros_ptr,  # [groups, outputs] or None
    order_ptr,  # [inputs] or None
    bias_ptr,  # [outputs] or None
    out_ptr,  # [parts, rows, outputs]
    rows,
    outputs,
    inputs,
    chunks,
    span,  # chunks of one part
    group_chunks,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    HALF: tl.constexpr,
    CHUNKS: tl.constexpr,
    HALVED: tl.constexpr,
    EVEN: tl.constexpr,
):
    row_tile, output_tile = tile_of(tl.program_id(0), rows, outputs, TILE_M, TILE_N)
    part = tl.program_id(1)
    row = row_tile.to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    output = output_tile.to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    here = output % outputs  # outputs beyond the last read others' weights and are not stored
    total = products4(
        x_ptr + row * inputs,
        row < rows,
        w_ptr + here * (chunks * HALF),
        scales_ptr + here,
        zeros_ptr + here if zeros_ptr is not None else None,
        order_ptr,
        part * span,
        tl.minimum(part * span + span, chunks),
        inputs,
        outputs,
        group_chunks,
        TILE_M,
        TILE_N,
        HALF,
        CHUNKS,
        HALVED,
        EVEN,
    )
    if bias_ptr is not None:
        total += tl.load(bias_ptr + here).to(tl.float32)[:, None]
    to = out_ptr + (part.to(tl.int64) * rows + row)[None, :] * outputs + output[:, None]
    stored = (row < rows)[None, :] & (output < outputs)[:, None]
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=stored)


def linear4(
    x: Tensor,
    weight: Weight4,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """`y = x W^T + b`.

    x [rows, inputs] of a float dtype, dense; weight: one matrix; bias [outputs] of a float dtype.
    Returns, or writes to `out`, [rows, outputs] of x's dtype. workspace: float32 elements,
    `workspace4` of them at least, else they are allocated where inputs are cut into parts; with
    more than 32 rows an order of the inputs takes a copy of x. Raises ValueError for tensors that
    do not fit.
    """
    if weight.codes.dim() != 2:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected one matrix")
    outputs, inputs = weight.shape
    expect("x", x, (None, inputs), FLOATS, dense=2)
    rows = x.shape[0]
    if out is None:
        out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    expect("out", out, (rows, outputs), x.dtype, dense=2)
    together = {"x": x, "weight": weight.codes, "out": out}
    if bias is not None:
        expect("bias", bias, (outputs,), FLOATS)
        together["bias"] = bias
    expect_together(**together)
    order = weight.order
    if order is not None and rows > _GATHERED_ROWS:
        x, order = x.index_select(1, order), None
    if rows:
        _launch(x, weight, order, bias, out, workspace, _config(rows, weight))
    return out


def _launch(
    x: Tensor,
    weight: Weight4,
    order: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    workspace: Tensor | None,
    config: Config,
) -> None:
    rows, (outputs, inputs) = x.shape[0], weight.shape
    parts, span = _parts(rows, weight, config)
    cut = parts > 1
    into = room_for(workspace, parts, rows, outputs, x.device) if cut else out
    tiles = triton.cdiv(rows, config["TILE_M"]) * triton.cdiv(outputs, config["TILE_N"])
    _linear4_kernel[(tiles, parts)](
        x,
        weight.codes,
        weight.scales,
        weight.zeros,
        order,
        None if cut else bias,
        into,
        rows,
        outputs,
        inputs,
        weight.chunks,
        span,
        weight.group_chunks,
        HALF=weight.half,
        HALVED=weight.halved,
        EVEN=weight.even,
        **config,
    )
    if cut:
        add_parts(into, parts, bias, out)


def workspace4(rows: int, weight: Weight4) -> int:
    """float32 elements that `linear4` needs for so many rows; none where it does not cut."""
    parts, _ = _parts(rows, weight, _config(rows, weight))
    return parts * rows * weight.shape[0] if parts > 1 else 0


@dataclass(frozen=True, slots=True)
class Linear4:
    """A layer: x [rows, inputs] of a float dtype to [rows, outputs] of the same."""

    weight: Weight4
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return linear4(x, self.weight, self.bias)


def linear4_reference(x: Tensor, weight: Weight4, bias: Tensor | None = None) -> Tensor:
    """What `linear4` computes: [rows, outputs] float32."""
    return torch.nn.functional.linear(
        x.float(), weight.dequantized(), None if bias is None else bias.float()
    )


def default_config(rows: int, outputs: int) -> dict[str, int]:
    """Few rows: tiles of 64 outputs, the least that Hopper's matrix instruction takes, each
    program with some 24 KiB of weights on their way."""
    if rows <= 64:
        tile = max(16, triton.next_power_of_2(rows))
        return {"TILE_M": tile, "TILE_N": 64, "CHUNKS": 2, "num_warps": 4, "num_stages": 4}
    return {"TILE_M": 128, "TILE_N": 128, "CHUNKS": 1, "num_warps": 8, "num_stages": 3}


def _config(rows: int, weight: Weight4) -> dict[str, int]:
    outputs, inputs = weight.shape
    config = configs.choose(
        "linear4",
        default_config(rows, outputs),
        weight.codes.device,
        rows=rows,
        columns=outputs,
        inner=inputs,
        group=weight.group,
    )
    return _fitting(config, weight)


def _fitting(config: Config, weight: Weight4) -> dict[str, int]:
    """The configuration with turns of a loop that the weight's chunks fill."""
    return {**config, "CHUNKS": gcd(config["CHUNKS"], weight.chunks)}


def _parts(rows: int, weight: Weight4, config: Config) -> tuple[int, int]:
    """(parts, chunks of each)."""
    tiles = triton.cdiv(rows, config["TILE_M"]) * triton.cdiv(weight.shape[0], config["TILE_N"])
    turns = weight.chunks // config["CHUNKS"]
    parts, each = part_steps(turns, parts_for(tiles, turns, weight.codes.device))
    return parts, each * config["CHUNKS"]


def _variant(shape: Shape, config: Config, dtype: str = "bf16", *, cut: bool = False) -> Variant:
    group = shape["group"]
    half = 32 if group == 32 else 64
    return Variant(
        name=f"linear4 {dtype} groups of {group}, {config['TILE_M']} rows",
        kernel=_linear4_kernel,
        signature={
            "x_ptr": f"*{dtype}",
            "w_ptr": "*u8",
            "scales_ptr": f"*{dtype}",
            "out_ptr": "*fp32" if cut else f"*{dtype}",
            "rows": "i32",
            "outputs": "i32",
            "inputs": "i32",
            "chunks": "i32",
            "span": "i32",
            "group_chunks": "i32",
        },
        constants={
            "zeros_ptr": None,
            "order_ptr": None,
            "bias_ptr": None,
            "HALF": half,
            "HALVED": group == half,
            "EVEN": True,
            **{name: config[name] for name in ("TILE_M", "TILE_N", "CHUNKS")},
        },
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        aligned=("x_ptr", "w_ptr", "scales_ptr", "out_ptr", "outputs", "inputs"),
        tensor_cores=True,
        wgmma=config["TILE_N"] >= 64,
    )


def variants() -> tuple[Variant, ...]:
    shape = {"columns": 4096, "inner": 4096}
    few, many = default_config(16, 4096), default_config(1024, 4096)
    with_zeros = _variant({**shape, "group": 128}, few)
    return (
        _variant({**shape, "group": 128}, few, cut=True),
        _variant({**shape, "group": 128}, few, "fp16"),
        _variant({**shape, "group": 32}, few),
        _variant({**shape, "group": 128}, many),
        Variant(
            name="linear4 bf16 zeros and order, 16 rows",
            kernel=_linear4_kernel,
            signature={**with_zeros.signature, "zeros_ptr": "*u8", "order_ptr": "*i32"},
            constants={
                name: value
                for name, value in with_zeros.constants.items()
                if name not in ("zeros_ptr", "order_ptr")
            },
            num_warps=with_zeros.num_warps,
            num_stages=with_zeros.num_stages,
            aligned=with_zeros.aligned,
            tensor_cores=True,
        ),
    )


def tunables() -> tuple[Tunable, ...]:
    """Layers of an 8B Llama at decode sizes and a prefill's."""
    shapes = tuple(
        {"rows": rows, "columns": columns, "inner": inner, "group": 128}
        for columns, inner in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
        for rows in (1, 16, 64, 1024)
    )
    candidates = tuple(
        {"TILE_M": m, "TILE_N": n, "CHUNKS": chunks, "num_warps": warps, "num_stages": stages}
        for m, n, chunks, warps, stages in (
            (16, 32, 2, 4, 4),
            (16, 64, 1, 4, 6),
            (16, 64, 2, 4, 4),
            (16, 64, 4, 4, 3),
            (16, 128, 1, 4, 5),
            (64, 64, 1, 4, 4),
            (64, 128, 1, 4, 4),
            (128, 128, 1, 8, 3),
            (128, 128, 1, 8, 4),
        )
    )

    def prepare(shape: Shape, device: torch.device) -> Callable[[Config], None]:
        rows, columns, inner = shape["rows"], shape["columns"], shape["inner"]
        dense = torch.randn(columns, inner, dtype=torch.bfloat16, device=device)
        weight = quantize4(dense, shape["group"])
        # Copies enough that none is still in the cache when its turn comes.
        turns = cycle(
            replace(weight, codes=weight.codes.clone())
            for _ in range(max(1, COLD_BYTES // weight.codes.nbytes))
        )
        x = torch.randn(rows, inner, dtype=torch.bfloat16, device=device)
        out = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)

        def launch(config: Config) -> None:
            turn = next(turns)
            _launch(x, turn, None, None, out, None, _fitting(config, turn))

        return launch

    return (Tunable("linear4", shapes, candidates, prepare, _variant),)
