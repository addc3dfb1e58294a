"""Canaries of the embedded model on a cluster, and what is looked at all the time meanwhile."""

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from e2e.cluster import platform
from e2e.cluster.command import wait_for
from e2e.cluster.kube import Kube, Object
from e2e.cluster.layout import ClusterError
from e2e.cluster.platform import Platform
from e2e.cluster.services import service, settled
from shoal.operator.metadata import routes_name

NAME = "tried"
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


NO_FAULTS: Mapping[str, str] = MappingProxyType({})


def revised(length: int, replicas: int = 1, faults: Mapping[str, str] = NO_FAULTS) -> Object:
    """The service; another length of contexts makes another revision, faults that the engine is to
    inject (its environment) a bad one."""
    env = [{"name": name, "value": value} for name, value in faults.items()]
    overlay = {"spec": {"containers": [{"name": "worker", "env": env}]}}
    return service(
        NAME,
        engine={**ENGINE, "maxModelLen": length},
        rollout=ROLLOUT,
        replicas=replicas,
        **({"podOverlay": overlay} if env else {}),
    )


class Watch:
    """What the status and the table say, all the time."""

    def __init__(self, kube: Kube, namespace: str) -> None:
        self.wrong: list[dict[str, int]] = []  # weights that do not add up to 100
        self.actives: list[str] = []  # revisions that served at full strength, one after the other
        self._kube, self._namespace = kube, namespace
        self._stop = threading.Event()

    @property
    def status(self) -> dict[str, Any]:
        return self._look()[0]

    @property
    def weights(self) -> dict[str, int]:
        return self._look()[1]

    @property
    def canary(self) -> dict[str, Any]:
        """Where it stands; empty without one."""
        found: dict[str, Any] = self.status.get("canary") or {}
        return found

    def active(self, but: str = "") -> str:
        """The revision that serves at full strength, where it is not this one."""
        found = str(self.status.get("activeRevision") or "")
        return found if found != but else ""

    def given_up(self, but: str = "") -> str:
        """The revision whose canary was given up, where it is not this one."""
        canary = self.canary
        found = str(canary["revision"]) if canary.get("abortedTime") else ""
        return found if found != but else ""

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
                status, weights = self._look()
            except ClusterError:
                continue  # not made yet, or nobody answers just now
            if weights and sum(weights.values()) != 100:
                self.wrong.append(weights)
            active = status.get("activeRevision")
            if active and self.actives[-1:] != [active]:
                self.actives.append(active)

    def _look(self) -> tuple[dict[str, Any], dict[str, int]]:
        """Status and weights, by one call; raises ClusterError."""
        names = (f"infs/{NAME}", f"configmap/{routes_name(NAME)}")
        text = self._kube.kubectl("get", *names, "-n", self._namespace, "-o", "json")
        service, table = json.loads(text)["items"]
        weights: dict[str, int] = json.loads(table["data"]["routes.json"])["weights"]
        return service.get("status") or {}, weights


def first_revision(kube: Kube, namespace: str, watch: Watch, replicas: int = 1) -> str:
    """Makes the service and waits until it serves; its revision."""
    kube.apply(namespace, revised(512, replicas))
    wait_for("the first revision", 180, lambda: settled(kube, namespace, NAME, replicas), every=0.5)
    return watch.active()


def server_errors(shoal: Platform, namespace: str) -> Counter[str]:
    """By revision, the requests of the service that routers ended with a server's error."""
    series = re.compile(
        r'shoal_requests_total\{code="5\d\d",revision="(\w*)",service="([^"]*)"\} (\d+)'
    )
    found: Counter[str] = Counter()
    for router in shoal.kube.list("pods", platform.NAMESPACE, platform.ROUTER):
        path = f"/api/v1/namespaces/{platform.NAMESPACE}/pods/{router['metadata']['name']}"
        for revision, name, number in series.findall(shoal.kube.raw(f"{path}:8000/proxy/metrics")):
            found[revision] += int(number) if namespace in name else 0
    return +found
