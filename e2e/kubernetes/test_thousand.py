"""A thousand services on fake nodes: all are reconciled, and at rest nothing is written.

How fast and how small is printed beside its goal, and judged by people: machines are shared.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import psutil
import pytest

from e2e.cluster import kwok, platform, services
from e2e.cluster.bare import make_all
from e2e.cluster.command import Say, wait_for
from e2e.cluster.direct import DirectApi, open_direct
from e2e.cluster.kube import Object, condition
from e2e.cluster.layout import ClusterError
from e2e.cluster.platform import Platform, metrics_of
from e2e.cluster.processes import Processes
from e2e.cluster.report import Report
from e2e.cluster.testbed import Testbed

COUNT: Final = 1000
AT_ONCE: Final = 16  # requests of the test's own
NODES: Final = 10
TABLE: Final = f"{COUNT} services on {NODES} fake nodes"
QUIET_SECONDS: Final = 60
GROUP: Final = "/apis/serving.shoal.dev/v1alpha1/namespaces/{}/inferenceservices"
# What each service has, and a headless name, when it is reconciled.
CHILDREN: Final = (
    "/api/v1/namespaces/{}/pods",
    "/api/v1/namespaces/{}/services",
    "/api/v1/namespaces/{}/configmaps",
    "/apis/apps/v1/namespaces/{}/controllerrevisions",
)
ROOT_CERTIFICATE: Final = 1  # the ConfigMap that the cluster puts into every namespace
_T = TypeVar("_T")
_CONTROL_PLANE: Final = (
    *("kube-apiserver", "etcd", "kube-controller-manager", "kube-scheduler", "kwok"),
)
_IDLE: Final = "idle"  # of the machine
_EVERYTHING: Final = "all programs"
WRITES: Final = ("POST", "PUT", "PATCH", "DELETE", "APPLY")
# What the operator writes, events left out: kubelets write them too.
_WRITTEN: Final = (
    *("inferenceservices", "pods", "services", "configmaps", "controllerrevisions"),
    *("poddisruptionbudgets", "secrets", "podmonitors", "horizontalpodautoscalers"),
)


@dataclass
class Crowd:
    bed: Testbed
    shoal: Platform
    namespace: str
    report: Report

    def run(self, work: Callable[[DirectApi], Awaitable[_T]]) -> _T:
        async def main() -> _T:
            async with open_direct(self.bed.kube.kubeconfig) as api:
                return await work(api)

        return asyncio.run(main())

    def operators(self) -> list[psutil.Process]:
        """Every operator's process, the leader's first."""
        leader = self.shoal.leader()["metadata"]["name"]
        pods = sorted(self.shoal.operators(), key=lambda pod: pod["metadata"]["name"] != leader)
        return [psutil.Process(self.bed.pid_in_pod(pod, "shoal.operator")) for pod in pods]

    def operator_names(self) -> list[str]:
        return [pod["metadata"]["name"] for pod in self.shoal.operators()]

    def processes(self) -> dict[str, float]:
        """As `control_plane`, and of the operators."""
        operators = zip(("leader", "standby"), self.operators(), strict=False)
        return self.control_plane() | {name: _seconds(process) for name, process in operators}

    def control_plane(self) -> dict[str, float]:
        """Seconds of processor time so far, of what any cluster runs, and of all programs here."""
        assert self.bed.layout is not None
        records = Processes(self.bed.layout)
        found = {name: _seconds(psutil.Process(records.pid(name))) for name in _CONTROL_PLANE}
        times = psutil.cpu_times()
        used = times.user + times.nice + times.system + times.irq + times.softirq
        return {**found, _IDLE: times.idle + times.iowait, _EVERYTHING: used}

    def memory(self) -> float:
        """MiB that the leading operator has resident."""
        return float(self.operators()[0].memory_info().rss / 2**20)

    def row(self, what: str, value: str, goal: str = "") -> None:
        self.report.head(TABLE, "what", "measured", "goal")
        self.report.row(TABLE, what, value, goal)


@pytest.fixture(scope="module")
def crowd(cluster: Testbed, shoal: Platform, report: Report, say: Say) -> Iterator[Crowd]:
    if cluster.layout is None:
        pytest.skip("fake nodes need kwok, which runs on our own node alone")
    kube = cluster.kube
    namespace = cluster.make_namespace("thousand")
    kube.apply(namespace, *kwok.nodes(NODES))
    wait_for("the fake nodes", 60, lambda: _ready_nodes(kube.list("nodes", selector="type=kwok")))
    say(f"{NODES} fake nodes")
    # There are no engines on fake nodes, and what routers spend on looking for them is not asked.
    routers = ("scale", "deployment/shoal-router", "-n", platform.NAMESPACE)
    kube.kubectl(*routers, "--replicas=0")
    yield Crowd(cluster, shoal, namespace, report)
    kube.kubectl("delete", "infs", "--all", "-n", namespace, "--wait=false", seconds=300)
    kube.kubectl("delete", "namespace", namespace, "--wait=true", seconds=400)
    kube.kubectl("delete", "nodes", "-l", "type=kwok")
    kube.kubectl(*routers, "--replicas=2")
    kube.kubectl("rollout", "status", "-n", platform.NAMESPACE, routers[1], "--timeout=60s")


def test_a_thousand_services_are_reconciled(crowd: Crowd) -> None:
    """All have what belongs to them and a status of their present spec."""
    before, asked = crowd.processes(), crowd.run(_asked)
    created, done = crowd.run(lambda api: _create_all(api, crowd.namespace))
    spent = _difference(before, crowd.processes())
    writes = (crowd.run(_asked) - asked) / COUNT
    crowd.row("all created (the test's own requests)", f"{created:.1f} s")
    crowd.row("all reconciled, from the first's creation", f"{done:.1f} s", "30 s")
    crowd.row("processor time until then", spent)
    crowd.row("writing requests a service, of everybody", f"{writes:.1f}")
    crowd.row("operator: resident memory", f"{crowd.memory():.0f} MiB", "150 MiB")


def test_a_quiet_minute_has_no_writes(crowd: Crowd) -> None:
    """Once all is reconciled, the API server sees no write to anything the operator owns."""
    crowd.run(_still)
    names = crowd.operator_names()
    before, own = crowd.run(_writes), crowd.run(partial(_own_writes, operators=names))
    cpu = crowd.processes()
    time.sleep(QUIET_SECONDS)
    after, own_after = crowd.run(_writes), crowd.run(partial(_own_writes, operators=names))
    later = crowd.processes()
    crowd.row(f"writes in {QUIET_SECONDS} quiet seconds", f"{after - before:.0f}", "0")
    crowd.row("of them by operators, events included", f"{own_after - own:.0f}", "0")
    crowd.row("operator: processor time in them", f"{later['leader'] - cpu['leader']:.2f} s")
    crowd.row("operator: resident memory after them", f"{crowd.memory():.0f} MiB", "150 MiB")
    assert (after, own_after) == (before, own)


def test_one_change_is_acted_on_at_once(crowd: Crowd) -> None:
    """spec.replicas of one service among a thousand: each pod more comes."""
    numbers = (2, 3, 4)
    scale = partial(_scaled, namespace=crowd.namespace)
    waits = [crowd.run(partial(scale, replicas=number)) for number in numbers]
    crowd.row("one change acted on", " ".join(f"{one:.2f}" for one in waits) + " s", "1 s")


def test_a_cold_restart_writes_nothing(crowd: Crowd) -> None:
    """All operators killed with everything in place: the next leader looks at all of it."""
    crowd.run(_still)
    before = crowd.run(_writes)
    names = crowd.operator_names()
    for process in crowd.operators():
        process.kill()
    killed = time.monotonic()
    crowd.run(partial(_have_seen_all, operators=names))
    took = time.monotonic() - killed
    time.sleep(5)
    after, own = crowd.run(_writes), crowd.run(partial(_own_writes, operators=names))
    crowd.row("cold restart to all looked at", f"{took:.1f} s", "10 s")
    crowd.row("writes of the cold restart", f"{after - before:.0f}", "0")
    crowd.row("of them by operators, events included", f"{own:.0f}", "0")
    crowd.row("operator: resident memory after it", f"{crowd.memory():.0f} MiB", "150 MiB")
    assert (after, own) == (before, 0.0)


def test_the_same_objects_without_an_operator(crowd: Crowd) -> None:
    """What is left where nobody decides: the API server's time, and that of the controllers."""
    kube = crowd.bed.kube
    operators = ("scale", "deployment/shoal-operator", "-n", platform.NAMESPACE)
    namespace = crowd.bed.make_namespace("bare")
    kube.kubectl(*operators, "--replicas=0")
    try:
        wait_for("the operators' end", 60, lambda: not crowd.shoal.operators())
        before, asked = crowd.control_plane(), crowd.run(_asked)
        took = crowd.run(partial(make_all, namespace=namespace, count=COUNT, at_once=AT_ONCE))
        spent = _difference(before, crowd.control_plane())
        writes = (crowd.run(_asked) - asked) / COUNT
        crowd.row("the same objects made by a loop, no operator", f"{took:.1f} s")
        crowd.row("the loop: processor time", spent)
        crowd.row("the loop: writing requests a service", f"{writes:.1f}")
        kube.kubectl("delete", "infs", "--all", "-n", namespace, "--wait=false", seconds=300)
        kube.kubectl("delete", "namespace", namespace, "--wait=true", seconds=400)
    finally:
        kube.kubectl(*operators, "--replicas=2")


