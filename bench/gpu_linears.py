"""Cases of matrix products: eight and four bits beside cuBLAS in sixteen, and experts."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench import roofline
from bench.gpu_cases import OURS, Case, Sizes, half, randn
from shoal.kernels.gpu.experts import mix_experts
from shoal.kernels.gpu.linear4 import linear4, workspace4
from shoal.kernels.gpu.linear8 import Linear8
from shoal.kernels.gpu.pack4 import quantize4
from shoal.kernels.gpu.pack8 import Weight8, quantize8
from shoal.kernels.gpu.quantize import quantize_rows
from shoal.kernels.measure import Launch

PLAIN = "torch linear, 16 bits"
_GROUP = 128  # weights of four bits that share a scale


def cases(sizes: Sizes) -> Iterator[Case]:
    for outputs, inputs in sizes.linears:
        for rows in sizes.rows:
            shape = f"{rows} rows x {outputs} x {inputs}"
            for kind, dtype in (("fp8", torch.float8_e4m3fn), ("int8", torch.int8)):
                yield Case(
                    f"linear {kind}",
                    shape,
                    roofline.linear(rows, outputs, inputs, bits=8, kind=kind),
                    _eight(rows, outputs, inputs, dtype, blocked=False),
                )
            yield Case(
                "linear fp8 blocks",
                shape,
                roofline.linear(rows, outputs, inputs, bits=8, kind="fp8"),
                _eight(rows, outputs, inputs, torch.float8_e4m3fn, blocked=True),
            )
            yield Case(
                "linear int4",
                shape,
                roofline.linear(rows, outputs, inputs, bits=4 + 16 / _GROUP),
                _four(rows, outputs, inputs),
            )
    for rows in sizes.rows:
        yield Case(
            "experts",
            f"{rows} rows, {sizes.per_token} of {sizes.experts}",
            roofline.experts(
                rows, sizes.hidden, sizes.expert_inner, sizes.experts, sizes.per_token
            ),
            _experts(rows, sizes),
        )


Prepare = Callable[[torch.device], Mapping[str, Launch]]


def _eight(rows: int, outputs: int, inputs: int, dtype: torch.dtype, *, blocked: bool) -> Prepare:
    """Ours quantizes its input within the time, as a layer does; torch's takes codes."""

    def prepare(device: torch.device) -> dict[str, Launch]:
        weight, x = randn(device, outputs, inputs), randn(device, rows, inputs)
        coded = quantize8(weight, dtype, blocked=blocked)
        layer = Linear8(coded)
        launches: dict[str, Launch] = {
            OURS: lambda: layer(x),
            PLAIN: lambda: linear(x, weight),
        }
        if not blocked:
            codes, scales = quantize_rows(x, dtype)
            name, launch = _torch_eight(codes, scales, coded, half(device))
            launches[f"{name}, input coded before"] = launch
        return launches

    return prepare


def _torch_eight(
    codes: Tensor, scales: Tensor, weight: Weight8, dtype: torch.dtype
) -> tuple[str, Launch]:
    across, down = scales.unsqueeze(1), weight.scales.unsqueeze(0)
    if codes.dtype == torch.int8:
        return "torch._int_mm", lambda: (torch._int_mm(codes, weight.codes.t()) * across * down).to(
            dtype
        )
    return "torch._scaled_mm", lambda: torch._scaled_mm(
        codes, weight.codes.t(), scale_a=across, scale_b=down, out_dtype=dtype
    )


def _four(rows: int, outputs: int, inputs: int) -> Prepare:
    def prepare(device: torch.device) -> dict[str, Launch]:
        weight, x = randn(device, outputs, inputs), randn(device, rows, inputs)
        coded = quantize4(weight, _GROUP)
        out = torch.empty(rows, outputs, device=device, dtype=x.dtype)
        workspace = torch.empty(workspace4(rows, coded), device=device)
        return {
            OURS: lambda: linear4(x, coded, out=out, workspace=workspace),
            PLAIN: lambda: linear(x, weight),
        }

    return prepare


def _experts(rows: int, sizes: Sizes) -> Prepare:
    """Tokens that choose evenly. torch's grouped product is given its rows in order."""

    def prepare(device: torch.device) -> dict[str, Launch]:
        count, inner = sizes.experts, sizes.expert_inner
        gate_up = randn(device, count, 2 * inner, sizes.hidden)
        down = randn(device, count, sizes.hidden, inner)
        x = randn(device, rows, sizes.hidden)
        pairs = torch.arange(rows * sizes.per_token, device=device) % count
        ids = pairs.view(rows, sizes.per_token)
        weights = torch.full(ids.shape, 1 / sizes.per_token, device=device)
        copies = x.repeat_interleave(sizes.per_token, 0)
        inner_rows = randn(device, len(copies), inner)
        ends = torch.bincount(pairs, minlength=count).cumsum(0).int()

        def grouped() -> None:
            torch._grouped_mm(copies, gate_up.transpose(1, 2), offs=ends)
            torch._grouped_mm(inner_rows, down.transpose(1, 2), offs=ends)

        return {
            OURS: lambda: mix_experts(x, ids, weights, gate_up, down, "silu", x.dtype),
            "torch._grouped_mm, its two products alone": grouped,
        }

    return prepare
