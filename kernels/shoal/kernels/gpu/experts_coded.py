"""Grouped products with experts of eight-bit or four-bit codes: the tiles of `linear8` and
`linear4`, each with the matrix of its own expert."""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.gpu.checks import expect, expect_together
from shoal.kernels.gpu.experts_sort import Placement
from shoal.kernels.gpu.linear4 import products4
from shoal.kernels.gpu.linear8 import products8, tile_of
from shoal.kernels.gpu.pack4 import Weight4
from shoal.kernels.gpu.pack8 import Weight8
from shoal.kernels.gpu.quantize import (
    FLOATS,
    GROUP,
    addressed,
    native_fp8,
    quantize_groups,
    quantize_rows,
)
from shoal.kernels.gpu.variant import Variant


@triton.jit(do_not_specialize=["tiles"])
def _experts8_kernel(
    x_ptr,  # [rows, inputs] codes
    x_scales_ptr,  # [rows] or [rows, groups]
    w_ptr,  # [experts, outputs, inputs] codes
    w_scales_ptr,  # [experts, outputs] or [experts, blocks, groups]
    pairs_ptr,  # [tiles * TILE_M]
    experts_ptr,  # [tiles]
    out_ptr,  # [pairs, outputs]
    tiles,
    outputs,
    inputs,
    groups,
    SHARE: tl.constexpr,  # pairs that share a row of x
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    BLOCKED: tl.constexpr,
    INTEGER: tl.constexpr,
    NATIVE: tl.constexpr,
    EVEN: tl.constexpr,
):
    row_tile, output_tile = tile_of(tl.program_id(0), tiles * TILE_M, outputs, TILE_M, TILE_N)
    expert = tl.load(experts_ptr + row_tile).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(pairs_ptr + row_tile * TILE_M + tl.arange(0, TILE_M)).to(tl.int64)
    inside = pair >= 0
    output = output_tile * TILE_N + tl.arange(0, TILE_N)
    channel = expert * outputs + output % outputs
    block = expert * tl.cdiv(outputs, 128) + output_tile * TILE_N // 128
    total = products8(
        x_ptr + pair // SHARE * inputs,
        inside,
        x_scales_ptr + pair // SHARE * groups,
        w_ptr + channel * inputs,
        w_scales_ptr + (block * groups if BLOCKED else channel),
        0,
        inputs,
        inputs,
        TILE_M,
        TILE_N,
        TILE_K,
        BLOCKED,
        INTEGER,
        NATIVE,
        EVEN,
    )
    to = out_ptr + pair[None, :] * outputs + output[:, None]
    stored = inside[None, :] & (output < outputs)[:, None]
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["tiles"])
def _experts4_kernel(
    x_ptr,  # [rows, inputs]
    w_ptr,  # [experts, outputs, row_bytes]
    scales_ptr,  # [experts, groups, outputs]
    zeros_ptr,  # [experts, groups, outputs] or None
    pairs_ptr,  # [tiles * TILE_M]
    experts_ptr,  # [tiles]
    out_ptr,  # [pairs, outputs]
    tiles,
    outputs,
    inputs,
    chunks,
    groups,
    group_chunks,
    SHARE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    HALF: tl.constexpr,
    CHUNKS: tl.constexpr,
    HALVED: tl.constexpr,
    EVEN: tl.constexpr,
):
    row_tile, output_tile = tile_of(tl.program_id(0), tiles * TILE_M, outputs, TILE_M, TILE_N)
    expert = tl.load(experts_ptr + row_tile).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(pairs_ptr + row_tile * TILE_M + tl.arange(0, TILE_M)).to(tl.int64)
    inside = pair >= 0
    output = output_tile * TILE_N + tl.arange(0, TILE_N)
    here = output % outputs
    first_scale = expert * groups * outputs + here
    total = products4(
        x_ptr + pair // SHARE * inputs,
        inside,
        w_ptr + (expert * outputs + here) * (chunks * HALF),
        scales_ptr + first_scale,
        zeros_ptr + first_scale if zeros_ptr is not None else None,
        None,
        0,
        chunks,
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
    to = out_ptr + pair[None, :] * outputs + output[:, None]
    stored = inside[None, :] & (output < outputs)[:, None]
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=stored)


