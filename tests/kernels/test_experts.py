"""Experts, activations, norms of heads and soft caps against plain formulas."""

import math

import pytest
import torch

from shoal.kernels.activation import ACTIVATIONS, gated
from shoal.kernels.experts import Routing, mix_experts, route
from shoal.kernels.linear import PackedLinear
from shoal.kernels.norm import layer_norm, norm_heads_

PLAIN = Routing(2, False, False, 1.0, 1, 1, 1)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_softmax_scores_choose_and_weigh() -> None:
    """The likeliest experts, with their probabilities, or those divided by their sum."""
    logits = randn(9, 7)
    ids, weights = route(logits, None, PLAIN)
    best = logits.softmax(-1).topk(2, -1)
    assert ids.tolist() == best.indices.tolist()
    torch.testing.assert_close(weights, best.values)
    _, weights = route(logits, None, Routing(2, False, True, 3.0, 1, 1, 1))
    torch.testing.assert_close(weights, 3 * best.values / best.values.sum(-1, keepdim=True))


def test_a_correction_chooses_and_does_not_weigh() -> None:
    """An expert that the correction favours is taken, at its own score."""
    logits = torch.zeros(1, 4)
    correction = torch.tensor([0.0, 0.0, 9.0, 1.0])
    ids, weights = route(logits, correction, Routing(2, True, False, 1.0, 1, 1, 1))
    assert ids.tolist() == [[2, 3]]
    assert weights.tolist() == [[0.5, 0.5]]


def test_experts_come_from_the_best_groups() -> None:
    """Group scores are sums of each group's best; experts of other groups are out of reach."""
    scores = torch.tensor([[9.0, 0.0, 0.0, 5.0, 4.0, 0.0, 4.9, 4.8, 4.7]])  # three groups of three
    one, two = Routing(3, True, False, 1.0, 3, 1, 1), Routing(3, True, False, 1.0, 3, 1, 2)
    logits = torch.logit(scores / 10)
    assert set(route(logits.nan_to_num(neginf=-50), None, one)[0][0].tolist()) <= {0, 1, 2}
    assert set(route(logits.nan_to_num(neginf=-50), None, two)[0][0].tolist()) <= {6, 7, 8}


@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_the_mix_is_the_weighted_sum(tokens: int) -> None:
    """Every token through its own experts; those that nobody chose do not run."""
    x, ids, weights = randn(tokens, 6), torch.arange(tokens * 2).view(-1, 2) % 5, randn(tokens, 2)
    matrices = randn(6, 6, 6, seed=1)

    def unused(rows: torch.Tensor) -> torch.Tensor:
        raise AssertionError("nobody chose this expert")

    experts = [lambda rows, m=m: rows @ m for m in matrices[:5]]
    found = mix_experts(x, ids, weights, [*experts, unused])
    for row in range(tokens):
        wanted = sum(
            w * (x[row] @ matrices[e]) for e, w in zip(ids[row], weights[row], strict=True)
        )
        torch.testing.assert_close(found[row], wanted, rtol=1e-5, atol=1e-5)


def test_activations_are_their_formulas() -> None:
    """Each by its definition, and gated."""
    x = randn(3, 8) * 3
    cubic = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    formulas = {
        "silu": x * x.sigmoid(),
        "gelu": x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_tanh": x * 0.5 * (1 + cubic.tanh()),
        "relu": x.clamp_min(0),
        "relu_squared": x.clamp_min(0) ** 2,
    }
    assert formulas.keys() == ACTIVATIONS.keys()
    gate, up = randn(5, 8, seed=2), randn(5, 8, seed=3)
    for name, wanted in formulas.items():
        torch.testing.assert_close(ACTIVATIONS[name](x), wanted, rtol=1e-5, atol=1e-6)
        found = gated(x, PackedLinear(gate), PackedLinear(up), name)
        torch.testing.assert_close(
            found, ACTIVATIONS[name](x @ gate.T) * (x @ up.T), rtol=1e-4, atol=1e-4
        )


def test_norms_of_heads_and_rows() -> None:
    """A norm of each head inside a wider row, in place; LayerNorm with and without weights."""
    row, weight, eps = randn(4, 6, 10), randn(10, seed=1), torch.tensor(1e-6)
    wanted = row.clone()
    part = wanted[:, 1:4]
    wanted[:, 1:4] = part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    norm_heads_(row[:, 1:4], weight, eps)
    torch.testing.assert_close(row, wanted)
    x, bias = randn(5, 10), randn(10, seed=2)
    centred = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(
        layer_norm(x, weight, bias, 1e-5, torch.float32), centred * weight + bias
    )
    torch.testing.assert_close(layer_norm(x, None, None, 1e-5, torch.bfloat16), centred.bfloat16())
