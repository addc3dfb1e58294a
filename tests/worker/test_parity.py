"""The engine's greedy tokens are transformers' on the real model, however they are computed.

transformers runs once over each prompt with our 64 tokens behind it: where its argmax at every
position is our next token, its own greedy generation is ours, by induction.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from shoal.kernels.native import unavailable
from shoal.kernels.paged import CacheShape
from shoal.worker.config import EngineConfig
from shoal.worker.engine import Engine
from shoal.worker.model.backend import TorchBackend
from shoal.worker.model.decoder import Decoder
from shoal.worker.request import EngineRequest, FinishReason, SamplingParams
from shoal.worker.runner import InProcessExecutor, create_executor
from shoal.worker.step import Row, SlotInit, StepPlan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

NEW = 64
# Around the borders of blocks (16), tiles (64) and budgets (16, 100), and up to 900.
LENGTHS = (
    *(1, 2, 3, 5, 8, 13, 15, 16, 17, 20, 25, 31, 32, 33, 40, 47),
    *(48, 63, 64, 65, 80, 99, 100, 127, 128, 129, 170, 255, 300, 400, 600, 900),
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Parity:
    """What all tests here share: one set of weights, the prompts and the tokens to expect."""

    decoder: Decoder
    executor: InProcessExecutor
    prompts: Sequence[Tokens]
    alone: Sequence[Tokens]

    def engine(self, **settings: object) -> Engine:
        config = EngineConfig(**{"max_num_seqs": 32, **settings})
        return Engine(self.executor, config)


@pytest.fixture(scope="module")
def parity(models: ModuleType) -> Iterator[Parity]:
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(11)
    prompts = [
        tuple(torch.randint(100, 49152, (n,), generator=generator).tolist()) for n in LENGTHS
    ]
    decoder = models.load(models.smollm2_path(), "float32")
    executor = torch_executor(decoder, blocks=600)
    alone = []
    for index, prompt in enumerate(prompts):
        engine = Engine(executor, EngineConfig(max_num_seqs=1, enable_prefix_caching=False))
        alone += generate(engine, {f"alone-{index}": prompt}).values()
    yield Parity(decoder, executor, prompts, alone)
    torch.set_num_threads(threads)


def torch_executor(decoder: Decoder, blocks: int) -> InProcessExecutor:
    shape = CacheShape(blocks, 16, decoder.spec.num_kv_heads, decoder.spec.head_dim)
    return InProcessExecutor(
        TorchBackend(decoder, shape, 1024),
        num_blocks=blocks,
        block_size=16,
        max_model_len=1024,
        slots=32,
    )


def generate(engine: Engine, prompts: dict[str, Tokens]) -> dict[str, Tokens]:
    """All prompts at once, to their ends."""
    for name, prompt in prompts.items():
        engine.add(EngineRequest(name, prompt, len(prompt), GREEDY))
    found: dict[str, Tokens] = dict.fromkeys(prompts, ())
    ends = {}
    while engine.has_work:
        for delta in engine.step().deltas:
            found[delta.key.request_id] += delta.token_ids
            ends[delta.key.request_id] = delta.finish
    assert set(ends.values()) == {FinishReason.LENGTH}
    return found


def batched(parity: Parity, engine: Engine) -> list[Tokens]:
    return list(generate(engine, {str(i): p for i, p in enumerate(parity.prompts)}).values())


def test_alone(parity: Parity, models: ModuleType) -> None:
    """32 prompts of 1 to 900 tokens, 64 new each, one at a time: transformers' own."""
    for prompt, tokens in zip(parity.prompts, parity.alone, strict=True):
        assert len(tokens) == NEW
        predicted = last_logits(models.smollm2(), prompt + tokens).argmax(-1)
        assert tuple(predicted.tolist()) == tokens, f"prompt of {len(prompt)} tokens"


@pytest.mark.parametrize("budget", [16, 100, 2048])
def test_mixed_batches_and_chunked_prefill(parity: Parity, budget: int) -> None:
    """All 32 at once under budgets that cut prompts into chunks beside decoding sequences."""
    engine = parity.engine(max_batched_tokens=budget, enable_prefix_caching=False)
    assert batched(parity, engine) == list(parity.alone)


