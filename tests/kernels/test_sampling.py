"""The pieces of sampling against references written row by row."""

import math

import numpy as np
import pytest
import torch

from shoal.kernels.sampling import (
    argmax_rows,
    count_tokens,
    draw,
    filter_min_p_,
    filter_top_k_,
    filter_top_p_,
    filter_typical_p_,
    penalize_,
    token_logprobs,
    uniforms,
)

VOCABULARIES = [5, 256, 1000]


def logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def kept(filtered: torch.Tensor) -> list[set[int]]:
    return [set(torch.nonzero(row > -math.inf).flatten().tolist()) for row in filtered]


def by_probability(row: torch.Tensor) -> list[tuple[float, int]]:
    pairs = zip(row.double().softmax(-1).tolist(), range(len(row)), strict=True)
    return sorted(pairs, reverse=True)


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_argmax_is_the_first_largest(vocab: int) -> None:
    """Ties go to the smaller id; a NaN shows in the value."""
    rows = logits(4, vocab)
    rows[1] = 7.0
    rows[2, 3] = math.nan
    ids, values = argmax_rows(rows)
    assert ids.tolist() == [int(rows[0].argmax()), 0, 3, int(rows[3].argmax())]
    assert values[1] == 7.0 and values[2].isnan()


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_top_k_keeps_the_k_likeliest(vocab: int) -> None:
    """Each row its own k."""
    ks = [1, 2, vocab - 1, vocab]
    rows = logits(4, vocab)
    wanted = [{i for _, i in by_probability(row)[:k]} for row, k in zip(rows, ks, strict=True)]
    filter_top_k_(rows, torch.tensor(ks))
    assert kept(rows) == wanted


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_top_p_keeps_the_smallest_nucleus(vocab: int) -> None:
    """Tokens by falling probability until their sum reaches p; always at least one."""
    ps = [1e-9, 0.3, 0.9, 0.999999]
    rows = logits(4, vocab)
    wanted = []
    for row, p in zip(rows, ps, strict=True):
        mass, nucleus = 0.0, set()
        for probability, token in by_probability(row):
            if mass >= p:
                break
            nucleus.add(token)
            mass += probability
        wanted.append(nucleus)
    filter_top_p_(rows, torch.tensor(ps))
    assert kept(rows) == wanted


def test_top_p_of_a_flat_row_keeps_ties() -> None:
    """Tokens that tie with the last one kept stay: the result does not hang on sort order."""
    rows = torch.zeros(1, 50)
    filter_top_p_(rows, torch.tensor([0.5]))
    assert len(kept(rows)[0]) == 50


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_min_p_is_relative_to_the_likeliest(vocab: int) -> None:
    """Tokens under min_p times the largest probability go."""
    ps = [0.01, 0.2, 1.0]
    rows = logits(3, vocab)
    wanted = []
    for row, p in zip(rows, ps, strict=True):
        ranked = by_probability(row)
        wanted.append({i for probability, i in ranked if probability >= p * ranked[0][0]})
    filter_min_p_(rows, torch.tensor(ps))
    assert kept(rows) == wanted


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_typical_p_keeps_what_is_near_the_entropy(vocab: int) -> None:
    """Tokens by distance of their surprise to the entropy until their mass reaches p; rows that
    other filters already thinned are measured on what is left."""
    ps = [0.1, 0.5, 0.95]
    rows = logits(3, vocab)
    rows[2, :2] = -math.inf
    wanted = []
    for row, p in zip(rows, ps, strict=True):
        logprobs = row.double().log_softmax(-1)
        probabilities = logprobs.exp()
        entropy = -sum(q * math.log(q) for q in probabilities.tolist() if q > 0)
        ranked = sorted((abs(-lp - entropy), i) for i, lp in enumerate(logprobs.tolist()))
        mass, chosen = 0.0, set()
        for _, token in ranked:
            chosen.add(token)
            mass += float(probabilities[token])
            if mass >= p:
                break
        wanted.append(chosen)
    filter_typical_p_(rows, torch.tensor(ps))
    assert kept(rows) == wanted


