"""Rollouts that are interrupted: the operator dies, the API server is away, a node is lost."""

import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import pytest

from e2e.cluster import host, platform, services
from e2e.cluster.command import Say, wait_for
from e2e.cluster.kube import Object
from e2e.cluster.layout import SECOND, ClusterError, Layout
from e2e.cluster.platform import Platform
from e2e.cluster.report import Report
from e2e.cluster.testbed import Testbed, since
from e2e.kubernetes.canaries import NAME, ROLLOUT, Watch, first_revision, revised, server_errors
from e2e.traffic import Traffic, revisions

TABLE = "Canaries and updates that are interrupted"
STREAMS = 3
KILLS = 30
AWAY_SECONDS = 20


@pytest.fixture
def own(cluster: Testbed) -> Layout:
    """The node, where it is ours to break."""
    if cluster.layout is None:
        pytest.skip("this breaks the host of a node, and the cluster is not ours")
    return cluster.layout


@pytest.fixture
def second_node(own: Layout, say: Say) -> Iterator[Layout]:
    host.add(own, say)
    yield own
    host.remove(own)


@dataclass
class Killer:
    """Ends operators at random moments."""

    cluster: Testbed
    shoal: Platform
    rng: random.Random
    kills: int = 0

    def strike(self) -> None:
        """SIGKILL of the operator that leads, some time after it took over."""
        before = self.shoal.identity()
        time.sleep(self.rng.uniform(0.0, 5.0))
        try:
            leader = self.shoal.leader()
            self.cluster.kill_in_pod(leader, "shoal.operator", signal.SIGKILL)
        except ClusterError:
            return  # it is starting again just now
        self.kills += 1
        if _restarts(leader):
            # The kubelet lets a container wait that dies so often, for minutes in the end.
            name = leader["metadata"]["name"]
            self.cluster.kube.delete("pod", name, platform.NAMESPACE, "--wait=false")
        wait_for("another leader", 90, lambda: self.shoal.identity() not in (None, before))


def _restarts(pod: Object) -> int:
    return sum(int(one["restartCount"]) for one in pod["status"].get("containerStatuses", []))


@pytest.mark.timeout(900, func_only=True)
def test_an_operator_that_is_killed_at_many_moments(
    cluster: Testbed, shoal: Platform, own: Layout, namespace: str, report: Report
) -> None:
    """Canary after canary, and the operator dies in each again and again: a good revision is
    promoted, once, one that fails is given up, and weights always add up to 100."""
    kube = cluster.kube
    watch, killer = Watch(kube, namespace), Killer(cluster, shoal, random.Random(5))
    serving = [first_revision(kube, namespace, watch)]
    bad: list[str] = []
    began = time.monotonic()
    with Traffic(shoal.url, NAME, STREAMS).running() as traffic, watch.running():
        for number in count(1):
            fails = number % 3 == 0
            faults = {"SHOAL_INJECT_FAILURE_RATE": "0.5"} if fails else {}
            kube.apply(namespace, revised(512 - 16 * number, faults=faults))
            known = bad[-1] if bad else ""
            left = time.monotonic() + 300
            while True:
                found = watch.given_up(known) if fails else watch.active(serving[-1])
                if found:
                    (bad if fails else serving).append(found)
                    break
                assert time.monotonic() < left, f"canary {number} does not end: {watch.status}"
                if killer.kills < KILLS:
                    killer.strike()
                time.sleep(0.3)
            if killer.kills >= KILLS:
                break
        active = serving[-1]
        wait_for("all of the weight", 60, lambda: watch.weights.get(active) == 100, every=0.5)
        wait_for("a replica of it", 60, lambda: watch.status.get("routableReplicas"), every=0.5)
    assert watch.wrong == []
    assert watch.actives == serving, "each good revision was promoted once, no other"
    errors = server_errors(shoal, namespace)
    assert errors.keys() <= set(bad), errors
    assert errors.total() == len(traffic.failed()), traffic.failed()[:3]
    report.head(TABLE, "what", "ended after, s", "requests", "failed")
    what = f"{killer.kills} kills of the operator in {number} canaries, {len(bad)} of them failing"
    report.row(
        TABLE,
        what,
        since(began),
        str(len(traffic.answers)),
        f"{errors.total()}, all of failing ones",
    )


