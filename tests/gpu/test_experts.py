"""Mixtures of experts against the CPU's, and the sort of their tokens against a plain one."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.kernels.activation import ACTIVATIONS
from shoal.kernels.experts import mix_experts as mix_on_cpu
from shoal.kernels.gpu.experts import Matrices, mix_experts
from shoal.kernels.gpu.experts_sort import most_tiles, place_tokens
from shoal.kernels.gpu.pack4 import quantize4, stack4
from shoal.kernels.gpu.pack8 import quantize8


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=15, deadline=None)
@given(
    ids=st.lists(st.integers(-1, 6), min_size=1, max_size=60),
    experts=st.integers(1, 6),
    tile=st.sampled_from([16, 32]),
)
def test_each_tile_holds_rows_of_one_expert_in_order(
    ids: list[int], experts: int, tile: int
) -> None:
    """Every pair of a known expert is placed once, fillers are -1, and the bound on tiles holds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    placement = place_tokens(torch.tensor(ids, device=device).view(-1, 1), experts, tile)
    assert placement.tiles == most_tiles(len(ids), experts, tile)
    expected: list[tuple[int, list[int]]] = []
    for expert in range(experts):
        mine = [pair for pair, id_ in enumerate(ids) if id_ == expert]
        for first in range(0, len(mine), tile):
            rows = mine[first : first + tile]
            expected.append((expert, rows + [-1] * (tile - len(rows))))
    tiles = placement.experts.tolist()
    assert tiles == [expert for expert, _ in expected] + [-1] * (len(tiles) - len(expected))
    pairs = placement.pairs.view(-1, tile).tolist()
    assert pairs[: len(expected)] == [rows for _, rows in expected]


def apply(
    gate_up: torch.Tensor, down: torch.Tensor, activation: str, x: torch.Tensor
) -> torch.Tensor:
    gate, up = (x @ gate_up.t()).chunk(2, -1)
    return (ACTIVATIONS[activation](gate) * up) @ down.t()


def expected_mix(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """In float32 on the CPU; one expert more, which adds nothing, stands for ids left out."""
    applied: Sequence[partial[torch.Tensor]] = [
        partial(apply, one.float().cpu(), two.float().cpu(), activation)
        for one, two in zip(gate_up, down, strict=True)
    ]
    count = len(gate_up)
    left_out = (ids < 0) | (ids >= count)
    return mix_on_cpu(
        x.float().cpu(),
        torch.where(left_out, count, ids).cpu(),
        weights.cpu(),
        [*applied, torch.zeros_like],
    )


def drawn(
    seed: int, tokens: int, experts: int, choices: int, hidden: int, inner: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, ids, weights, gate_up, down."""
    generator = draw(seed)
    x = torch.randn(tokens, hidden, generator=generator)
    ids = torch.stack(
        [torch.randperm(experts, generator=generator)[:choices] for _ in range(tokens)]
    )
    weights = torch.rand(tokens, choices, generator=generator)
    gate_up = torch.randn(experts, 2 * inner, hidden, generator=generator) / hidden**0.5
    down = torch.randn(experts, hidden, inner, generator=generator) / inner**0.5
    return x, ids, weights, gate_up, down


CASES = (
    # tokens, experts, choices, hidden, inner, activation
    (1, 4, 2, 64, 48, "silu"),
    (7, 5, 3, 40, 72, "gelu_tanh"),
    (33, 2, 1, 96, 32, "relu"),
)


# Rows of pairs that are left out hold what memory held, also where an activation runs over them.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("tokens,experts,choices,hidden,inner,activation", CASES)
def test_a_mixture_is_the_cpus(
    tokens: int,
    experts: int,
    choices: int,
    hidden: int,
    inner: int,
    activation: str,
    device: torch.device,
    float_types: tuple[torch.dtype, ...],
) -> None:
    """Odd sizes, in every float dtype; one token goes through an expert that is elsewhere."""
    x, ids, weights, gate_up, down = drawn(tokens, tokens, experts, choices, hidden, inner)
    ids[0, 0] = -1
    ids[-1, -1] = experts
    for dtype in float_types:
        given_, one, two = (t.to(device, dtype) for t in (x, gate_up, down))
        y = mix_experts(given_, ids.to(device), weights.to(device), one, two, activation)
        assert y.dtype == torch.float32
        expected = expected_mix(given_, ids, weights, one, two, activation)
        step = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(y.cpu(), expected, rtol=step, atol=step)


@pytest.mark.parametrize("kind", ["int8", "fp8", "fp8 blocks", "int4"])
def test_a_mixture_of_coded_experts_is_near_that_of_their_values(
    kind: str, device: torch.device
) -> None:
    """Only the activations' own codes make a difference."""
    x, ids, weights, gate_up, down = drawn(3, 6, 3, 2, 160, 96)

    def coded(weight: torch.Tensor) -> Matrices:
        weight = weight.to(device)
        if kind == "int4":
            return stack4([quantize4(one, 32) for one in weight])
        dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
        return quantize8(weight, dtype, blocked=kind == "fp8 blocks")

    one, two = coded(gate_up), coded(down)
    assert not isinstance(one, torch.Tensor) and not isinstance(two, torch.Tensor)
    out = torch.empty(6, 160, device=device)
    y = mix_experts(x.to(device), ids.to(device), weights.to(device), one, two, "silu", out=out)
    assert y is out
    expected = expected_mix(x, ids, weights, one.dequantized(), two.dequantized(), "silu")
    tolerance = 1e-4 if kind == "int4" else 0.08
    assert (y.cpu() - expected).abs().max() <= tolerance * expected.abs().max()


def test_matrices_that_do_not_fit_each_other_are_named(device: torch.device) -> None:
    """Both shapes are in the message."""
    x, ids, weights, gate_up, down = (tensor.to(device) for tensor in drawn(1, 2, 3, 2, 32, 16))
    with pytest.raises(ValueError, match=r"down \[3, 16, 32\]"):
        mix_experts(x, ids, weights, gate_up, down.mT.contiguous(), "silu")
    with pytest.raises(ValueError, match="ids has shape"):
        mix_experts(x, ids[:1], weights, gate_up, down, "silu")


def test_no_tokens_are_no_work(device: torch.device) -> None:
    """An empty batch returns an empty result."""
    x, ids, weights, gate_up, down = (tensor.to(device) for tensor in drawn(1, 2, 3, 2, 32, 16))
    assert mix_experts(x[:0], ids[:0], weights[:0], gate_up, down, "silu").shape == (0, 32)