def _seconds(process: psutil.Process) -> float:
    return float(sum(process.cpu_times()[:2]))


def _difference(before: dict[str, float], after: dict[str, float]) -> str:
    return ", ".join(f"{name} {after[name] - before[name]:.1f} s" for name in after)


def _ready_nodes(nodes: list[Object]) -> bool:
    return [condition(one, "Ready").get("status") for one in nodes].count("True") == NODES


async def _create_all(api: DirectApi, namespace: str) -> tuple[float, float]:
    """Seconds from the first creation to the last, and to all being reconciled."""
    path = GROUP.format(namespace)
    waiting = {f"s{index:04}" for index in range(COUNT)}
    room = asyncio.Semaphore(AT_ONCE)

    async def create(name: str) -> None:
        async with room:
            await api.create(path, services.fake_service(name, kwok.placement()))

    async def follow() -> None:
        async for _, live in api.watch(path, resourceVersion="0"):
            if _reconciled(live):
                waiting.discard(live["metadata"]["name"])
            if not waiting:
                return

    async with asyncio.timeout(300), asyncio.TaskGroup() as tasks:
        following = tasks.create_task(follow())
        started = time.monotonic()
        await asyncio.gather(*map(create, sorted(waiting)))
        created = time.monotonic() - started
        await following
        for children in CHILDREN:
            await _counted(api, children.format(namespace))
    return created, time.monotonic() - started


