"""Weights swapped in place on a real cluster: no pod is replaced, no answer is of two revisions."""

import time
from collections.abc import Mapping

import pytest

from bench.other_weights import other_weights
from e2e.cluster import services
from e2e.cluster.command import wait_for
from e2e.cluster.kube import Object
from e2e.cluster.load import Answer, Load, undisturbed
from e2e.cluster.platform import Platform
from e2e.cluster.report import Report
from e2e.cluster.testbed import Testbed, since
from shoal.operator.podspec import CACHE_DIR
from shoal.worker.sources import resolve

NAME = "swapped"
STREAMS = 8
TABLE = f"Weights swapped in place under {STREAMS} streams"


def test_swap_and_way_back(
    cluster: Testbed, shoal: Platform, namespace: str, report: Report
) -> None:
    """Another model in the spec, then `shoal rollback`'s field: the same pods serve each, every
    answer is one revision's from its start, no request fails."""
    if cluster.layout is None:
        pytest.skip("the other weights are put on our own node")
    folder = cluster.host_folder(namespace)
    folder.mkdir(parents=True)
    other = other_weights(resolve(services.MODEL["uri"]).path, folder / "other.gguf")
    other.chmod(0o644)
    service = services.service(
        NAME,
        cache={"type": "HostPath", "path": str(folder)},
        resources={"memory": "4Gi"},
        rollout={"strategy": "InPlace", "maxSurge": 1, "maxUnavailable": 0},
        replicas=2,
    )
    cluster.kube.apply(namespace, service)
    _wait(cluster, namespace, "the service at full strength")
    of_first = undisturbed(shoal.url, NAME, STREAMS)
    first = _status(cluster, namespace)["activeRevision"]
    pods = _pods(cluster, namespace)
    report.head(TABLE, "what", "seconds", "answers", "failed", "longest silence, s")

    model = {"uri": f"file://{CACHE_DIR}/other.gguf", "revision": None}
    there = _change(cluster, shoal, namespace, report, "swap", {"model": model}, of_first)
    of_second = undisturbed(shoal.url, NAME, STREAMS)
    assert _status(cluster, namespace)["activeRevision"] != first
    assert sum(of_first[i] != of_second[i] for i in of_first) > STREAMS // 2

    wish = {"revision": first, "insteadOf": _status(cluster, namespace)["specRevision"]}
    spec = {"rollout": {"rollbackTo": wish}}
    back = _change(cluster, shoal, namespace, report, "the way back", spec, of_second)
    assert _status(cluster, namespace)["activeRevision"] == first
    assert undisturbed(shoal.url, NAME, STREAMS) == of_first
    assert _pods(cluster, namespace) == pods
    for answer in (*there, *back):
        assert answer.text in (of_first[answer.question], of_second[answer.question])


def _change(
    cluster: Testbed,
    shoal: Platform,
    namespace: str,
    report: Report,
    what: str,
    spec: Object,
    expected: Mapping[int, str],
) -> list[Answer]:
    """Patches the spec under load and waits until it serves; what was answered meanwhile."""
    with Load(shoal.url, NAME, expected) as load, load.window() as window:
        begun = time.monotonic()
        cluster.kube.patch("infs", NAME, namespace, {"spec": spec})
        _wait(cluster, namespace, what)
        seconds = since(begun)
    report.row(
        TABLE,
        what,
        *(seconds, str(len(window.answers)), str(len(window.failed))),
        f"{window.longest_silence:.1f}",
    )
    assert not window.failed, window.failed[:3]
    return window.answers


def _status(cluster: Testbed, namespace: str) -> Object:
    status: Object = cluster.kube.get("infs", NAME, namespace)["status"]
    return status


def _pods(cluster: Testbed, namespace: str) -> set[str]:
    return {str(pod["metadata"]["uid"]) for pod in services.workers(cluster.kube, namespace, NAME)}


def _wait(cluster: Testbed, namespace: str, what: str) -> None:
    wait_for(what, 300, lambda: services.settled(cluster.kube, namespace, NAME, 2), every=0.5)
