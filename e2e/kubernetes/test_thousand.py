"""A thousand services on fake nodes: all are reconciled, and at rest nothing is written.

How fast and how small is printed beside its goal, and judged by people: machines are shared.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import httpx
import psutil
import pytest

from e2e.cluster import kwok, platform, services
from e2e.cluster.command import Say, wait_for
from e2e.cluster.kube import Kube, Object, condition
from e2e.cluster.layout import ClusterError
from e2e.cluster.platform import Platform, metrics_of
from e2e.cluster.report import Report
from e2e.cluster.testbed import Testbed, create_service

COUNT = 1000
NODES = 10
TABLE = f"{COUNT} services on {NODES} fake nodes"
QUIET_SECONDS = 60
SERVICES = "/apis/serving.shoal.dev/v1alpha1/namespaces/{namespace}/inferenceservices"
PODS = "/api/v1/namespaces/{namespace}/pods"
WRITES = ("POST", "PUT", "PATCH", "DELETE", "APPLY")


@dataclass
class Crowd:
    bed: Testbed
    shoal: Platform
    namespace: str
    report: Report
    api: httpx.Client

    @property
    def kube(self) -> Kube:
        return self.bed.kube

    def listed(self, path: str, **parameters: str) -> list[Object]:
        """Objects of the namespace, from the API server's cache: kubectl would take seconds."""
        where = path.format(namespace=self.namespace)
        answer = self.api.get(where, params={"resourceVersion": "0", **parameters})
        items: list[Object] = answer.raise_for_status().json()["items"]
        return items

    def reconciled(self) -> list[Object]:
        """Services whose pod exists and whose status says so for their present spec."""
        return [
            one
            for one in self.listed(SERVICES)
            if one.get("status", {}).get("observedGeneration") == one["metadata"]["generation"]
            and one["status"].get("replicas") == one["spec"].get("replicas", 1)
            and condition(one, "Progressing")
        ]

    def operator(self) -> psutil.Process:
        """The leading operator's process."""
        assert self.bed.layout is not None
        return psutil.Process(self.bed.pid_in_pod(self.shoal.leader(), "shoal.operator"))

    def writes(self) -> float:
        """Writing requests that the API server has served to things the operator writes; what
        kubelets and controllers write is the status of these, and not counted."""
        return sum(
            metrics_of(
                self.api.get("/metrics").text,
                lambda line: (
                    line.startswith("apiserver_request_total{")
                    and any(f'verb="{verb}"' in line for verb in WRITES)
                    and any(f'resource="{it}"' in line for it in _WRITTEN)
                ),
            ).values()
        )

    def row(self, what: str, value: str, goal: str) -> None:
        self.report.head(TABLE, "what", "measured", "goal")
        self.report.row(TABLE, what, value, goal)


_WRITTEN = (
    *("inferenceservices", "pods", "services", "configmaps", "controllerrevisions"),
    *("poddisruptionbudgets", "secrets", "podmonitors"),
)


@pytest.fixture(scope="module")
def crowd(
    cluster: Testbed, shoal: Platform, report: Report, say: Say, api: httpx.Client
) -> Iterator[Crowd]:
    if cluster.layout is None:
        pytest.skip("fake nodes need kwok, which runs on our own node alone")
    kube = cluster.kube
    namespace = cluster.make_namespace("thousand")
    nodes = list(kwok.nodes(NODES))
    kube.apply(namespace, *nodes)
    wait_for(
        "the fake nodes",
        60,
        lambda: (
            sum(
                condition(one, "Ready").get("status") == "True"
                for one in kube.list("nodes", selector="type=kwok")
            )
            == NODES
        ),
    )
    say(f"{NODES} fake nodes")
    # There are no engines on fake nodes, and what routers spend on looking for them is not asked.
    routers = ("scale", "deployment/shoal-router", "-n", platform.NAMESPACE)
    kube.kubectl(*routers, "--replicas=0")
    yield Crowd(cluster, shoal, namespace, report, api)
    kube.kubectl("delete", "infs", "--all", "-n", namespace, "--wait=false", seconds=300)
    kube.kubectl("delete", "namespace", namespace, "--wait=true", seconds=400)
    kube.kubectl("delete", "nodes", "-l", "type=kwok")
    kube.kubectl(*routers, "--replicas=2")
    kube.kubectl("rollout", "status", "-n", platform.NAMESPACE, routers[1], "--timeout=60s")


