"""Canaries on a real cluster: promoted, given up, and an operator that is killed meanwhile."""

import json
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from e2e.cluster.kube import Kube, condition, timed
from e2e.cluster.layout import ClusterError
from e2e.cluster.platform import Platform
from e2e.cluster.report import Report
from e2e.cluster.services import service
from e2e.cluster.testbed import Testbed
from e2e.traffic import Traffic, revisions
from shoal.operator.metadata import routes_name

NAME = "tried"
TABLE = "A canary of the embedded model"
ENGINE = {"dtype": "float32", "maxNumSeqs": 16, "kvCacheBlocks": 512, "threads": 1}
ROLLOUT = {
    "drainSeconds": 10,
    "canary": {
        "steps": [{"weight": 40, "pauseSeconds": 5}, {"weight": 100, "pauseSeconds": 2}],
        # Two engines on one busy machine differ by themselves.
        "analysis": {
            "intervalSeconds": 2,
            "minRequests": 20,
            "maxFailures": 2,
            "maxTtftP95Ratio": 2,
            "maxItlP95Ratio": 2,
        },
    },
}
KILLS = 3


def revised(length: int, delay: int = 0) -> Any:
    """The service; another length of contexts makes another revision, a delay a slow one."""
    env = [{"name": "SHOAL_INJECT_STEP_DELAY_MS", "value": str(delay)}]
    overlay = {"spec": {"containers": [{"name": "worker", "env": env}]}}
    engine = {**ENGINE, "maxModelLen": length}
    return service(
        NAME, engine=engine, rollout=ROLLOUT, **({"podOverlay": overlay} if delay else {})
    )


class Watch:
    """What the status and the table say, all the time."""

    def __init__(self, kube: Kube, namespace: str) -> None:
        self.wrong: list[dict[str, int]] = []
        self.actives: list[str] = []
        self._kube, self._namespace = kube, namespace
        self._stop = threading.Event()

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self._kube.get("infs", NAME, self._namespace).get("status") or {}
        return found

    @property
    def weights(self) -> dict[str, int]:
        table = self._kube.get("configmap", routes_name(NAME), self._namespace)
        weights: dict[str, int] = json.loads(table["data"]["routes.json"])["weights"]
        return weights

    @contextmanager
    def running(self) -> Iterator["Watch"]:
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.5):
            try:
                weights, active = self.weights, self.status.get("activeRevision")
            except ClusterError:
                continue  # not made yet
            if weights and sum(weights.values()) != 100:
                self.wrong.append(weights)
            if active and self.actives[-1:] != [active]:
                self.actives.append(active)


def killed(cluster: Testbed, shoal: Platform) -> bool:
    """Ends the operator that leads; False where it is starting again just now."""
    try:
        cluster.kill_in_pod(shoal.leader(), "shoal.operator", signal.SIGKILL)
    except ClusterError:
        return False
    return True


def test_canaries_of_a_killed_operator(
    cluster: Testbed, shoal: Platform, namespace: str, report: Report
) -> None:
    """A good revision is promoted once though its operator dies again and again; a slow one is
    given up. No request fails, and weights always add up to 100."""
    kube, rng = cluster.kube, random.Random(5)
    watch = Watch(kube, namespace)
    kube.apply(namespace, revised(512))
    timed("the first revision", 180, lambda: watch.status.get("activeRevision"))
    first = watch.status["activeRevision"]
    report.head(TABLE, "what", "seconds")
    with Traffic(shoal.url, NAME, 3).running() as traffic, watch.running():
        began = time.monotonic()
        kube.apply(namespace, revised(448))
        for _ in range(KILLS if cluster.layout is not None else 0):
            time.sleep(rng.uniform(0.5, 5.0))
            timed("a leader that runs", 60, lambda: killed(cluster, shoal))
        timed("promotion", 180, lambda: watch.status["activeRevision"] != first)
        second = watch.status["activeRevision"]
        report.row(
            TABLE, f"promoted, {KILLS} kills of the operator", f"{time.monotonic() - began:.0f}"
        )
        assert revisions(traffic.answers)[second] >= 20

        began = time.monotonic()
        kube.apply(namespace, revised(448, delay=200))
        timed("the end of it", 240, lambda: (watch.status.get("canary") or {}).get("abortedTime"))
        report.row(TABLE, "200 ms more a step: given up", f"{time.monotonic() - began:.0f}")
        slow = watch.status["canary"]
        assert slow["stable"] == second
        assert "p95 is" in slow["lastAnalysis"]
        timed("weight 0", 10, lambda: watch.weights == {second: 100, slow["revision"]: 0})
    found = kube.get("infs", NAME, namespace)
    assert condition(found, "CanaryHealthy")["status"] == "False"
    assert condition(found, "Progressing")["reason"] == "CanaryFailed"
    assert condition(found, "Ready")["status"] == "True"
    events = [event["reason"] for event in kube.list("events", namespace)]
    assert {"CanaryStep", "CanaryPromoted", "CanaryFailed"} <= set(events)
    assert watch.wrong == []
    assert watch.actives == [first, second]
    assert not traffic.failed(), traffic.failed()[:3]
    report.row(TABLE, "requests, failed", f"{len(traffic.answers)}, {len(traffic.failed())}")
