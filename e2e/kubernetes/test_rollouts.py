"""Canaries on a real cluster: a good one is promoted, a slow and a failing one are given up."""

import time

from e2e.cluster.command import wait_for
from e2e.cluster.kube import condition
from e2e.cluster.platform import Platform
from e2e.cluster.report import Report
from e2e.cluster.testbed import Testbed, since
from e2e.kubernetes.canaries import NAME, Watch, first_revision, revised, server_errors
from e2e.traffic import Traffic, revisions

TABLE = "A canary of the embedded model"
STREAMS = 3


def test_canaries(cluster: Testbed, shoal: Platform, namespace: str, report: Report) -> None:
    """No client of the stable side meets an error, weights always add up to 100, the figures of the
    failing one are those of its clients, and conditions and events say what happened."""
    kube = cluster.kube
    watch = Watch(kube, namespace)
    first = first_revision(kube, namespace, watch)
    report.head(TABLE, "what", "seconds")
    with Traffic(shoal.url, NAME, STREAMS).running() as traffic, watch.running():
        began = time.monotonic()
        kube.apply(namespace, revised(448))
        good = wait_for("the promotion", 180, lambda: watch.active(but=first), every=0.3)
        report.row(TABLE, "promoted", since(began))
        assert revisions(traffic.answers)[good] >= 20

        began = time.monotonic()
        kube.apply(namespace, revised(448, faults={"SHOAL_INJECT_STEP_DELAY_MS": "200"}))
        slow = wait_for("the slow one's end", 240, watch.given_up, every=0.3)
        report.row(TABLE, "200 ms more a step: given up", since(began))
        canary = watch.canary
        assert canary["stable"] == good
        assert "p95 is" in canary["lastAnalysis"]
        wait_for("weight 0", 10, lambda: watch.weights == {good: 100, slow: 0})
        assert not traffic.failed(), traffic.failed()[:3]

        began = time.monotonic()
        kube.apply(namespace, revised(448, faults={"SHOAL_INJECT_FAILURE_RATE": "0.5"}))
        failing = wait_for("the failing one's end", 240, lambda: watch.given_up(slow), every=0.3)
        report.row(TABLE, "half of its requests fail: given up", since(began))
        assert "requests failed" in watch.canary["lastAnalysis"]
        wait_for("weight 0", 10, lambda: watch.weights == {good: 100, failing: 0})
    found = kube.get("infs", NAME, namespace)
    assert condition(found, "CanaryHealthy")["status"] == "False"
    assert condition(found, "Progressing")["reason"] == "CanaryFailed"
    assert condition(found, "Ready")["status"] == "True"
    events = [event["reason"] for event in kube.list("events", namespace)]
    assert {"CanaryStep", "CanaryPromoted", "CanaryFailed"} <= set(events)
    assert watch.wrong == []
    assert watch.actives == [first, good]
    answers, failed = len(traffic.answers), len(traffic.failed())
    assert server_errors(shoal, namespace) == {failing: failed}
    report.row(TABLE, "requests; failed, all of the failing revision", f"{answers}; {failed}")
