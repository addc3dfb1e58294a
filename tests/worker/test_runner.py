"""The executor: plans in, tokens out, against transformers on a tiny model."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from shoal.kernels.native import unavailable
from shoal.worker.config import EngineConfig
from shoal.worker.model.weights import WeightError
from shoal.worker.request import SamplingParams
from shoal.worker.runner import InProcessExecutor, create_executor
from shoal.worker.step import Row, Sampled, SlotBlocks, SlotInit, StepPlan

GREEDY = SamplingParams(temperature=0.0)
BLOCK = 4


@pytest.fixture
def threads() -> Iterator[None]:
    """Leaves torch's number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def executor(models: ModuleType, tmp_path: Path, threads: None) -> InProcessExecutor:
    return build(models, tmp_path)


def build(models: ModuleType, folder: Path, **settings: object) -> InProcessExecutor:
    path = models.save(models.tiny("llama"), folder)
    values = {
        "max_num_seqs": 4,
        "block_size": BLOCK,
        "kv_cache_blocks": 200,
        "dtype": "float32",
        "threads": 1,
        **settings,
    }
    return create_executor(path, EngineConfig(**values), lambda phase, seconds: None)


def prompt(seed: int, count: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(199, (count,), generator=generator).tolist())


def init(
    slot: int,
    tokens: tuple[int, ...],
    params: SamplingParams = GREEDY,
    *,
    prompt_len: int | None = None,
    blocks: int = 20,
    seed: int = 0,
) -> SlotInit:
    ids = tuple(range(1 + 20 * slot, 1 + 20 * slot + blocks))
    return SlotInit(slot, tokens, prompt_len or len(tokens), params, seed, ids)


def step(executor: InProcessExecutor, *rows: Row, init=(), grow=()) -> list[Sampled]:
    return list(executor.execute(StepPlan(0, tuple(init), tuple(grow), rows)).sampled)


def decode(executor: InProcessExecutor, slot: int, start: int, count: int) -> list[int]:
    return [
        step(executor, Row(slot, position, 1, sample=True))[0].token_id
        for position in range(start, start + count)
    ]


def test_info_says_what_the_model_is(executor: InProcessExecutor) -> None:
    """Architecture, sizes and tokens for engine and router."""
    info = executor.info
    assert (info.architecture, info.vocab_size, info.max_model_len) == (
        "LlamaForCausalLM",
        199,
        512,
    )
    assert (info.eos_token_ids, info.bos_token_id, info.dtype) == ((2,), 1, "float32")
    assert (executor.num_blocks, executor.block_size) == (200, BLOCK)


def test_mixed_steps_equal_transformers(executor: InProcessExecutor, models: ModuleType) -> None:
    """A chunked prefill beside a decoding sequence; the sampled tokens reach the next step by
    the executor's own state; tables grow while decoding."""
    first, second = prompt(1, 11), prompt(2, 30)
    tokens = {0: list(first), 1: list(second)}
    results = step(executor, Row(0, 0, 11, sample=True), init=[init(0, first, blocks=3)])
    tokens[0] += [result.token_id for result in results]
    for position, (start, count) in enumerate(((0, 7), (7, 1), (8, 21), (29, 1)), 11):
        results = step(
            executor,
            Row(1, start, count, sample=start + count == 30),
            Row(0, position, 1, sample=True),
            init=[init(1, second)] if start == 0 else [],
            grow=[SlotBlocks(0, (4,))] if position == 12 else [],
        )
        for result in results:
            tokens[result.slot].append(result.token_id)
    assert [result.slot for result in results] == [1, 0]
    for slot, known in ((0, first), (1, second)):
        predicted = models.oracle_logits(models.tiny("llama"), tokens[slot]).argmax(-1)
        assert predicted[len(known) - 1 : -1].tolist() == tokens[slot][len(known) :]
    assert len(tokens[0]) == 16 and len(tokens[1]) == 31