def multiply8(x: Tensor, weight: Weight8, placement: Placement, share: int) -> Tensor:
    """Each pair's row, coded, times its expert's matrix.

    x [rows, inputs] of a float dtype, where `share` pairs in a row go through the same row;
    weight: [experts, outputs, inputs]. Returns [rows * share, outputs] of x's dtype; rows of
    pairs that were left out are not written.
    """
    _, outputs, inputs = weight.shape
    expect("x", x, (None, inputs), FLOATS, dense=2)
    expect_together(x=x, weight=weight.codes, pairs=placement.pairs)
    quantize = quantize_groups if weight.blocked else quantize_rows
    codes, scales = quantize(x, weight.codes.dtype)
    out = torch.empty(x.shape[0] * share, outputs, dtype=x.dtype, device=x.device)
    native = native_fp8(x.device)
    config = _config8(placement.tile, weight.blocked)
    _experts8_kernel[(placement.tiles * triton.cdiv(outputs, config["TILE_N"]),)](
        addressed(codes, native),
        scales,
        addressed(weight.codes, native),
        weight.scales,
        placement.pairs,
        placement.experts,
        out,
        placement.tiles,
        outputs,
        inputs,
        scales.numel() // len(codes),
        SHARE=share,
        TILE_M=placement.tile,
        BLOCKED=weight.blocked,
        INTEGER=codes.dtype == torch.int8,
        NATIVE=native,
        EVEN=inputs % config["TILE_K"] == 0,
        **config,
    )
    return out


def multiply4(x: Tensor, weight: Weight4, placement: Placement, share: int) -> Tensor:
    """As `multiply8`, x as it is; experts' inputs must be in order."""
    if weight.order is not None:
        raise ValueError("weight has an order of its inputs (act-order), experts have none")
    _, outputs, inputs = weight.shape
    expect("x", x, (None, inputs), FLOATS, dense=2)
    expect_together(x=x, weight=weight.codes, pairs=placement.pairs)
    out = torch.empty(x.shape[0] * share, outputs, dtype=x.dtype, device=x.device)
    config = _config4(placement.tile)
    config["CHUNKS"] = gcd(config["CHUNKS"], weight.chunks)
    _experts4_kernel[(placement.tiles * triton.cdiv(outputs, config["TILE_N"]),)](
        x,
        weight.codes,
        weight.scales,
        weight.zeros,
        placement.pairs,
        placement.experts,
        out,
        placement.tiles,
        outputs,
        inputs,
        weight.chunks,
        weight.scales.shape[1],
        weight.group_chunks,
        SHARE=share,
        TILE_M=placement.tile,
        HALF=weight.half,
        HALVED=weight.halved,
        EVEN=weight.even,
        **config,
    )
    return out


def _config8(rows: int, blocked: bool) -> dict[str, int]:
    wide = rows >= 128 and not blocked
    return {
        "TILE_N": 128 if wide else 64,
        "TILE_K": GROUP,
        "num_warps": 8 if wide else 4,
        "num_stages": 3 if rows >= 64 else 4,
    }


def _config4(rows: int) -> dict[str, int]:
    return {"TILE_N": 64, "CHUNKS": 1 if rows >= 64 else 2, "num_warps": 4, "num_stages": 3}


def variants() -> tuple[Variant, ...]:
    routed = {
        "pairs_ptr": "*i32",
        "experts_ptr": "*i32",
        "out_ptr": "*bf16",
        "tiles": "i32",
        "outputs": "i32",
        "inputs": "i32",
        "groups": "i32",
    }

    def eight(rows: int, codes: str, blocked: bool) -> Variant:
        config = _config8(rows, blocked)
        return Variant(
            name=f"experts8 {codes[1:]}{' blocks' if blocked else ''}, {rows} rows",
            kernel=_experts8_kernel,
            signature={
                "x_ptr": codes,
                "x_scales_ptr": "*fp32",
                "w_ptr": codes,
                "w_scales_ptr": "*fp32",
                **routed,
            },
            constants={
                "SHARE": 8,
                "TILE_M": rows,
                "TILE_N": config["TILE_N"],
                "TILE_K": config["TILE_K"],
                "BLOCKED": blocked,
                "INTEGER": codes == "*i8",
                "NATIVE": codes == "*fp8e4nv",
                "EVEN": True,
            },
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
            aligned=("x_ptr", "w_ptr", "out_ptr", "outputs", "inputs"),
            tensor_cores=True,
            wgmma=rows >= 64,
            architectures=(90, 100) if codes == "*fp8e4nv" else (80, 90, 100),
        )

    def four(rows: int) -> Variant:
        config = _config4(rows)
        return Variant(
            name=f"experts4 bf16, {rows} rows",
            kernel=_experts4_kernel,
            signature={
                "x_ptr": "*bf16",
                "w_ptr": "*u8",
                "scales_ptr": "*bf16",
                **routed,
                "chunks": "i32",
                "group_chunks": "i32",
            },
            constants={
                "zeros_ptr": None,
                "SHARE": 8,
                "TILE_M": rows,
                "TILE_N": config["TILE_N"],
                "HALF": 64,
                "CHUNKS": config["CHUNKS"],
                "HALVED": False,
                "EVEN": True,
            },
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
            aligned=("x_ptr", "w_ptr", "scales_ptr", "out_ptr", "outputs", "inputs"),
            tensor_cores=True,
        )

    return (
        eight(16, "*fp8e4nv", False),
        eight(128, "*fp8e4nv", False),
        eight(64, "*fp8e4nv", True),
        eight(16, "*u8", False),
        four(16),
        four(64),
    )
