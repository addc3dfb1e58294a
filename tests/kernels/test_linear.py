"""Packed linears and the gated activation against float64."""

import pytest
import torch

from shoal.kernels import linear
from shoal.kernels.linear import PackedLinear, gated_silu

SHAPES = [(1, 7, 5), (3, 64, 33), (33, 31, 96), (70, 576, 192)]


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """Inputs are of order one and weights of 1 / sqrt(terms): outputs of order one."""
    return 8 * torch.finfo(dtype).eps if dtype is torch.bfloat16 else 2e-6 * terms**0.5


def make(out: int, inner: int, dtype: torch.dtype, bias: bool) -> tuple[PackedLinear, torch.Tensor]:
    weight = (torch.randn(out, inner) / inner**0.5).to(dtype)
    offset = torch.randn(out).to(dtype) if bias else None
    reference = torch.cat((weight, offset[:, None] if bias else torch.zeros(out, 1)), 1)
    return PackedLinear(weight, offset), reference.double()


def exact(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return x.double() @ reference[:, :-1].T + reference[:, -1]


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inner", "out"), SHAPES)
def test_linear_equals_float64(
    rows: int,
    inner: int,
    out: int,
    dtype: torch.dtype,
    bias: bool,
    packs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any shape, with and without bias, packed by oneDNN and on torch's own GEMM."""
    torch.manual_seed(rows)
    if not packs:
        monkeypatch.setattr(linear, "_pack", lambda weight: None)
    packed, reference = make(out, inner, dtype, bias)
    x = torch.randn(rows, inner).to(dtype)
    error = (packed(x).double() - exact(x, reference)).abs().max()
    assert packed(x).dtype is dtype
    assert error < tolerance(dtype, inner) * 4


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inner", "out"), SHAPES)
def test_gated_silu_equals_float64(
    rows: int,
    inner: int,
    out: int,
    dtype: torch.dtype,
    packs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """silu(gate) * up, with biases, fused into the GEMMs and apart."""
    torch.manual_seed(rows)
    if not packs:
        monkeypatch.setattr(linear, "_pack", lambda weight: None)
    gate, gate_reference = make(out, inner, dtype, True)
    up, up_reference = make(out, inner, dtype, True)
    x = torch.randn(rows, inner).to(dtype)
    wanted = torch.nn.functional.silu(exact(x, gate_reference)) * exact(x, up_reference)
    error = (gated_silu(x, gate, up).double() - wanted).abs() / (1 + wanted.abs())
    assert error.max() < tolerance(dtype, inner) * 4


def test_other_dtypes_and_shapes_are_refused() -> None:
    """A weight that is no float matrix, or a bias of another length, is a ValueError."""
    with pytest.raises(ValueError, match="float16"):
        PackedLinear(torch.zeros(4, 4, dtype=torch.float16))
    with pytest.raises(ValueError, match="bias must be"):
        PackedLinear(torch.zeros(4, 3), torch.zeros(3))