def test_a_resumed_sequence_continues_as_if_never_stopped(executor: InProcessExecutor) -> None:
    """Seeded sampling with penalties: preempted, resumed in another slot with what it had, it
    draws the same tokens; so does a sequence that decodes beside others."""
    params = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.2, presence_penalty=1)
    known = prompt(3, 9)
    whole = step(executor, Row(0, 0, 9, sample=True), init=[init(0, known, params, seed=77)])
    tokens = [whole[0].token_id, *decode(executor, 0, 9, 11)]
    assert len(set(tokens)) > 6

    so_far = (*known, *tokens[:5])
    begin = init(2, so_far, params, prompt_len=9, seed=77)
    other = init(1, prompt(4, 20), SamplingParams(temperature=2.0), seed=5)
    results = step(
        executor, Row(1, 0, 20, sample=True), Row(2, 0, 14, sample=True), init=[begin, other]
    )
    resumed = [results[1].token_id, *decode(executor, 2, 14, 6)]
    assert resumed == tokens[5:]


def test_prompt_logprobs_are_those_of_transformers(
    executor: InProcessExecutor, models: ModuleType
) -> None:
    """Over chunks of any size, whichever position they end at; nothing for generated tokens."""
    known = prompt(5, 90)
    params = SamplingParams(temperature=0.0, prompt_logprobs=2, logprobs=1)
    wanted = models.oracle_logits(models.tiny("llama"), known).log_softmax(-1)
    found = {}
    for start, count in ((0, 1), (1, 70), (71, 19)):
        plan = StepPlan(
            0,
            (init(0, known, params, blocks=25),) if start == 0 else (),
            (),
            (Row(0, start, count, sample=start + count == 90),),
        )
        result = executor.execute(plan)
        for part in result.prompt_logprobs:
            found.update(enumerate(part.entries, part.start))
    assert sorted(found) == list(range(1, 90))
    for position, entry in found.items():
        row = wanted[position - 1]
        assert entry.token_ids[0] == known[position]
        expected = [float(row[token]) for token in entry.token_ids]
        assert list(entry.logprobs) == pytest.approx(expected, abs=2e-4)
        assert entry.token_ids[1:] == tuple(row.topk(2).indices.tolist())
    assert result.sampled[0].logprobs is not None
    after = executor.execute(StepPlan(0, (), (), (Row(0, 90, 1, sample=True),)))
    assert after.prompt_logprobs == ()


