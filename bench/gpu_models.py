"""Whole models of random weights through the engine's own executor: decode steps, prefills, and a
thousand requests."""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from bench import roofline
from bench.gpu_cases import OURS, Figure, failed
from bench.roofline import Limits, ModelShape
from shoal.kernels.measure import Times
from shoal.worker.config import EngineConfig
from shoal.worker.engine import Engine
from shoal.worker.gpu.create import executor_of
from shoal.worker.gpu.device import Device
from shoal.worker.gpu.executor import GpuExecutor
from shoal.worker.model.hugging_face import spec_from_hugging_face
from shoal.worker.model.precision import Precision
from shoal.worker.model.reader import Checkpoint
from shoal.worker.model.spec import DecoderSpec
from shoal.worker.model.weight_map import expected_shapes
from shoal.worker.request import EngineRequest, FinishReason, SamplingParams
from shoal.worker.step import Row, SlotInit, StepPlan, StepResult

_GREEDY = SamplingParams(temperature=0.0)
_CONFIGS = {True: "Qwen3ForCausalLM", False: "LlamaForCausalLM"}  # by whether embeddings are tied


class RandomSource:
    """Weights of a decoder's shapes, made where they are needed. Implements `WeightSource`."""

    origin = "random weights"
    bytes_read = 0

    def __init__(self, spec: DecoderSpec, precision: Precision, device: torch.device) -> None:
        self._shapes = expected_shapes(spec)
        self._dtype = precision.weights
        self._device = device

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> Tensor:
        """Vectors are norms' weights, which are ones; matrices keep what goes through them of
        about its size."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        made = torch.randn(shape, dtype=self._dtype, device=self._device)
        return made.mul_(shape[1] ** -0.5)

    def read_runs(self, name: str, dim: int, runs: Sequence[tuple[int, int]]) -> Tensor:
        whole = self.read(name)
        return torch.cat([whole.narrow(dim, first, end - first) for first, end in runs], dim)


def spec_of(shape: ModelShape, longest: int) -> DecoderSpec:
    """The decoder of that shape, as its family's configuration would say it."""
    return spec_from_hugging_face(
        {
            "architectures": [_CONFIGS[shape.tied]],
            "hidden_size": shape.hidden,
            "intermediate_size": shape.inner,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "vocab_size": shape.vocab,
            "max_position_embeddings": longest,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": shape.tied,
        }
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run of one model."""

    shape: ModelShape
    config: EngineConfig
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    steps: int  # decode steps of one measurement
    requests: int
    asked: int  # prompt tokens of a request
    answered: int


@dataclass(frozen=True, slots=True)
class Bench:
    """One model on a device, and what its figures are measured against."""

    plan: Plan
    executor: GpuExecutor
    limits: Limits
    clock: Callable[[], float] = time.perf_counter
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def decode(self, batch: int, context: int) -> Figure:
        """A step, host and device together, as the engine drives it: one step ahead."""
        shape, steps = self.plan.shape, self.plan.steps
        needed = batch * self._blocks(context + 2 * steps + 2)
        case = f"{shape.name}, batch {batch}, context {context}"
        if needed > self.executor.num_blocks - 1:
            have = (self.executor.num_blocks - 1) * self.executor.block_size
            note = f"the KV cache holds {have} tokens"
            return Figure("decode step", case, OURS, None, None, None, None, "", note)
        self._run([self._enter(batch, context, 2 * steps + 2, 1)])
        rows = [range(context + turn * steps, context + (turn + 1) * steps) for turn in range(2)]
        warm, timed = ([self._step(batch, at) for at in positions] for positions in rows)
        self._run(warm)
        seconds = self._run(timed)
        middle = context + steps + steps // 2
        work = roofline.decode_step(shape, batch, middle)
        return self._figure("decode step", case, Times.of(seconds), work)

    def prefill(self, tokens: int) -> Figure:
        """One prompt in one step, until its first token is at hand."""
        plan = self._enter(1, tokens, 1, tokens)
        self._run([plan])
        seconds = [self._run([plan])[0] for _ in range(3)]
        case = f"{self.plan.shape.name}, {tokens} tokens"
        work = roofline.prefill(self.plan.shape, tokens)
        return self._figure("prefill", case, Times.of(seconds), work)

    def serve(self, deadline: float) -> Figure:
        """All requests at once through the engine; seconds of the whole."""
        plan, shape = self.plan, self.plan.shape
        engine = Engine(self.executor, plan.config, rng=random.Random(0))
        sampling = SamplingParams(temperature=0.0, max_tokens=plan.answered, ignore_eos=True)
        for number in range(plan.requests):
            ids = tuple(self.rng.randrange(shape.vocab) for _ in range(plan.asked))
            engine.add(EngineRequest(str(number), ids, plan.asked, sampling))
        begun = self.clock()
        done = tokens = 0
        while engine.has_work and self.clock() < deadline:
            for delta in engine.step().deltas:
                if delta.finish is FinishReason.ERROR:
                    raise RuntimeError(f"request {delta.key.request_id}: {delta.error}")
                tokens += len(delta.token_ids)
                done += delta.finish is not None
        seconds = self.clock() - begun
        if engine.has_work:
            for number in range(plan.requests):
                engine.cancel(str(number))
            while engine.has_work:
                engine.step()
        case = f"{shape.name}, {plan.requests} requests, {plan.asked} in and {plan.answered} out"
        note = (
            f"{done} done, {tokens / seconds:,.0f} tokens a second, {done / seconds:.2f} requests"
        )
        return Figure("serving", case, OURS, seconds, seconds, seconds, None, "", note)

    def _figure(self, table: str, case: str, times: Times, work: roofline.Work) -> Figure:
        return Figure(
            table,
            case,
            OURS,
            times.median,
            times.least,
            times.most,
            self.limits.share(work, times.median),
            self.limits.bound(work),
        )

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.executor.block_size)

    def _enter(self, batch: int, context: int, spare: int, computed: int) -> StepPlan:
        """Sequences of `context` tokens with blocks for `spare` more; the last `computed` tokens
        of each run. What lies before them in the cache is whatever was there: its time is the
        same."""
        per = self._blocks(context + spare)
        ids = tuple(self.rng.randrange(self.plan.shape.vocab) for _ in range(context))
        init = tuple(
            SlotInit(
                slot, ids, context, _GREEDY, 0, tuple(range(1 + slot * per, 1 + (slot + 1) * per))
            )
            for slot in range(batch)
        )
        rows = tuple(Row(slot, context - computed, computed, True) for slot in range(batch))
        return StepPlan(0, init, (), rows)

    def _step(self, batch: int, position: int) -> StepPlan:
        return StepPlan(0, (), (), tuple(Row(slot, position, 1, True) for slot in range(batch)))

    def _run(self, plans: Sequence[StepPlan]) -> list[float]:
        """Seconds between one step's tokens and the next's, the device kept busy."""
        seconds, begun = [], self.clock()
        waiting = 0
        for plan in plans:
            self.executor.submit(plan)
            waiting += 1
            if waiting == self.executor.depth:
                begun = self._collect(seconds, begun)
                waiting -= 1
        for _ in range(waiting):
            begun = self._collect(seconds, begun)
        return seconds

    def _collect(self, seconds: list[float], begun: float) -> float:
        _check(self.executor.collect())
        now = self.clock()
        seconds.append(now - begun)
        return now


def _check(result: StepResult) -> None:
    """Raises RuntimeError where a row drew no token: its time would be of something else."""
    for sampled in result.sampled:
        if sampled.error is not None:
            raise RuntimeError(f"slot {sampled.slot}: {sampled.error}")


def load(
    plan: Plan,
    device: Device,
    precision: Precision,
    limits: Limits,
    clock: Callable[[], float] = time.perf_counter,
) -> Bench:
    longest = plan.config.max_model_len
    assert longest is not None, "a plan says how long sequences get"
    spec = spec_of(plan.shape, longest)
    source = RandomSource(spec, precision, device.home)
    executor = executor_of(
        Checkpoint(spec, source),
        plan.config,
        precision,
        device,
        longest,
        lambda phase, seconds: None,
        clock,
    )
    return Bench(plan, executor, limits, clock)


def run(bench: Bench, deadline: float, out_of_time: Callable[[str], None]) -> Iterator[Figure]:
    """Everything of the plan until the deadline; `out_of_time` hears what was left out."""
    plan = bench.plan
    jobs: list[tuple[str, Callable[[], Figure]]] = [
        (f"prefill of {tokens}", partial(bench.prefill, tokens)) for tokens in plan.prompts
    ]
    jobs += [
        (f"batch {batch}, context {context}", partial(bench.decode, batch, context))
        for context in plan.contexts
        for batch in plan.batches
    ]
    jobs.append((f"{plan.requests} requests", partial(bench.serve, deadline)))
    for name, job in jobs:
        if bench.clock() > deadline:
            out_of_time(f"{plan.shape.name}: {name}")
            continue
        try:
            yield job()
        except Exception as error:
            yield failed("model", f"{plan.shape.name}: {name}", OURS, error)