def test_a_thousand_services_are_reconciled(crowd: Crowd) -> None:
    """All have their pod and a status of their present spec."""
    objects = [services.fake_service(f"s{index:04}", kwok.placement()) for index in range(COUNT)]
    before = crowd.operator().cpu_times()
    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        for response in pool.map(partial(create_service, crowd.api, crowd.namespace), objects):
            assert response.status_code == 201, response.text
    created = time.monotonic()
    wait_for("all to be reconciled", 180, lambda: len(crowd.reconciled()) == COUNT, every=0.5)
    done = time.monotonic()
    process = crowd.operator()
    after, memory = process.cpu_times(), process.memory_info().rss / 2**20
    spent = after.user + after.system - before.user - before.system
    crowd.row("creating them (the test's own requests)", f"{created - started:.1f} s", "")
    crowd.row("all reconciled, from the first's creation", f"{done - started:.1f} s", "")
    crowd.row("all reconciled, from the last's creation", f"{done - created:.1f} s", "30 s")
    crowd.row("operator: CPU", f"{spent:.1f} s", "")
    crowd.row("operator: resident memory", f"{memory:.0f} MiB", "150 MiB")


def test_a_quiet_minute_has_no_writes(crowd: Crowd) -> None:
    """Once all is reconciled, the API server sees no write to anything the operator owns."""
    wait_for("quiet", 180, lambda: _still(crowd), every=1)
    before, cpu = crowd.writes(), crowd.operator().cpu_times()
    time.sleep(QUIET_SECONDS)
    after, later = crowd.writes(), crowd.operator().cpu_times()
    crowd.row(f"writes in {QUIET_SECONDS} quiet seconds", f"{after - before:.0f}", "0")
    spent = later.user + later.system - cpu.user - cpu.system
    crowd.row("operator: CPU in them", f"{spent:.2f} s", "")
    assert after == before


def test_one_change_is_acted_on_at_once(crowd: Crowd) -> None:
    """spec.replicas of one service among a thousand: each pod more comes."""
    name = "s0500"
    waits = [_scaled(crowd, name, replicas) for replicas in (2, 3, 4)]
    crowd.row("one change acted on", " ".join(f"{one:.2f}" for one in waits) + " s", "1 s")


def test_a_cold_restart_writes_nothing(crowd: Crowd) -> None:
    """Both operators killed with everything in place: the next leader looks at all of it."""
    wait_for("quiet", 180, lambda: _still(crowd), every=1)
    before = crowd.writes()
    pods = crowd.kube.list("pods", platform.NAMESPACE, platform.OPERATOR)
    for pod in pods:
        crowd.bed.kill_in_pod(pod, "shoal.operator")
    killed = time.monotonic()
    wait_for("all to be looked at again", 60, lambda: _has_seen_all(crowd), every=0.2)
    took = time.monotonic() - killed
    time.sleep(5)
    after = crowd.writes()
    crowd.row("cold restart to all reconciled", f"{took:.1f} s", "10 s")
    crowd.row("writes of the cold restart", f"{after - before:.0f}", "0")
    assert after == before


def _still(crowd: Crowd) -> bool:
    """No write for two seconds, and nothing that waits to be looked at."""
    before = crowd.writes()
    time.sleep(2)
    idle = crowd.shoal.metrics(crowd.shoal.leader()).get("shoal_work_queue_depth") == 0
    return idle and crowd.writes() == before


def _scaled(crowd: Crowd, name: str, replicas: int) -> float:
    """Seconds from a change of spec.replicas to that many pods."""
    crowd.kube.patch("infs", name, crowd.namespace, {"spec": {"replicas": replicas}})
    changed = time.monotonic()
    wait_for("the change", 30, lambda: _pods(crowd, name) == replicas, every=0.02)
    return time.monotonic() - changed


def _pods(crowd: Crowd, name: str) -> int:
    found = crowd.listed(PODS, labelSelector=f"serving.shoal.dev/service={name}")
    return sum("deletionTimestamp" not in pod["metadata"] for pod in found)


def _has_seen_all(crowd: Crowd) -> bool:
    """Whether a new operator leads and has looked at every service."""
    for pod in crowd.kube.list("pods", platform.NAMESPACE, platform.OPERATOR):
        try:
            figures = crowd.shoal.metrics(pod)
        except ClusterError:
            continue  # it is starting
        looked = figures.get("shoal_reconcile_seconds_count", 0) >= COUNT
        if figures.get("shoal_leader") == 1 and looked:
            return figures.get("shoal_work_queue_depth") == 0
    return False
