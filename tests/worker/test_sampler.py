"""The sampler against one row at a time, written out naively."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.kernels.sampling import uniforms
from shoal.worker.request import SamplingParams
from shoal.worker.sampler import Sampler
from shoal.worker.step import Sampled

VOCAB = 97
EOS = 5
GREEDY = SamplingParams(temperature=0.0)


def naive(
    logits: Tensor, params: SamplingParams, seed: int, prompt: list[int], output: list[int]
) -> int:
    """One row, step by step, in float64."""
    row = logits.double().tolist()
    for token, amount in params.logit_bias.items():
        row[token] += amount
    if len(output) < params.min_tokens:
        for token in {EOS, *params.stop_token_ids}:
            row[token] = -math.inf
    for token in {*prompt, *output}:
        row[token] *= params.repetition_penalty if row[token] < 0 else 1 / params.repetition_penalty
    for token, count in Counter(output).items():
        row[token] -= count * params.frequency_penalty + params.presence_penalty
    if params.greedy:
        return row.index(max(row))
    row = [value / params.temperature for value in row]

    def probabilities() -> list[float]:
        weights = [math.exp(value - max(row)) for value in row]
        return [weight / sum(weights) for weight in weights]

    def keep(tokens: set[int]) -> None:
        for token in range(len(row)):
            if token not in tokens:
                row[token] = -math.inf

    if params.min_p > 0:
        p = probabilities()
        keep({t for t in range(len(row)) if p[t] >= params.min_p * max(p)})
    if params.top_k > 0:
        keep(set(sorted(range(len(row)), key=lambda t: -row[t])[: params.top_k]))
    for order, limit in (
        (lambda p, h: lambda t: -p[t], params.top_p),
        (lambda p, h: lambda t: abs(-math.log(p[t]) - h) if p[t] else math.inf, params.typical_p),
    ):
        if limit < 1:
            p = probabilities()
            entropy = -sum(q * math.log(q) for q in p if q > 0)
            mass, kept = 0.0, set()
            for token in sorted(range(len(row)), key=order(p, entropy)):
                if mass >= limit:
                    break
                kept.add(token)
                mass += p[token]
            keep(kept)
    number = float(
        uniforms(np.array([seed], np.uint64), np.array([len(prompt + output)], np.uint64))[0]
    )
    mass = 0.0
    p = probabilities()
    for token, q in enumerate(p):
        mass += q
        if mass > number:
            return token
    raise AssertionError("probabilities sum up to less than one")


class Batch:
    """Rows with prompts and outputs of their own, in shuffled slots."""

    def __init__(self, params: list[SamplingParams], seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.params = params
        rows = len(params)
        self.logits = 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))
        self.slots = rng.permutation(2 * rows)[:rows]
        self.tokens = rng.integers(0, VOCAB, (2 * rows, 40))
        self.prompt_len = rng.integers(1, 12, rows)
        self.lengths = self.prompt_len + rng.integers(0, 20, rows)
        self.seeds = rng.integers(0, 2**63, rows)
        self.sampler = Sampler(2 * rows, VOCAB, (EOS,))
        for row, param in enumerate(params):
            slot, prompt_len = int(self.slots[row]), int(self.prompt_len[row])
            self.sampler.set_slot(slot, param, int(self.seeds[row]), prompt_len)

    def run(self, rows: list[int] | None = None) -> list[Sampled]:
        picked = list(range(len(self.params))) if rows is None else rows
        return self.sampler.sample(
            self.logits[picked].clone(), self.slots[picked], self.lengths[picked], self.tokens
        )

    def wanted(self) -> list[int]:
        results = []
        for row, params in enumerate(self.params):
            known = self.tokens[self.slots[row]].tolist()
            prompt = known[: self.prompt_len[row]]
            output = known[self.prompt_len[row] : self.lengths[row]]
            seed = int(self.seeds[row])
            results.append(naive(self.logits[row], params, seed, prompt, output))
        return results


KNOBS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 5.0},
    "top_k": {"top_k": 4},
    "top_k_of_all": {"top_k": 1000},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "typical_p": {"typical_p": 0.6},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.9},
    "repetition": {"repetition_penalty": 1.7},
    "repetition_below_one": {"repetition_penalty": 0.6},
    "bias": {"logit_bias": {3: 9.0, 50: -100.0, 96: 8.5}},
    "min_tokens": {"min_tokens": 10, "stop_token_ids": (7, 8)},
    "greedy_penalties": {"temperature": 0.0, "presence_penalty": 2.0, "repetition_penalty": 1.3},
    "greedy_bias": {"temperature": 0.0, "logit_bias": {3: 100.0}},
    "greedy_min_tokens": {"temperature": 0.0, "min_tokens": 30},
    "all": {
        "temperature": 1.3,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.02,
        "typical_p": 0.95,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.2,
        "repetition_penalty": 1.1,
        "logit_bias": {1: 3.0},
        "min_tokens": 3,
    },
}


@pytest.mark.parametrize("knob", KNOBS)
def test_each_knob_equals_the_naive_reference(knob: str) -> None:
    """40 rows with the knob set, each with a context, a seed and a position of its own."""
    batch = Batch([SamplingParams(**KNOBS[knob])] * 40, seed=len(knob))
    if knob == "min_tokens":
        batch.logits[:, [EOS, 7, 8]] += 6.0
    assert [result.token_id for result in batch.run()] == batch.wanted()


def test_all_knobs_side_by_side() -> None:
    """Rows of one batch do not disturb each other, whoever is beside them and in what order."""
    batch = Batch([SamplingParams(**knobs) for knobs in KNOBS.values()] * 3, seed=9)
    wanted = batch.wanted()
    together = batch.run()
    assert [result.token_id for result in together] == wanted
    assert [result.slot for result in together] == batch.slots.tolist()
    for rows in ([5], list(range(len(wanted)))[::-2]):
        assert [result.token_id for result in batch.run(rows)] == [wanted[row] for row in rows]


def test_min_tokens_lets_go_in_time() -> None:
    """End and stop ids are held back below min_tokens and free from there on."""
    params = replace(GREEDY, min_tokens=4, stop_token_ids=(9,))
    batch = Batch([params])
    batch.logits[0, [EOS, 9]] = torch.tensor([50.0, 49.0])
    prompt = int(batch.prompt_len[0])
    drawn = []
    for generated in range(6):
        batch.lengths[0] = prompt + generated
        drawn.append(batch.run()[0].token_id)
    assert not {EOS, 9} & set(drawn[:4])
    assert drawn[4:] == [EOS, EOS]


def test_a_slot_forgets_who_was_there_before() -> None:
    """Bias, penalties, logprobs and held ids of an earlier sequence end with it."""
    batch = Batch([SamplingParams(logprobs=2, **KNOBS["all"])])
    slot = int(batch.slots[0])
    batch.sampler.set_slot(slot, GREEDY, 0, 1)
    result = batch.run()[0]
    assert result.logprobs is None
    assert result.token_id == int(batch.logits[0].argmax())
    assert batch.sampler.plain[slot]


def test_logprobs_are_of_the_raw_logits() -> None:
    """Before temperature, bias and filters; each row as many as it asked for; the rank too."""
    params = [
        SamplingParams(temperature=3.0, top_k=5, logit_bias={2: 50.0}, logprobs=3),
        replace(GREEDY, logprobs=0),
        GREEDY,
        replace(GREEDY, logprobs=200),
    ]
    batch = Batch(params)
    results = batch.run()
    wanted = batch.logits.double().log_softmax(-1)
    assert results[2].logprobs is None
    for row, count in ((0, 3), (1, 0), (3, VOCAB)):
        found, token = results[row].logprobs, results[row].token_id
        assert found is not None
        likeliest = wanted[row].sort(-1, descending=True)
        assert found.token_ids == (token, *likeliest.indices[:count].tolist())
        expected = [float(wanted[row, token]), *likeliest.values[:count].tolist()]
        assert found.logprobs == pytest.approx(expected, abs=1e-5)
        assert found.rank == 1 + int((wanted[row] > wanted[row, token]).sum())
    assert results[0].token_id == 2 and results[1].logprobs.rank == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("random", [True, False])
def test_a_broken_row_ends_alone(value: float, random: bool) -> None:
    """A logit that is not finite is that row's error; the others draw what they would have."""
    params = [SamplingParams(logprobs=1) if random else GREEDY] * 6
    batch = Batch(params)
    whole = batch.run()
    batch.logits[2, 11] = value
    results = batch.run()
    assert results[2].error is not None and "not finite" in results[2].error
    for row in (0, 1, 3, 4, 5):
        assert results[row] == whole[row]


