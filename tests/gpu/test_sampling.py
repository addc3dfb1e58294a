"""Draws on the device against the CPU's pieces of sampling, and against its sampler."""

import dataclasses
import os
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.kernels import sampling as oracle
from shoal.kernels.gpu.sampling import (
    Bias,
    Entries,
    Forbidden,
    Penalties,
    SamplingBatch,
    SamplingWorkspace,
    Status,
    sample,
)
from shoal.worker.request import SamplingParams
from shoal.worker.sampler import Sampler

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NEAR = 4e-6  # how far rounding may move a draw's number, as a share of all probability


@dataclass(frozen=True)
class Row:
    """What one sequence asks for."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    seed: int = 0
    prompt: tuple[int, ...] = (0,)
    output: tuple[int, ...] = ()
    bias: dict[int, float] = field(default_factory=dict)
    ends: tuple[int, ...] = ()
    min_tokens: int = 0


def batch_of(rows: list[Row], device: torch.device) -> SamplingBatch:
    """The last row has the first slot, and one more slot is nobody's."""

    def by_slot(values: list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor([*values[::-1], 0], dtype=dtype, device=device)

    def floats(name: str) -> Tensor:
        return by_slot([getattr(row, name) for row in rows], torch.float32)

    def ints(values: list[int]) -> Tensor:
        return by_slot(values, torch.int64)

    def entries(lists: list[list[int]]) -> Entries:
        counts = [len(each) for each in lists[::-1]]
        starts = [sum(counts[:slot]) for slot in range(len(counts) + 1)]
        pool = [token for each in lists[::-1] for token in each] + [0]
        return Entries(
            *(
                torch.tensor(values, dtype=torch.int32, device=device)
                for values in (starts, [*counts, 0], pool)
            )
        )

    known = [row.prompt + row.output for row in rows[::-1]]
    history = torch.full((len(rows) + 1, max(map(len, known)) + 3), 1 << 30, dtype=torch.int32)
    for slot, tokens in enumerate(known):
        history[slot, : len(tokens)] = torch.tensor(tokens)
    amounts = [amount for row in rows[::-1] for amount in row.bias.values()] + [0.0]
    words = np.array([row.seed for row in rows[::-1]] + [0], np.uint64)
    return SamplingBatch(
        slots=torch.arange(len(rows) - 1, -1, -1, device=device),
        positions=torch.tensor([len(row.prompt + row.output) for row in rows], device=device),
        greedy=by_slot([row.temperature == 0 for row in rows], torch.bool),
        temperature=by_slot([row.temperature or 1.0 for row in rows], torch.float32),
        top_k=by_slot([row.top_k for row in rows], torch.int32),
        top_p=floats("top_p"),
        min_p=floats("min_p"),
        typical_p=floats("typical_p"),
        seeds=torch.from_numpy(words.view(np.int64)).to(device),
        penalties=Penalties(
            floats("repetition"),
            floats("frequency"),
            floats("presence"),
            history.to(device),
            ints([len(row.prompt) for row in rows]),
        ),
        bias=Bias(entries([list(row.bias) for row in rows]), torch.tensor(amounts, device=device)),
        forbidden=Forbidden(
            entries([list(row.ends) for row in rows]),
            ints([len(row.prompt) + row.min_tokens for row in rows]),
        ),
    )


def expected(logits: Tensor, row: Row) -> tuple[set[int], Status]:
    """The ids that may be drawn for a row, more than one where rounding decides."""
    x = logits.float().clone().unsqueeze(0)
    if not np.isfinite(oracle.argmax_rows(x)[1].numpy()).all():
        return {0}, Status.NOT_FINITE
    for token, amount in row.bias.items():
        x[0, token] += amount
    if len(row.output) < row.min_tokens:
        x[0, list(row.ends)] = -torch.inf

    def one(value: float) -> Tensor:
        return torch.tensor([value])

    vocab = x.shape[1]
    prompt, output = (
        oracle.count_tokens(torch.tensor([t]).long(), torch.ones(1, len(t)).bool(), vocab)
        for t in (row.prompt, row.output)
    )
    penalties = (one(row.repetition), one(row.frequency), one(row.presence))
    oracle.penalize_(x, prompt, output, *penalties)
    best, value = oracle.argmax_rows(x)
    if value == -torch.inf:
        return {0}, Status.NOTHING_LEFT
    if row.temperature == 0:
        return {int(best)}, Status.OK
    x.div_(row.temperature)
    if row.min_p > 0:
        oracle.filter_min_p_(x, one(row.min_p))
    if 0 < row.top_k < vocab:
        oracle.filter_top_k_(x, torch.tensor([row.top_k]))
    if row.top_p < 1:
        oracle.filter_top_p_(x, one(row.top_p))
    if row.typical_p < 1:
        oracle.filter_typical_p_(x, one(row.typical_p))
    length = len(row.prompt + row.output)
    drawn = oracle.uniforms(np.array([row.seed], np.uint64), np.array([length], np.uint64))
    numbers = torch.from_numpy(drawn) + torch.tensor([[-NEAR], [0.0], [NEAR]])
    return {int(oracle.draw(x, number)) for number in numbers}, Status.OK


def check(
    logits: Tensor, rows: list[Row], device: torch.device, tile: int = 64, listed: int = 16
) -> list[int]:
    """Draws for all rows at once and one by one against the oracle; the ids."""
    space = SamplingWorkspace.allocate(len(rows), logits.shape[1], device, tile=tile, listed=listed)
    for buffer in (space.logits, space.listed):
        buffer.fill_(torch.nan)
    ids, status = sample(logits.to(device), batch_of(rows, device), workspace=space)
    for index, row in enumerate(rows):
        tokens, wanted = expected(logits[index], row)
        assert status[index] == wanted, row
        assert int(ids[index]) in tokens, row
    return [int(token) for token in ids]


def logits_of(rows: int, vocab: int, seed: int, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def row_strategy(vocab: int) -> st.SearchStrategy[Row]:
    """Every parameter is off half of the time, so that filters meet in all combinations."""

    def often(off: float, on: st.SearchStrategy[float]) -> st.SearchStrategy[float]:
        return st.just(off) | on

    tokens = st.integers(0, vocab - 1)
    return st.builds(
        Row,
        temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        top_k=st.just(0) | st.integers(1, vocab + 3),
        top_p=often(1.0, st.floats(0.0625, 0.984375, width=32)),
        min_p=often(0.0, st.floats(0.0078125, 1.0, width=32)),
        typical_p=often(1.0, st.floats(0.0625, 0.984375, width=32)),
        repetition=often(1.0, st.floats(0.5, 2.0, width=32)),
        frequency=often(0.0, st.floats(-2.0, 2.0, width=32)),
        presence=often(0.0, st.floats(-2.0, 2.0, width=32)),
        seed=st.integers(0, (1 << 64) - 1),
        prompt=st.lists(tokens, min_size=1, max_size=6).map(tuple),
        output=st.lists(tokens, max_size=6).map(tuple),
        bias=st.dictionaries(tokens, st.floats(-8.0, 8.0, width=32), max_size=3),
        ends=st.lists(tokens, unique=True, max_size=3).map(tuple),
        min_tokens=st.integers(0, 4),
    )


@settings(max_examples=12 if INTERPRETED else 200, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_mix_of_rows_draws_what_the_oracle_draws(data: st.DataObject) -> None:
    """Odd vocabularies, all parameters; lists that hold what is left and lists that do not."""
    device = torch.device("cpu" if INTERPRETED else "cuda")
    vocab = data.draw(st.integers(2, 200))
    rows = data.draw(st.lists(row_strategy(vocab), min_size=1, max_size=4))
    spread = data.draw(st.sampled_from([0.3, 3.0]))
    logits = logits_of(len(rows), vocab, data.draw(st.integers(0, 1000)), spread)
    check(logits, rows, device, tile=32, listed=data.draw(st.sampled_from([8, 256])))


@pytest.mark.parametrize("listed", [4, 512])
def test_every_filter_alone(listed: int, device: torch.device) -> None:
    """From the list and, where it is too short for what is left, from the whole row."""
    rows = [
        *(Row(top_k=k, seed=k) for k in (1, 30, 140)),
        *(Row(top_p=p, seed=7) for p in (1e-6, 0.7, 0.99999)),
        *(Row(min_p=p, seed=9) for p in (1e-4, 0.3)),
        *(Row(typical_p=p, seed=11) for p in (0.01, 0.7)),
        Row(seed=13),
    ]
    check(logits_of(len(rows), 140, 4, 2.0), rows, device, listed=listed)


def test_a_row_draws_the_same_alone_and_however_it_is_divided(device: torch.device) -> None:
    """Tiles, lists and company change nothing: sums of integers have no order."""
    rows = [Row(temperature=1.5, top_p=0.95, seed=seed) for seed in range(3)]
    rows += [Row(temperature=1.5, seed=seed) for seed in range(2)]
    logits = logits_of(1, 200, 3, 1.0).expand(len(rows), -1)
    together = check(logits, rows, device, tile=32, listed=8)
    assert check(logits, rows, device, tile=256, listed=256) == together
    alone = [check(logits[:1], [row], device, tile=128, listed=256)[0] for row in rows]
    assert alone == together


def test_ties_are_kept_together_and_greedy_takes_the_first(device: torch.device) -> None:
    """Tokens as likely as the last one kept stay, as on the CPU."""
    logits = torch.zeros(5, 130)
    logits[:, 40:120] = 2.0
    logits[4] = -0.0
    logits[4, 7] = 0.0
    rows = [Row(temperature=0), Row(top_k=3, seed=1), Row(top_p=0.1, seed=2)]
    rows += [Row(typical_p=0.1, seed=3), Row(temperature=0)]
    ids = check(logits, rows, device)
    assert ids[0] == 40 and ids[4] == 0
    drawn = check(
        logits[:6:5].expand(6, -1), [Row(top_k=3, seed=seed) for seed in range(6)], device
    )
    assert min(drawn) >= 40 and max(drawn) < 120 and len(set(drawn)) > 3


def test_a_batch_that_is_all_greedy_needs_no_survey(device: torch.device) -> None:
    """The host may say so: the same tokens, penalties and all, and the same excuses."""
    logits = logits_of(3, 90, 1)
    logits[1, 4] = torch.nan
    rows = [Row(temperature=0, bias={5: 90.0}), Row(temperature=0), Row(temperature=0)]
    batch = dataclasses.replace(batch_of(rows, device), all_greedy=True)
    ids, status = sample(logits.to(device), batch)
    assert status.tolist() == [0, Status.NOT_FINITE, 0]
    assert ids.tolist() == [5, 0, int(logits[2].argmax())]


def test_rows_that_nothing_can_be_drawn_for_say_why(device: torch.device) -> None:
    """NaN, infinities, and everything forbidden; the rows beside them are drawn."""
    logits = logits_of(7, 70, 5)
    logits[0, 69] = torch.nan
    logits[1, 3] = torch.inf
    logits[2] = -torch.inf
    logits[3, :] = -torch.inf
    logits[3, 5] = 1.0
    logits[4, 20] = -torch.nan
    rows = [Row(temperature=0), Row(), Row(top_k=4), Row(ends=(5,), min_tokens=1), Row(top_p=0.5)]
    check(logits, [*rows, Row(ends=(1, 2), min_tokens=2), Row(temperature=0)], device)


def test_only_one_token_is_left(device: torch.device) -> None:
    """It is drawn whatever the number, far down a row of minus infinities."""
    logits = torch.full((6, 300), -torch.inf)
    logits[:, 222] = -50.0
    rows = [Row(seed=seed, top_p=(1.0, 0.5)[seed % 2], top_k=seed % 3) for seed in range(6)]
    assert check(logits, rows, device) == [222] * 6


def test_padding_rows_and_buffers_of_a_graph(
    device: torch.device, float_types: tuple[torch.dtype, ...]
) -> None:
    """A negative slot reads no parameters; results go where they are wanted; logits stay."""
    rows = [Row(temperature=0), Row(top_k=5, seed=3), Row(seed=4)]
    for dtype in float_types:
        logits = logits_of(3, 90, 6).to(dtype)
        batch = batch_of(rows, device)
        batch.slots[1] = -1
        found = logits.to(device).clone()
        found[1] = torch.nan
        before = found.clone()
        ids = torch.full((3,), -9, device=device)
        status = torch.full((3,), -9, dtype=torch.int32, device=device)
        space = SamplingWorkspace.allocate(5, 90, device, tile=32)
        assert sample(found, batch, ids=ids, status=status, workspace=space) == (ids, status)
        assert status.tolist() == [0, 0, 0] and ids[1] == 0
        assert int(ids[0]) in expected(logits[0], rows[0])[0]
        assert int(ids[2]) in expected(logits[2], rows[2])[0]
        assert torch.equal(found.nan_to_num(), before.nan_to_num())


def test_draws_follow_the_distribution(device: torch.device) -> None:
    """Keyed draws over 6 tokens: a chi-squared statistic that a fair draw passes with
    p > 0.001."""
    row = torch.tensor([0.0, 1.0, 2.0, -1.0, -torch.inf, 1.5])
    count = 60 if device.type == "cpu" else 20_000
    rows = [Row(seed=seed) for seed in range(count)]
    batch = batch_of(rows, device)
    batch = SamplingBatch(
        batch.slots,
        batch.positions,
        *(batch.greedy, batch.temperature, batch.top_k, batch.top_p, batch.min_p),
        *(batch.typical_p, batch.seeds),
    )
    space = SamplingWorkspace.allocate(count, 6, device, tile=16)
    ids, _ = sample(row.expand(count, -1).to(device), batch, workspace=space)
    wanted = row.softmax(-1) * count
    found = torch.bincount(ids.cpu(), minlength=6)
    assert found[4] == 0
    statistic = ((found - wanted)[wanted > 0] ** 2 / wanted[wanted > 0]).sum()
    assert statistic < 18.47  # chi-squared, 4 degrees of freedom, p = 0.001


def test_the_cpu_sampler_draws_the_same(device: torch.device) -> None:
    """The whole order of operations, from the parameters of requests."""
    vocab, ends = 120, (3,)
    wishes = [
        SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=5),
        SamplingParams(temperature=0.0, logit_bias={7: 9.0}, min_tokens=4, seed=6),
        SamplingParams(
            temperature=1.2,
            repetition_penalty=1.3,
            frequency_penalty=0.4,
            presence_penalty=-0.5,
            typical_p=0.8,
            seed=7,
        ),
    ]
    prompts, outputs = [(1, 2), (3,), (7, 7, 9)], [(5, 5), (8,), (9, 11, 11, 12)]
    sampler = Sampler(3, vocab, ends)
    tokens = np.zeros((3, 16), np.int64)
    rows = []
    for slot, (wish, prompt, output) in enumerate(zip(wishes, prompts, outputs, strict=True)):
        seed = (1 << 63) + slot
        sampler.set_slot(slot, wish, seed, len(prompt))
        tokens[slot, : len(prompt + output)] = prompt + output
        rows.append(
            Row(
                *(wish.temperature, wish.top_k, wish.top_p, wish.min_p, wish.typical_p),
                *(wish.repetition_penalty, wish.frequency_penalty, wish.presence_penalty),
                *(seed, prompt, output, dict(wish.logit_bias), ends, wish.min_tokens),
            )
        )
    logits = logits_of(3, vocab, 8)
    lengths = np.array([len(row.prompt + row.output) for row in rows])
    drawn = sampler.sample(logits.clone(), np.arange(3), lengths, tokens)
    assert check(logits, rows, device) == [each.token_id for each in drawn]


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    """Parameters of a wrong dtype or size, and a workspace of another model."""
    logits, batch = torch.zeros(1, 8, device=device), batch_of([Row()], device)
    with pytest.raises(ValueError, match=r"logits has shape \[2, 8\], expected \[1, any\]"):
        sample(logits.expand(2, -1), batch)
    space = SamplingWorkspace.allocate(1, 9, device)
    with pytest.raises(ValueError, match="workspace is for up to 1 rows of 9 tokens"):
        sample(logits, batch, workspace=space)