def test_an_api_server_that_is_away_in_a_canary(
    cluster: Testbed, shoal: Platform, own: Layout, namespace: str, report: Report
) -> None:
    """Both sides serve on by the weights that are in force, and afterwards it is promoted."""
    kube = cluster.kube
    watch = Watch(kube, namespace)
    first = first_revision(kube, namespace, watch)
    began = time.monotonic()
    with Traffic(shoal.url, NAME, STREAMS).running() as traffic, watch.running():
        kube.apply(namespace, revised(448))
        wait_for("the first step", 120, lambda: len(set(watch.weights.values())) == 2, every=0.3)
        wait_for("its answers", 60, lambda: len(revisions(traffic.answers)) == 2)
        away = time.time()
        cluster.stop_api_server()
        time.sleep(AWAY_SECONDS)
        meanwhile = revisions(traffic.since(away))
        cluster.start_api_server()
        wait_for("the API server", 60, cluster.api_server_answers)
        second = wait_for("the promotion", 180, lambda: watch.active(but=first), every=0.3)
    assert meanwhile.keys() == {first, second}
    assert watch.wrong == []
    assert watch.actives == [first, second]
    assert not traffic.failed(), traffic.failed()[:3]
    report.head(TABLE, "what", "ended after, s", "requests", "failed")
    what = f"API server away for {AWAY_SECONDS} s at a canary's first step"
    report.row(TABLE, what, since(began), str(len(traffic.answers)), "0")


def test_a_node_that_is_lost_in_an_update(
    cluster: Testbed, shoal: Platform, second_node: Layout, namespace: str, report: Report
) -> None:
    """A node loses its power while replicas are replaced: what it held moves, and the new revision
    ends at full strength on the node that is left."""
    kube = cluster.kube
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {"serving.shoal.dev/service": NAME}},
    }
    overlay = {"spec": {"topologySpreadConstraints": [spread]}}

    def updated(length: int) -> Object:
        thing = revised(length, replicas=2)
        thing["spec"]["podOverlay"] = overlay
        thing["spec"]["rollout"] = {k: v for k, v in ROLLOUT.items() if k != "canary"}
        return thing

    kube.apply(namespace, updated(512))
    wait_for("two replicas", 240, lambda: services.settled(kube, namespace, NAME, 2), every=0.5)
    old = services.workers(kube, namespace, NAME)
    assert SECOND.name in {pod["spec"]["nodeName"] for pod in old}
    names = {pod["metadata"]["name"] for pod in old}
    with Traffic(shoal.url, NAME, STREAMS).running() as traffic:
        wait_for("answers", 60, lambda: len(traffic.answers) > STREAMS)
        kube.apply(namespace, updated(448))
        wait_for("a new pod", 60, lambda: _names(cluster, namespace) - names, every=0.3)
        began = time.monotonic()
        host.stop_kubelet(second_node)
        host.cut_off()

        def recovered() -> bool:
            status = kube.get("infs", NAME, namespace)["status"]
            new = status["specRevision"]
            staying = [
                pod
                for pod in services.workers(kube, namespace, NAME)
                if pod["spec"].get("nodeName") != SECOND.name
            ]
            revision = {pod["metadata"]["labels"]["serving.shoal.dev/revision"] for pod in staying}
            return (
                status["activeRevision"] == new
                and revision == {new}
                and len(staying) == 2
                and status["routableReplicas"] == 2
            )

        wait_for("the new revision at full strength", 300, recovered, every=0.5)
        took = since(began)
    assert not traffic.failed(), traffic.failed()[:3]
    report.head(TABLE, "what", "ended after, s", "requests", "failed")
    what = "a node's power cut in a rolling update"
    report.row(TABLE, what, took, str(len(traffic.answers)), "0")
    host.remove(second_node)
    wait_for("nothing to be left of it", 120, lambda: services.settled(kube, namespace, NAME, 2))


def _names(cluster: Testbed, namespace: str) -> set[str]:
    found = services.workers(cluster.kube, namespace, NAME)
    return {str(pod["metadata"]["name"]) for pod in found}