def test_a_step_asks_for_no_more_rows_than_it_has_tokens(
    executor: InProcessExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts that want logprobs and do not end in the step want their last row twice; buffers of
    a backend have room for the step's tokens and no more."""
    params = SamplingParams(temperature=0.0, prompt_logprobs=0)
    forward, asked = executor.backend(0).forward, []
    monkeypatch.setattr(
        executor.backend(0),
        "forward",
        lambda batch, rows: asked.append((batch.num_tokens, len(rows))) or forward(batch, rows),
    )
    starting = [init(slot, prompt(slot, 40), params) for slot in range(2)]
    rows = [Row(slot, 0, 20, sample=False) for slot in range(2)]
    result = executor.execute(StepPlan(0, tuple(starting), (), tuple(rows)))
    assert [len(part.entries) for part in result.prompt_logprobs] == [20, 20]
    assert asked == [(40, 40)]


def test_the_last_position_of_a_full_sequence(executor: InProcessExecutor) -> None:
    """The token drawn at max_model_len has room; nothing is overwritten beyond."""
    known = prompt(6, 511)
    ids = tuple(range(1, 129))
    start = SlotInit(3, known, 511, GREEDY, 0, ids)
    results = step(executor, Row(3, 0, 511, sample=True), init=[start])
    results += step(executor, Row(3, 511, 1, sample=True))
    assert [result.error for result in results] == [None, None]


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_overflow_ends_one_row_and_leaves_no_trace(
    models: ModuleType, tmp_path: Path, threads: None, backend: str
) -> None:
    """A token whose embedding is not finite: its sequence gets an error, its neighbour does not,
    and the next owner of its blocks reads nothing of it."""
    if backend == "native" and (why := unavailable()) is not None:
        pytest.skip(why)
    if backend == "torch":
        executor = build(models, tmp_path)
    else:  # whose heads are wide enough for step programs
        config = EngineConfig(backend=backend, max_num_seqs=4, kv_cache_blocks=200, threads=1)
        path = models.smollm2_path()
        executor = create_executor(path, config, lambda phase, seconds: None)
    good = prompt(7, 12)
    clean = step(executor, Row(0, 0, 12, sample=True), init=[init(0, good)])[0]
    inner = executor._backends[0]
    embedding = inner._decoder.embedding if backend == "torch" else inner._step._kept[0]
    poison, healthy = 150, embedding[150].clone()
    good = tuple(token if token != poison else 3 for token in good)
    embedding[poison] = math.nan
    bad = init(1, (4, poison, 9, 10, 11, 12, 13))
    results = step(
        executor,
        Row(0, 0, 12, sample=True),
        Row(1, 0, 7, sample=True),
        init=[init(0, good), bad],
    )
    assert results[0] == clean
    assert results[1].error is not None and "not finite" in results[1].error
    embedding[poison] = healthy
    reused = SlotInit(2, good, 12, GREEDY, 0, bad.block_ids)
    # In pieces, so that masked positions of the bad blocks lie beside what is read.
    step(executor, Row(2, 0, 5, sample=False), init=[reused])
    assert step(executor, Row(2, 5, 7, sample=True))[0].token_id == clean.token_id


def test_start_reports_each_phase(
    models: ModuleType, tmp_path: Path, threads: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Names and seconds in order, by the clock that is handed in; the memory sum is logged."""
    path = models.save(models.tiny("llama"), tmp_path)
    phases: list[tuple[str, float]] = []
    ticks = iter(range(10**6))
    config = EngineConfig(max_num_seqs=2, kv_cache_blocks=50, threads=1)
    caplog.set_level("INFO")
    executor = create_executor(
        path, config, lambda name, seconds: phases.append((name, seconds)), lambda: next(ticks)
    )
    assert [name for name, _ in phases] == ["load", "pack", "kv", "warm-up"]
    assert all(seconds > 0 for _, seconds in phases)
    assert "weights" in caplog.text and "KV cache of 50 blocks of 16 tokens" in caplog.text
    executor.close()
    executor.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_precisions_serve(
    dtype: str, models: ModuleType, tmp_path: Path, threads: None
) -> None:
    """The same plans in 16 bits: finite, and the greedy tokens of a clear-cut model."""
    executor = build(models, tmp_path, dtype=dtype)
    known = prompt(8, 20)
    tokens = [*known, step(executor, Row(0, 0, 20, sample=True), init=[init(0, known)])[0].token_id]
    tokens += decode(executor, 0, 20, 10)
    logits = models.oracle_logits(models.tiny("llama"), tokens)
    for position, token in enumerate(tokens[20:], 19):
        best = logits[position].max()
        assert best - logits[position, token] < 0.05 * logits[position].std()
    assert executor.info.dtype == dtype


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 513}, "max_model_len is 513, the model's limit is 512"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
        ({"kv_cache_blocks": 1}, "kv_cache_blocks is 1"),
    ],
)
def test_settings_out_of_range_are_refused(
    settings: dict[str, object], message: str, models: ModuleType, tmp_path: Path, threads: None
) -> None:
    """With the field, its value and the limit."""
    with pytest.raises(ValueError, match=message):
        build(models, tmp_path, **settings)


def test_a_folder_without_a_model_is_refused(tmp_path: Path, threads: None) -> None:
    """Before anything is allocated."""
    with pytest.raises(WeightError, match=r"no config\.json"):
        create_executor(tmp_path, EngineConfig(threads=1), lambda phase, seconds: None)
