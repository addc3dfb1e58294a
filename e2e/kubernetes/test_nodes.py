"""A node goes silent, comes back, and dies: what serves goes on, and what is lost is replaced."""

import time
from collections.abc import Iterable, Iterator

import pytest

from e2e.cluster import host, platform, services
from e2e.cluster.command import Say, wait_for
from e2e.cluster.kube import Kube, Object, condition
from e2e.cluster.layout import SECOND, Layout
from e2e.cluster.load import Load, Window, undisturbed
from e2e.cluster.platform import Platform
from e2e.cluster.report import Report
from e2e.cluster.testbed import Testbed

STREAMS = 16
NAME = "spread"
TABLE = f"A node is lost under {STREAMS} streams (two float32 replicas, one on each of two nodes)"
# Kubernetes itself waits 50 s before it calls a node silent.
SILENT_SECONDS = 120


@pytest.fixture
def node(cluster: Testbed, say: Say) -> Iterator[Layout]:
    """A second node beside the cluster's own."""
    if cluster.layout is None:
        pytest.skip("this ends a node, and the cluster is not ours")
    host.add(cluster.layout, say)
    yield cluster.layout
    host.remove(cluster.layout)


def test_a_lost_node(
    cluster: Testbed, shoal: Platform, node: Layout, namespace: str, report: Report, say: Say
) -> None:
    """While it is only silent, its replica goes on serving and keeps its pod; when it loses its
    power, its streams move, the conditions and an event name pod and node, and another node gets
    a pod in its place. Nothing fails, nothing is altered, nobody has to ask again."""
    kube = cluster.kube
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {"serving.shoal.dev/service": NAME}},
    }
    overlay = {"spec": {"topologySpreadConstraints": [spread]}}
    kube.apply(namespace, services.service(NAME, replicas=2, podOverlay=overlay))
    wait_for("two replicas", 240, lambda: services.settled(kube, namespace, NAME, 2), every=0.5)
    pods = {pod["spec"]["nodeName"]: pod for pod in services.workers(kube, namespace, NAME)}
    assert len(pods) == 2, "a replica on each node"
    lost = pods[SECOND.name]
    expected = undisturbed(shoal.url, NAME, STREAMS)
    report.head(
        TABLE,
        *("what", "then", "s", "answers", "failed", "altered", "asked again"),
        "longest silence in a stream, s",
    )
    with Load(shoal.url, NAME, expected) as load:
        with load.window() as window:
            began = time.monotonic()
            host.stop_kubelet(node)
            wait_for("the node's being missed", SILENT_SECONDS, lambda: _silent(kube), every=0.5)
            time.sleep(5)
            assert services.routable(kube, namespace, NAME) == 2
            assert len(services.workers(kube, namespace, NAME)) == 2
            host.restart_kubelet(node)
            wait_for("the node's return", 60, lambda: not _silent(kube), every=0.5)
            took = time.monotonic() - began
        _judge(report, window, "its kubelet away", "both replicas serve on, no pod replaced", took)
        assert _uids(services.workers(kube, namespace, NAME)) == _uids(pods.values())
        say("the node was silent, and is back")
        with load.window() as window:
            wait_for("streams at it", 60, lambda: _carried(shoal, lost) > 1, every=0.2)
            began = time.monotonic()
            host.stop_kubelet(node)
            host.cut_off()
            wait_for(
                "the loss's being told", SILENT_SECONDS, lambda: _told(kube, namespace), every=0.5
            )
            told = time.monotonic() - began
            _assert_named(kube, namespace, lost)
            wait_for("another replica", 240, lambda: _recovered(kube, namespace), every=0.5)
            took = time.monotonic() - began
        _judge(report, window, "its power cut: told", "Degraded says NodeLost", told)
        _judge(report, window, "its power cut: mended", "2 replicas on the other node serve", took)
    host.remove(node)
    wait_for("nothing to be left of it", 120, lambda: services.settled(kube, namespace, NAME, 2))


def _judge(report: Report, window: Window, what: str, then: str, seconds: float) -> None:
    report.row(
        TABLE,
        *(what, then, f"{seconds:.1f}", str(len(window.answers)), str(len(window.failed))),
        *(str(window.altered), str(window.asked_again), f"{window.longest_silence:.1f}"),
    )
    assert len(window.answers) >= STREAMS
    assert not window.failed, window.failed[:3]
    assert not window.altered
    assert not window.asked_again


def _silent(kube: Kube) -> bool:
    """Whether the cluster has given up hearing from the node."""
    return bool(condition(kube.get("node", SECOND.name), "Ready").get("status") != "True")


def _carried(shoal: Platform, replica: Object) -> float:
    """Requests that routers have at a replica."""
    name = replica["metadata"]["name"]
    routers = shoal.kube.list("pods", platform.NAMESPACE, platform.ROUTER)
    samples = [shoal.metrics(one, 8000, lambda line: name in line) for one in routers]
    return sum(one.get("shoal_endpoint_in_flight", 0.0) for one in samples)


def _told(kube: Kube, namespace: str) -> bool:
    return bool(kube.conditions(namespace, NAME)["Degraded"]["reason"] == "NodeLost")


def _assert_named(kube: Kube, namespace: str, lost: Object) -> None:
    """Condition and event say which pod, which node, and what comes of it."""
    words = (lost["metadata"]["name"], f"node {SECOND.name}", "another replica takes its place")
    said = kube.conditions(namespace, NAME)["Degraded"]["message"]
    assert all(one in said for one in words), said
    wait_for(
        "an event",
        20,
        lambda: any(
            event["reason"] == "NodeLost" and all(one in event["message"] for one in words)
            for event in kube.list("events", namespace)
            if event["involvedObject"]["name"] == NAME
        ),
    )


def _recovered(kube: Kube, namespace: str) -> bool:
    """Two replicas take requests, and none of them is on the lost node."""
    serving = [
        pod
        for pod in services.workers(kube, namespace, NAME)
        if pod["spec"].get("nodeName") != SECOND.name
    ]
    return len(serving) == 2 and services.routable(kube, namespace, NAME) == 2


def _uids(pods: Iterable[Object]) -> set[str]:
    return {str(pod["metadata"]["uid"]) for pod in pods}