def test_penalties_are_those_of_ctrl_and_openai() -> None:
    """Repetition over prompt and output by sign; frequency by count and presence once, over the
    output only."""
    rows = torch.tensor([[2.0, -2.0, 1.0, 4.0], [2.0, -2.0, 1.0, 4.0]])
    known = torch.tensor([[0, 1, 3, 3, 0], [2, 2, 2, 2, 2]])
    in_prompt = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    in_output = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    penalize_(
        rows,
        count_tokens(known, in_prompt, 4),
        count_tokens(known, in_output, 4),
        repetition=torch.tensor([2.0, 0.5]),
        frequency=torch.tensor([0.25, 1.0]),
        presence=torch.tensor([0.125, 1.0]),
    )
    assert rows.tolist() == [[1.0, -4.0, 1.0, 2.0 - 2 * 0.25 - 0.125], [2.0, -2.0, 2.0, 4.0]]


def test_uniforms_depend_on_seed_and_position_alone() -> None:
    """Any order and any company give the same number; neighbours are uncorrelated and uniform."""
    seeds = np.arange(200, dtype=np.uint64).repeat(100)
    positions = np.tile(np.arange(100, dtype=np.uint64), 200)
    drawn = uniforms(seeds, positions)
    assert ((drawn >= 0) & (drawn < 1)).all()
    shuffle = np.random.default_rng(0).permutation(len(drawn))
    assert (uniforms(seeds[shuffle], positions[shuffle]) == drawn[shuffle]).all()
    assert len(np.unique(drawn)) == len(drawn)
    # Kolmogorov-Smirnov: the distance passes 1.95 / sqrt(n) once in a thousand seeds.
    distance = np.abs(np.sort(drawn) - np.linspace(0, 1, len(drawn))).max()
    assert distance < 1.95 / len(drawn) ** 0.5
    grid = drawn.reshape(200, 100)
    for a, b in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.03


@pytest.mark.parametrize("vocab", [2, 255, 256, 700])
def test_draw_is_the_inverse_cdf(vocab: int) -> None:
    """The token whose cumulative probability first passes the number, in order of ids."""
    rows = logits(64, vocab)
    rows[:, ::2] -= 4
    rows[1:, 1] = -math.inf
    numbers = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    numbers[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    drawn = draw(rows, numbers).tolist()
    cumulative = rows.double().softmax(-1).cumsum(-1)
    for row, token in enumerate(drawn):
        assert rows[row, token] > -math.inf
        before = float(cumulative[row, token - 1]) if token else 0.0
        assert before - 1e-6 <= numbers[row] <= float(cumulative[row, token]) + 1e-6


def test_draw_never_leaves_what_is_allowed() -> None:
    """One allowed token far from either end is drawn for every number, 0 and almost 1 included."""
    rows = torch.full((3, 1000), -math.inf)
    rows[:, 600] = -50.0
    numbers = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(rows, numbers).tolist() == [600] * 3


def test_draws_follow_the_distribution() -> None:
    """20,000 keyed draws over 8 tokens: a chi-squared statistic that a fair draw passes with
    p > 0.001."""
    row = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, -math.inf, 1.5, 0.0])
    count = 20_000
    numbers = uniforms(np.full(count, 42, np.uint64), np.arange(count, dtype=np.uint64))
    drawn = draw(row.expand(count, -1), torch.from_numpy(numbers))
    expected = row.softmax(-1) * count
    found = torch.bincount(drawn, minlength=8)
    assert found[5] == 0
    allowed = expected > 0
    statistic = ((found - expected)[allowed] ** 2 / expected[allowed]).sum()
    assert statistic < 22.46  # chi-squared, 6 degrees of freedom, p = 0.001


def test_logprobs_are_log_softmax_with_ranks() -> None:
    """Chosen token, its rank counted from 1, and the likeliest in falling order."""
    rows = logits(5, 300)
    chosen = torch.tensor([0, 299, 7, int(rows[3].argmax()), 12])
    logprob, rank, ids, values = token_logprobs(rows, chosen, 4)
    wanted = rows.double().log_softmax(-1)
    ordered = wanted.sort(-1, descending=True)
    for row, token in enumerate(chosen.tolist()):
        assert logprob[row] == pytest.approx(float(wanted[row, token]), abs=1e-5)
        assert ids[row].tolist() == ordered.indices[row, :4].tolist()
        assert values[row].tolist() == pytest.approx(ordered.values[row, :4].tolist(), abs=1e-5)
        assert rank[row] == 1 + int((wanted[row] > wanted[row, token]).sum())
    assert rank[3] == 1
