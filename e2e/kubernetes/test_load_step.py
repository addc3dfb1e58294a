"""Replicas follow a load on a real cluster: 2 streams, 64, none, zero replicas, one request."""

import asyncio

import pytest

from bench.autoscaling import SURGE, measure, place, timeline, write
from e2e.cluster.platform import Platform
from e2e.cluster.report import Report
from e2e.cluster.testbed import Testbed

TABLE = f"A load of {SURGE} streams, then none, then one request"
SECONDS = 45.0  # of the many streams


# The bench looks at routers through the Kubernetes client, whose port forward tells of a connection
# that was closed in a thread of its own.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_replicas_follow_the_load(
    cluster: Testbed, shoal: Platform, namespace: str, report: Report
) -> None:
    """More replicas come and take requests, all go once nobody asks, and one request wakes the
    service. No request fails. The picture and the table go to bench/results."""
    with place(str(cluster.kube.kubeconfig), namespace, shoal.url) as (backend, url, name):
        run = asyncio.run(measure(backend, url, SECONDS))
    write(run, name)
    report.head(TABLE, "what", "after")
    for what, seconds in timeline(run):
        report.row(TABLE, what, seconds)
    failed = [answer for answer in run.answers if answer.error]
    report.row(TABLE, "requests; failed", f"{len(run.answers)}; {len(failed)}")
    assert not failed, failed[:3]
    surge, none = run.marks[f"{SURGE} streams"], run.marks["no stream"]
    assert max(len(look.routed) for look in run.samples if surge <= look.at <= none) > 1
