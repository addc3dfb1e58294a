"""Kubernetes' own HorizontalPodAutoscaler and Shoal's autoscaler, given the same load."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest

from e2e.cluster import kwok
from e2e.cluster.command import wait_for
from e2e.cluster.kube import Kube, Object
from e2e.cluster.report import Report
from e2e.cluster.services import service
from e2e.cluster.testbed import Testbed
from e2e.kubernetes.recorded import RecordedLoads, serving
from shoal.api.types import InferenceService, parse_document
from shoal.operator.autoscale import Scaling, decide
from shoal.operator.autoscale_behavior import Memory
from shoal.operator.autoscale_load import Load
from shoal.operator.autoscale_metrics import Replicas
from shoal.operator.external import autoscaler

TABLE: Final = "Kubernetes' autoscaler and ours, the same load"
SECONDS: Final = 110
SLOTS: Final = 4
QUICK: Final = {
    "scaleUp": {"policies": [{"type": "Percent", "value": 900, "periodSeconds": 5}]},
    "scaleDown": {"stabilizationWindowSeconds": 0},
}


@dataclass(frozen=True)
class Work:
    """What is there to do: requests that wait, sequences that run."""

    queued: int = 0
    running: float = 0.0

    @classmethod
    def of(cls, load: Load) -> "Work":
        """What was told of it."""
        return cls(load.queued, sum(load.in_flight.values()))

    def load(self, replicas: int) -> Load:
        """The work on so many replicas, evenly spread."""
        names = [f"p{n}" for n in range(replicas)]
        running = dict.fromkeys(names, self.running / max(1, replicas))
        return Load(self.queued, running, {}, None, 0.0, True)


@dataclass(frozen=True)
class Series:
    """A load over time, and the rules that it is met by. `differs` says where the two may differ
    on purpose, and why; "" where they may not."""

    name: str
    metrics: list[dict[str, Any]]
    at: Callable[[float], Work | None]
    behavior: dict[str, Any] = field(default_factory=lambda: dict(QUICK))
    most: int = 12
    differs: str = ""

    @property
    def service(self) -> InferenceService:
        spec = service(
            self.name,
            engine={"maxNumSeqs": SLOTS},
            autoscaling={
                "driver": "hpa",
                "maxReplicas": self.most,
                "metrics": self.metrics,
                "behavior": self.behavior,
            },
        )
        return parse_document(spec)


QUEUE: Final = [{"type": "QueueDepth", "target": 4}]
RUNNING: Final = [{"type": "Running", "target": 2}]
SLOW: Final = {
    "scaleUp": {"policies": [{"type": "Pods", "value": 1, "periodSeconds": 15}]},
    "scaleDown": {
        "stabilizationWindowSeconds": 0,
        "policies": [{"type": "Percent", "value": 50, "periodSeconds": 15}],
    },
}
SERIES: Final = (
    Series("step", QUEUE, lambda t: Work(queued=0 if t < 12 else 24)),
    Series("noise", QUEUE, lambda t: Work(queued=12 + round(math.sin(t)))),
    Series("wave", RUNNING, lambda t: Work(running=6 + 4.7 * math.sin(t / 12))),
    Series(
        "window",
        RUNNING,
        lambda t: Work(running=7 if 12 < t < 32 else 4),
        {**QUICK, "scaleDown": {"stabilizationWindowSeconds": 30}},
    ),
    Series("policies", RUNNING, lambda t: Work(running=2 + t / 5 if t < 70 else 2), SLOW),
    Series(
        "surge",
        RUNNING,
        lambda t: Work(running=20 if t < 60 else 2),
        SLOW,
        differs="panic: at twice what is ready, nothing goes for a minute",
    ),
    Series("bound", QUEUE, lambda t: Work(queued=400), most=5),
    Series(
        "outage",
        RUNNING,
        lambda t: None if 30 < t < 60 else Work(running=12 if t < 60 else 4),
    ),
    Series("tolerance", RUNNING, lambda t: Work(running=8 if t < 40 else 8.5)),
    Series(
        "both",
        [*QUEUE, *RUNNING],
        lambda t: Work(queued=20 if 20 < t < 50 else 0, running=4 + round(t / 20)),
    ),
)


@dataclass(frozen=True)
class Look:
    """One look of Kubernetes' autoscaler: seconds of the series, and the work that it was told."""

    at: float
    work: Work | None


def ours(series: Series, looks: Sequence[Look]) -> list[int]:
    """What our autoscaler wants after each look."""
    chat = series.service
    assert chat.spec.autoscaling is not None
    scaling = Scaling(chat.spec.autoscaling, SLOTS)
    wanted, memory, found = 1, Memory.began(1, (), looks[0].at - 1e6), []
    for look in looks:
        names = [f"p{n}" for n in range(wanted)]
        load = look.work.load(wanted) if look.work is not None else None
        decision = decide(scaling, Replicas(wanted, names), load, memory, look.at)
        wanted, memory = decision.wanted, decision.memory
        found.append(wanted)
    return found