def test_nothing_left_to_draw_is_an_error() -> None:
    """min_tokens that holds back the whole vocabulary ends the request with a reason."""
    everything = tuple(range(VOCAB))
    params = [
        replace(GREEDY, min_tokens=99, stop_token_ids=everything),
        SamplingParams(min_tokens=99, stop_token_ids=everything),
        GREEDY,
    ]
    results = Batch(params).run()
    assert [result.error is None for result in results] == [False, False, True]
    assert "min_tokens" in str(results[0].error)


def test_frequencies_follow_the_filtered_distribution() -> None:
    """20,000 rows of one request at successive positions: chi-squared with p > 0.001."""
    count, kept = 20_000, 6
    sampler = Sampler(1, VOCAB, ())
    sampler.set_slot(0, SamplingParams(temperature=0.8, top_k=kept), 1234, 0)
    row = 2 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(7))
    found = Counter()
    for start in range(0, count, 1000):
        positions = np.arange(start, start + 1000)
        zeros = np.zeros(1000, np.int64)
        tokens = np.zeros((1, 1), np.int64)
        drawn = sampler.sample(row.repeat(1000, 1), zeros, positions, tokens)
        found.update(result.token_id for result in drawn)
    top = row.topk(kept)
    expected = (top.values / 0.8).softmax(-1) * count
    statistic = sum(
        (found[token] - mean) ** 2 / mean
        for token, mean in zip(top.indices.tolist(), expected.tolist(), strict=True)
    )
    assert sum(found[token] for token in top.indices.tolist()) == count
    assert statistic < 20.52  # chi-squared, 5 degrees of freedom, p = 0.001
