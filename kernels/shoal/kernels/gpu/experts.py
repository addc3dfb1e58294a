"""Mixtures of experts on a device: sort, two grouped products, and the weighted sum.

The oracle is `shoal.kernels.experts.mix_experts`. Nothing here waits for the host, and the sums
of a token are taken in the order of its choices, never by atomic additions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.gpu.activation import gated
from shoal.kernels.gpu.checks import expect, expect_together
from shoal.kernels.gpu.experts_coded import multiply4, multiply8
from shoal.kernels.gpu.experts_sort import Placement, place_tokens
from shoal.kernels.gpu.linear8 import tile_of
from shoal.kernels.gpu.pack4 import Weight4
from shoal.kernels.gpu.pack8 import Weight8
from shoal.kernels.gpu.quantize import FLOATS
from shoal.kernels.gpu.variant import Variant

_BLOCK = 1024

Matrices = Tensor | Weight8 | Weight4


@triton.jit(do_not_specialize=["tiles"])
def _experts_kernel(
    x_ptr,  # [rows, inputs]
    w_ptr,  # [experts, outputs, inputs]
    pairs_ptr,  # [tiles * TILE_M]
    experts_ptr,  # [tiles]
    out_ptr,  # [pairs, outputs]
    tiles,
    outputs,
    inputs,
    SHARE: tl.constexpr,  # pairs that share a row of x
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    EVEN: tl.constexpr,  # inputs is a multiple of TILE_K
):
    row_tile, output_tile = tile_of(tl.program_id(0), tiles * TILE_M, outputs, TILE_M, TILE_N)
    expert = tl.load(experts_ptr + row_tile).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(pairs_ptr + row_tile * TILE_M + tl.arange(0, TILE_M)).to(tl.int64)
    inside = pair >= 0
    output = output_tile * TILE_N + tl.arange(0, TILE_N)
    w_rows = w_ptr + (expert * outputs + output % outputs) * inputs
    x_rows = x_ptr + pair // SHARE * inputs
    at = tl.arange(0, TILE_K)
    total = tl.zeros([TILE_N, TILE_M], tl.float32)
    for start in range(0, inputs, TILE_K):
        here = start + at
        w_at = w_rows[:, None] + here[None, :]
        x_at = x_rows[None, :] + here[:, None]
        if EVEN:
            w = tl.load(w_at)
            x = tl.load(x_at, mask=inside[None, :], other=0.0)
        else:
            w = tl.load(w_at, mask=(here < inputs)[None, :], other=0.0)
            x = tl.load(x_at, mask=inside[None, :] & (here < inputs)[:, None], other=0.0)
        total = tl.dot(w, x, total, input_precision="ieee")
    to = out_ptr + pair[None, :] * outputs + output[:, None]
    stored = inside[None, :] & (output < outputs)[:, None]
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _combine_kernel(
    y_ptr,  # [tokens * CHOICES, columns]
    ids_ptr,  # [tokens, CHOICES]
    weights_ptr,  # [tokens, CHOICES] float32
    out_ptr,  # [tokens, columns]
    columns,
    experts,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(CHOICES):
        pair = token * CHOICES + choice
        expert = tl.load(ids_ptr + pair)
        if (expert >= 0) & (expert < experts):
            y = tl.load(y_ptr + pair * columns + at, mask=inside, other=0.0).to(tl.float32)
            total += y * tl.load(weights_ptr + pair)
    tl.store(out_ptr + token * columns + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def mix_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Matrices,
    down: Matrices,
    activation: str,
    out_dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """The weighted sum of each token's experts, `down(act(gate(x)) * up(x))`.

    x [tokens, hidden] of a float dtype, dense; ids [tokens, choices] int32 or int64, where one
    outside [0, experts) adds nothing; weights [tokens, choices] float32; gate_up
    [experts, 2 * inner, hidden], the gate's rows first, and down [experts, hidden, inner], each of
    x's dtype or coded; activation: of `shoal.kernels.activation`. Returns, or writes to `out`,
    [tokens, hidden] of out_dtype. Raises ValueError for tensors that do not fit.
    """
    experts, doubled, hidden = _shape(gate_up)
    inner = doubled // 2
    if _shape(down) != (experts, hidden, inner) or doubled % 2:
        raise ValueError(
            f"gate_up has shape {list(_shape(gate_up))} and down {list(_shape(down))}, expected "
            "[experts, 2 * inner, hidden] and [experts, hidden, inner]"
        )
    expect("x", x, (None, hidden), FLOATS, dense=2)
    tokens = x.shape[0]
    expect("ids", ids, (tokens, None), (torch.int32, torch.int64), dense=2)
    choices = ids.shape[1]
    expect("weights", weights, (tokens, choices), torch.float32, dense=2)
    if out is None:
        out = torch.empty(tokens, hidden, dtype=out_dtype, device=x.device)
    expect("out", out, (tokens, hidden), out_dtype, dense=2)
    expect_together(x=x, ids=ids, weights=weights, out=out)
    if tokens == 0:
        return out
    placement = place_tokens(ids, experts, _rows_of_tile(tokens * choices, experts))
    between = gated(multiply_experts(x, gate_up, placement, choices), activation)
    y = multiply_experts(between, down, placement, 1)
    _combine_kernel[(tokens, triton.cdiv(hidden, _BLOCK))](
        y, ids, weights, out, hidden, experts, CHOICES=choices, BLOCK=_BLOCK, num_warps=4
    )
    return out


def multiply_experts(x: Tensor, weight: Matrices, placement: Placement, share: int) -> Tensor:
    """Each pair's row times its expert's matrix.

    x [rows, inputs], where `share` pairs in a row go through the same row; weight [experts,
    outputs, inputs] of x's dtype or coded. Returns [rows * share, outputs] of x's dtype; rows of
    pairs that were left out are not written.
    """
    if isinstance(weight, Weight8):
        return multiply8(x, weight, placement, share)
    if isinstance(weight, Weight4):
        return multiply4(x, weight, placement, share)
    _, outputs, inputs = weight.shape
    expect("x", x, (None, inputs), FLOATS, dense=2)
    expect("weight", weight, (None, None, None), x.dtype, dense=3)
    expect_together(x=x, weight=weight, pairs=placement.pairs)
    out = torch.empty(x.shape[0] * share, outputs, dtype=x.dtype, device=x.device)
    config = _config(placement.tile, outputs)
    _experts_kernel[(placement.tiles * triton.cdiv(outputs, config["TILE_N"]),)](
        x,
        weight,
        placement.pairs,
        placement.experts,
        out,
        placement.tiles,
        outputs,
        inputs,
        SHARE=share,
        TILE_M=placement.tile,
        EVEN=inputs % config["TILE_K"] == 0,
        **config,
    )
    return out


def _rows_of_tile(pairs: int, experts: int) -> int:
    """The rows that an expert has if tokens spread evenly, to the next size of a tile."""
    rows: int = triton.next_power_of_2(triton.cdiv(pairs, experts))
    return min(128, max(16, rows))


def _config(rows: int, outputs: int) -> dict[str, int]:
    """Few rows: as many programs as there are, each with many bytes in flight."""
    if rows >= 128 and outputs >= 128:
        return {"TILE_N": 128, "TILE_K": 64, "num_warps": 8, "num_stages": 4}
    return {"TILE_N": 64, "TILE_K": 64 if rows >= 64 else 128, "num_warps": 4, "num_stages": 4}


def _shape(weight: Matrices) -> tuple[int, ...]:
    return tuple(weight.shape)


def variants() -> tuple[Variant, ...]:
    def grouped(rows: int) -> Variant:
        config = _config(rows, 4096)
        return Variant(
            name=f"experts bf16, {rows} rows",
            kernel=_experts_kernel,
            signature={
                "x_ptr": "*bf16",
                "w_ptr": "*bf16",
                "pairs_ptr": "*i32",
                "experts_ptr": "*i32",
                "out_ptr": "*bf16",
                "tiles": "i32",
                "outputs": "i32",
                "inputs": "i32",
            },
            constants={
                "SHARE": 8,
                "TILE_M": rows,
                "TILE_N": config["TILE_N"],
                "TILE_K": config["TILE_K"],
                "EVEN": True,
            },
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
            aligned=("x_ptr", "w_ptr", "out_ptr", "outputs", "inputs"),
            tensor_cores=True,
            wgmma=rows >= 64,
        )

    combine = Variant(
        name="combine 8 experts",
        kernel=_combine_kernel,
        signature={
            "y_ptr": "*bf16",
            "ids_ptr": "*i64",
            "weights_ptr": "*fp32",
            "out_ptr": "*fp32",
            "columns": "i32",
            "experts": "i32",
        },
        constants={"CHOICES": 8, "BLOCK": _BLOCK},
        aligned=("y_ptr", "out_ptr", "columns"),
    )
    return (grouped(16), grouped(64), grouped(128), combine)
