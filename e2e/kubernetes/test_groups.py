"""Replicas of two pods: created, lost and replaced as one."""

import time
from collections.abc import Iterator

import httpx
import pytest

from e2e.cluster import services
from e2e.cluster.command import wait_for
from e2e.cluster.kube import Kube, Object, is_ready
from e2e.cluster.platform import Platform
from e2e.cluster.report import Report
from e2e.cluster.testbed import Testbed

NAME = "pair"
TABLE = "Groups of two pods (tensor 2 on Ray)"
SERVE_SECONDS = 400  # Ray, and torch in each rank, on the cores that the machine has


@pytest.fixture
def ungated(shoal: Platform) -> Iterator[Platform]:
    """The feature gate for groups, closed."""
    shoal.install("--set", "featureGates.MultiNode=false")
    yield shoal
    shoal.install()


def test_a_lost_member_replaces_its_group_alone(
    cluster: Testbed, shoal: Platform, namespace: str, report: Report
) -> None:
    """Two pods answer as one model. Deleting a follower replaces both pods of its replica, and
    neither of the other's."""
    kube = cluster.kube
    kube.apply(
        namespace, services.service(NAME, replicas=2, parallelism={"tensor": 2}, resources={})
    )
    started = time.monotonic()
    wait_for("two groups", SERVE_SECONDS, lambda: _serves(kube, namespace), every=0.5)
    report.head(TABLE, "what", "seconds")
    report.row(TABLE, "two groups of two pods serve", f"{time.monotonic() - started:.1f}")
    groups = _groups(kube, namespace)
    assert {len(pods) for pods in groups.values()} == {2}
    for pods in groups.values():
        assert len({_label(pod, "revision") for pod in pods}) == 1
        assert [_label(pod, "role") for pod in pods] == ["leader", "follower"]
    _assert_name_resolves(kube, namespace, groups)
    answer = _answer(shoal)
    lost, kept = sorted(groups)
    kube.delete("pod", _name(groups[lost][1]), namespace, "--wait=false")
    gone = time.monotonic()
    assert _answer(shoal) == answer
    wait_for(
        "the group to be replaced",
        SERVE_SECONDS,
        lambda: (
            _serves(kube, namespace)
            and not _ids(groups[lost]) & _ids(services.workers(kube, namespace, NAME))
        ),
        every=0.5,
    )
    report.row(TABLE, "a deleted follower's group is replaced", f"{time.monotonic() - gone:.1f}")
    now = _groups(kube, namespace)
    assert sorted(map(len, now.values())) == [2, 2]
    assert _ids(groups[kept]) <= _ids(services.workers(kube, namespace, NAME))
    assert {_answer(shoal) for _ in range(4)} == {answer}


def test_a_killed_rank_restarts_its_group_in_place(
    cluster: Testbed, shoal: Platform, namespace: str, report: Report
) -> None:
    """The pods stay; their containers start anew, and answer as before."""
    kube = cluster.kube
    kube.apply(namespace, services.service(NAME, parallelism={"tensor": 2}, resources={}))
    wait_for("a group", SERVE_SECONDS, lambda: _serves(kube, namespace, 1), every=0.5)
    answer = _answer(shoal)
    (pods,) = _groups(kube, namespace).values()
    cluster.kill_in_pod(pods[1], "ray::RankActor")
    killed = time.monotonic()
    wait_for("the leader's end", 30, lambda: not _serves(kube, namespace, 1), every=0.1)
    report.head(TABLE, "what", "seconds")
    report.row(TABLE, "a killed rank: not ready any more", f"{time.monotonic() - killed:.1f}")
    wait_for("the group again", SERVE_SECONDS, lambda: _serves(kube, namespace, 1), every=0.5)
    report.row(TABLE, "a killed rank: serves again", f"{time.monotonic() - killed:.1f}")
    assert _ids(services.workers(kube, namespace, NAME)) == _ids(pods)
    assert _answer(shoal) == answer


def test_groups_are_refused_while_their_gate_is_closed(
    cluster: Testbed, ungated: Platform, namespace: str
) -> None:
    """Without the feature gate, a condition names it, and no pod is made."""
    kube = cluster.kube
    kube.apply(namespace, services.service(NAME, parallelism={"tensor": 2}))
    conditions = wait_for("conditions", 30, lambda: kube.conditions(namespace, NAME))
    ready = conditions["Ready"]
    assert ready["status"] == "False"
    assert "MultiNode" in ready["message"], ready
    assert not services.workers(kube, namespace, NAME)


def _answer(shoal: Platform) -> str:
    """Greedy, in float32."""
    answer = httpx.post(
        f"{shoal.url}/v1/completions",
        json={"model": NAME, "prompt": "Fish live in", "max_tokens": 16, "temperature": 0},
        timeout=120,
    )
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def _groups(kube: Kube, namespace: str) -> dict[str, list[Object]]:
    """Pods by replica, leader first."""
    groups: dict[str, list[Object]] = {}
    for pod in services.workers(kube, namespace, NAME):
        groups.setdefault(_label(pod, "replica"), []).append(pod)
    return {key: sorted(pods, key=lambda it: _label(it, "member")) for key, pods in groups.items()}


def _serves(kube: Kube, namespace: str, groups: int = 2) -> bool:
    status = kube.get("infs", NAME, namespace).get("status", {})
    pods = services.workers(kube, namespace, NAME)
    routable = status.get("routableReplicas") == groups
    return routable and len(pods) == 2 * groups and all(map(is_ready, pods))


def _assert_name_resolves(kube: Kube, namespace: str, groups: dict[str, list[Object]]) -> None:
    """The follower finds its leader by the address in its environment."""
    leader, follower = next(iter(groups.values()))
    code = "import os, socket; print(socket.gethostbyname(os.environ['SHOAL_LEADER_ADDRESS']))"
    found = kube.kubectl("exec", "-n", namespace, _name(follower), "--", "python", "-c", code)
    assert found.strip() == leader["status"]["podIP"]


def _label(pod: Object, name: str) -> str:
    return str(pod["metadata"]["labels"][f"serving.shoal.dev/{name}"])


def _name(pod: Object) -> str:
    return str(pod["metadata"]["name"])


def _ids(pods: list[Object]) -> set[str]:
    return {str(pod["metadata"]["uid"]) for pod in pods}