async def _counted(api: DirectApi, path: str) -> None:
    """Waits until each service has its object of this kind."""
    expected = COUNT + (ROOT_CERTIFICATE if path.endswith("configmaps") else 0)
    while True:
        if await api.count(path) >= expected:
            return
        await asyncio.sleep(0.1)


def _reconciled(live: Object) -> bool:
    """Whether the status is of the present spec and counts the pods that it asks for."""
    status = live.get("status", {})
    return (
        status.get("observedGeneration") == live["metadata"]["generation"]
        and status.get("replicas") == live["spec"].get("replicas", 1)
        and bool(condition(live, "Progressing"))
    )


async def _writes(api: DirectApi) -> float:
    """Writing requests that the API server has served to things the operator writes; the status
    of pods is the kubelets'."""

    def counts(line: str) -> bool:
        return (
            line.startswith("apiserver_request_total{")
            and ('subresource=""' in line or 'resource="inferenceservices"' in line)
            and any(f'verb="{verb}"' in line for verb in WRITES)
            and any(f'resource="{it}"' in line for it in _WRITTEN)
        )

    return sum(metrics_of(await api.text("/metrics"), counts).values())


async def _asked(api: DirectApi) -> float:
    """Writing requests that the API server has served, leases left out."""

    def counts(line: str) -> bool:
        return (
            line.startswith("apiserver_request_total{")
            and any(f'verb="{verb}"' in line for verb in WRITES)
            and 'resource="leases"' not in line
        )

    return sum(metrics_of(await api.text("/metrics"), counts).values())


async def _own_writes(api: DirectApi, operators: list[str]) -> float:
    """Writing requests that these operators have sent, leases left out."""

    def writes(line: str) -> bool:
        # Leases alone are put.
        reads = 'verb="GET"' in line or 'verb="PUT"' in line
        return line.startswith("shoal_api_requests_total{") and not reads

    texts = [await api.text(_metrics(name)) for name in operators]
    return sum(sum(metrics_of(text, writes).values()) for text in texts)


async def _still(api: DirectApi) -> None:
    """Waits until there was no write for three seconds."""
    async with asyncio.timeout(180):
        before, now = -1.0, await _writes(api)
        while now != before:
            await asyncio.sleep(3)
            before, now = now, await _writes(api)


async def _scaled(api: DirectApi, namespace: str, replicas: int) -> float:
    """Seconds from asking for another spec.replicas to that many pods."""
    name = f"s{COUNT // 2:04}"
    pods = CHILDREN[0].format(namespace)
    selected = {"labelSelector": f"serving.shoal.dev/service={name}", "resourceVersion": "0"}
    there: set[str] = set()
    async with asyncio.timeout(30):
        async with aclosing(api.watch(pods, **selected)) as stream:
            while len(there) < replicas - 1:
                _, live = await anext(stream)
                there.add(live["metadata"]["name"])
            asked = time.monotonic()
            await api.merge(f"{GROUP.format(namespace)}/{name}", {"spec": {"replicas": replicas}})
            while len(there) < replicas:
                _, live = await anext(stream)
                there.add(live["metadata"]["name"])
            return time.monotonic() - asked


async def _have_seen_all(api: DirectApi, operators: list[str]) -> None:
    """Waits until one of these pods leads and has looked at every service."""
    async with asyncio.timeout(60):
        while True:
            for name in operators:
                try:
                    figures = metrics_of(await api.text(_metrics(name)))
                except ClusterError:
                    continue  # it is starting
                looked = figures.get("shoal_reconcile_seconds_count", 0) >= COUNT
                idle = figures.get("shoal_work_queue_depth") == 0
                if figures.get("shoal_leader") == 1 and looked and idle:
                    return
            await asyncio.sleep(0.1)


def _metrics(operator: str) -> str:
    return f"/api/v1/namespaces/{platform.NAMESPACE}/pods/{operator}:9090/proxy/metrics"