def test_prefix_cache_cold_and_warm(parity: Parity) -> None:
    """The second time the prompts' full blocks come from the cache, and the tokens are equal."""
    engine = parity.engine()
    assert batched(parity, engine) == list(parity.alone)
    hits = engine.stats().prefix_hit_tokens
    assert batched(parity, engine) == list(parity.alone)
    found = engine.stats().prefix_hit_tokens - hits
    assert found == sum((length - 1) // 16 * 16 for length in LENGTHS)


@pytest.mark.parametrize("caching", [True, False])
def test_preemption(parity: Parity, caching: bool) -> None:
    """A pool so small that sequences are preempted and recomputed: equal tokens all the same."""
    executor = torch_executor(parity.decoder, blocks=90)
    engine = Engine(executor, EngineConfig(max_num_seqs=32, enable_prefix_caching=caching))
    assert batched(parity, engine) == list(parity.alone)
    assert engine.stats().preemptions > 0


@dataclass(frozen=True)
class Noise:
    """Sequences to be forced, transformers' float32 logits of their last NEW tokens, and how far
    bfloat16 moves the two likeliest of them against each other in transformers itself."""

    forced: Sequence[Tokens]
    exact: Sequence[torch.Tensor]
    most: float


@pytest.fixture(scope="module")
def noise(parity: Parity, models: ModuleType) -> Noise:
    """On every fourth prompt, the longest included: 512 choices."""
    forced = [p + tokens for p, tokens in zip(parity.prompts, parity.alone, strict=True)][3::4]
    reference = models.smollm2()
    exact = [last_logits(reference, tokens) for tokens in forced]
    low = deepcopy(reference).to(torch.bfloat16)
    most = 0.0
    for tokens, logits in zip(forced, exact, strict=True):
        pair = (last_logits(low, tokens) - logits).gather(1, logits.topk(2).indices)
        most = max(most, float((pair[:, 0] - pair[:, 1]).abs().max()))
    return Noise(forced, exact, most)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_bfloat16_differs_only_within_its_noise(
    noise: Noise, models: ModuleType, backend: str
) -> None:
    """Teacher-forced through our decode steps in bfloat16: where our choice is not transformers'
    in float32, the two logits are nearer than bfloat16 shifts logits in transformers itself."""
    executor = bfloat16_executor(models, backend)
    ours = forced_choices(executor, noise.forced)
    executor.close()
    agreed = 0
    for logits, choices in zip(noise.exact, ours, strict=True):
        gap = logits.max(-1).values - logits.gather(1, choices[:, None]).squeeze(1)
        assert float(gap.max()) <= noise.most
        agreed += int((gap == 0).sum())
    assert agreed >= 0.97 * NEW * len(noise.forced)


def test_int8_keeps_nearly_every_choice(noise: Noise, models: ModuleType) -> None:
    """Load-time int8 weights change at most one in thirty of transformers' float32 choices."""
    executor = bfloat16_executor(models, "native", quantization="int8")
    ours = forced_choices(executor, noise.forced)
    executor.close()
    agreed = sum(
        int((choices == logits.argmax(-1)).sum())
        for logits, choices in zip(noise.exact, ours, strict=True)
    )
    assert agreed >= 29 / 30 * NEW * len(noise.forced)


def test_step_programs_do_not_depend_on_what_runs_beside(
    parity: Parity, models: ModuleType
) -> None:
    """The native backend's tokens in bfloat16 are the same alone, in mixed batches, in chunks, and
    with cached prefixes: a row's sums are made in one order, whatever is computed beside it."""
    executor = bfloat16_executor(models, "native")
    prompts = {str(index): prompt for index, prompt in enumerate(parity.prompts[::3])}
    alone: dict[str, Tokens] = {}
    for name, prompt in prompts.items():
        engine = Engine(executor, EngineConfig(max_num_seqs=1, enable_prefix_caching=False))
        alone |= generate(engine, {name: prompt})
    for budget in (16, 100, 2048):
        engine = Engine(executor, EngineConfig(max_num_seqs=32, max_batched_tokens=budget))
        assert generate(engine, prompts) == alone
        assert generate(engine, prompts) == alone  # with a warm prefix cache
    executor.close()


def bfloat16_executor(
    models: ModuleType, backend: str, quantization: str = "auto"
) -> InProcessExecutor:
    if backend == "native" and (why := unavailable()) is not None:
        pytest.skip(why)
    threads = torch.get_num_threads()
    config = EngineConfig(
        dtype="bfloat16",
        backend=backend,
        quantization=quantization,
        kv_cache_blocks=600,
        max_num_seqs=32,
        threads=threads,
    )
    return create_executor(models.smollm2_path(), config, lambda phase, seconds: None)


@torch.inference_mode()
def last_logits(model: torch.nn.Module, tokens: Tokens) -> torch.Tensor:
    """transformers' logits [NEW, vocab] float32 that predict the last NEW tokens."""
    logits: torch.Tensor = model(torch.tensor([tokens[:-1]]), logits_to_keep=NEW).logits[0]
    return logits.float()


def forced_choices(executor: InProcessExecutor, forced: Sequence[Tokens]) -> list[torch.Tensor]:
    """Our likeliest token [NEW] before each of the last NEW of every sequence, all side by side:
    prompts as chunks, then one decode step a token."""
    watched = SamplingParams(temperature=0.0, prompt_logprobs=1)
    tables, next_block = [], 1
    for tokens in forced:
        tables.append(tuple(range(next_block, next_block + -(-len(tokens) // 16))))
        next_block += len(tables[-1])

    def enter(params: SamplingParams) -> tuple[SlotInit, ...]:
        return tuple(
            SlotInit(slot, tokens, len(tokens), params, 0, blocks)
            for slot, (tokens, blocks) in enumerate(zip(forced, tables, strict=True))
        )

    # Logprobs are wanted from the prompts' last tokens on, which have a step of their own.
    chunks = [Row(slot, 0, len(tokens) - NEW - 1, False) for slot, tokens in enumerate(forced)]
    executor.execute(StepPlan(0, enter(GREEDY), (), tuple(row for row in chunks if row.count)))
    choices: list[list[int]] = [[] for _ in forced]
    for step in range(NEW):
        rows = tuple(
            Row(slot, len(tokens) - NEW - 1 + step, 1, sample=False)
            for slot, tokens in enumerate(forced)
        )
        plan = StepPlan(step, enter(watched) if step == 0 else (), (), rows)
        for part in executor.execute(plan).prompt_logprobs:
            choices[part.slot].append(part.entries[0].token_ids[1])
    return [torch.tensor(chosen) for chosen in choices]