@pytest.fixture
def fake_node(cluster: Testbed) -> Iterator[None]:
    if cluster.layout is None:
        pytest.skip("fake nodes need kwok, which runs on our own node alone")
    (node,) = kwok.nodes(1)
    cluster.kube.apply("default", node)
    status = json.dumps({"status": node["status"]})
    name = node["metadata"]["name"]
    cluster.kube.kubectl(
        "patch", "node", name, "--subresource=status", "--type=merge", "-p", status
    )
    yield
    cluster.kube.kubectl("delete", "nodes", "-l", "type=kwok")


def test_the_same_load_gives_the_same_numbers(
    cluster: Testbed, fake_node: None, namespace: str, report: Report, tmp_path: Path
) -> None:
    """Ten series, each driven by an autoscaler of the cluster; ours looks at the same moments."""
    kube = cluster.kube
    by_key = {f"{namespace}/{series.name}": series for series in SERIES}
    counts: dict[str, int] = dict.fromkeys(by_key, 1)
    began = time.monotonic()

    def now(key: str) -> tuple[InferenceService, Load | None] | None:
        series = by_key.get(key)
        if series is None:
            return None
        chat = series.service
        spec = chat.spec.model_copy(update={"replicas": counts[key]})
        work = series.at(time.monotonic() - began)
        load = work.load(counts[key]) if work is not None else None
        return chat.model_copy(update={"spec": spec}), load

    loads = RecordedLoads(now)
    for series in SERIES:
        kube.apply(namespace, _deployment(series.name))
    with serving(kube, namespace, loads, tmp_path):
        first = f"/apis/external.metrics.k8s.io/v1beta1/namespaces/{namespace}/shoal_queue_depth"
        selector = "?labelSelector=serving.shoal.dev%2Fservice%3Dstep"
        wait_for("the aggregated API", 60, lambda: _answers(kube, first + selector))
        loads.asked.clear()
        began = time.monotonic()
        kube.apply(namespace, *(_autoscaler(series) for series in SERIES))
        seen = {key: [(0.0, 1)] for key in by_key}
        while time.monotonic() - began < SECONDS:
            for one in kube.list("deployments", namespace):
                key = f"{namespace}/{one['metadata']['name']}"
                count = int(one["spec"]["replicas"])
                if count != counts[key]:
                    counts[key] = count
                    seen[key].append((time.monotonic() - began, count))
            time.sleep(0.3)
    report.head(TABLE, "series", "looks", "Kubernetes'", "ours", "same at", "on purpose")
    wrong = []
    for key, series in by_key.items():
        looks = _looks(loads.asked[key], began)
        theirs = [_count(seen[key], look.at) for look in looks[1:]]
        looks = looks[:-1]  # what follows from the last is not seen any more
        mine = ours(series, looks)
        same = sum(a == b for a, b in zip(theirs, mine, strict=True))
        report.row(
            TABLE,
            series.name,
            str(len(looks)),
            _changes(theirs),
            _changes(mine),
            f"{same} of {len(looks)}",
            series.differs or "-",
        )
        if same < len(looks) and not series.differs:
            wrong.append((series.name, looks, theirs, mine))
        assert len(looks) >= SECONDS / 15 - 2, f"{series.name} was hardly looked at"
    assert not wrong, wrong


def _looks(asked: Sequence[tuple[float, Load | None]], began: float) -> list[Look]:
    """One a look: an autoscaler asks for its metrics one right after the other, the spec's own
    first, and that answer counts."""
    looks: list[Look] = []
    last = float("-inf")
    for when, load in asked:
        if when - last > 2.5:
            looks.append(Look(when - began, Work.of(load) if load is not None else None))
        last = when
    return looks


def _count(seen: list[tuple[float, int]], end: float) -> int:
    return [count for at, count in seen if at < end][-1]


def _changes(counts: list[int]) -> str:
    moves = counts[:1] + [after for before, after in pairwise(counts) if after != before]
    return " ".join(map(str, moves))


def _answers(kube: Kube, path: str) -> bool:
    try:
        return bool(_items(kube, path))
    except Exception:
        return False


def _items(kube: Kube, path: str) -> list[Mapping[str, Any]]:
    items: list[Mapping[str, Any]] = json.loads(kube.raw(path))["items"]
    return items


def _deployment(name: str) -> Object:
    labels = {"app": name}
    container = {"name": "pause", "image": "example.com/pause", "resources": {}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {**kwok.placement(), "containers": [container]},
            },
        },
    }


def _autoscaler(series: Series) -> Object:
    """As the operator makes it, but of a Deployment whose pods cost nothing."""
    made = autoscaler(series.service)
    assert made is not None
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": series.name}
    return {
        **made,
        "metadata": {"name": series.name},
        "spec": {**made["spec"], "scaleTargetRef": target},
    }
