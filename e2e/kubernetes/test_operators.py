"""Two operators: one leads, another takes over within seconds, and nothing is made twice."""

import signal
import time

import pytest

from e2e.cluster import platform, services
from e2e.cluster.command import wait_for
from e2e.cluster.layout import ClusterError
from e2e.cluster.platform import Platform
from e2e.cluster.report import Report
from e2e.cluster.testbed import Testbed

TABLE = "Two operators"


@pytest.mark.parametrize(
    ("number", "goal"),
    [(signal.SIGTERM, 2.0), (signal.SIGKILL, 8.0)],
    ids=["SIGTERM", "SIGKILL"],
)
def test_another_operator_takes_over(
    cluster: Testbed,
    shoal: Platform,
    namespace: str,
    report: Report,
    number: signal.Signals,
    goal: float,
) -> None:
    """A service applied right after the leader's death gets its one pod from the successor."""
    if cluster.layout is None:
        pytest.skip("this breaks the host of a node, and the cluster is not ours")
    kube = cluster.kube
    wait_for("two ready operators", 60, lambda: len(shoal.operators()) == 2)
    leader, before = shoal.leader(), shoal.identity()
    cluster.kill_in_pod(leader, "shoal.operator", number)
    killed = time.monotonic()
    kube.apply(namespace, services.service("handover"))
    # The other pod's, or the one that the kubelet starts in the dead one's place: who is faster.
    wait_for("a new leader", 30, lambda: shoal.identity() not in (None, before), every=0.05)
    took = time.monotonic() - killed
    wait_for("its pod", 30, lambda: services.workers(kube, namespace, "handover"), every=0.05)
    acted = time.monotonic() - killed
    report.head(TABLE, "the leader ends by", "another leads after, s", "goal", "acted after, s")
    report.row(TABLE, number.name, f"{took:.1f}", f"{goal:g}", f"{acted:.1f}")
    wait_for("both to tell who leads", 60, lambda: len(_leads(shoal)) == 2, every=0.5)
    assert sorted(_leads(shoal)) == [0, 1]
    assert len(kube.list("pods", namespace, platform.WORKER)) == 1


def _leads(shoal: Platform) -> list[float]:
    """What each operator that answers says: 1 where it leads."""
    said = []
    for pod in shoal.operators():
        try:
            said.append(shoal.metrics(pod)["shoal_leader"])
        except (ClusterError, KeyError):
            continue  # it is starting again
    return said
