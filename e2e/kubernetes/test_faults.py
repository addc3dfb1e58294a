"""What clusters do, under constant load: nothing fails, and no greedy answer changes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from e2e.cluster import platform, services
from e2e.cluster.command import Say, wait_for
from e2e.cluster.kube import Kube, Object, is_ready
from e2e.cluster.load import Load, undisturbed
from e2e.cluster.platform import Platform
from e2e.cluster.report import Report
from e2e.cluster.testbed import Testbed, evict

STREAMS = 16
NAME = "steady"
AWAY_SECONDS = 20
TABLE = f"Faults under {STREAMS} streams of the openai client (two float32 replicas)"


@dataclass
class Steady:
    """Two replicas under load."""

    bed: Testbed
    shoal: Platform
    namespace: str
    load: Load
    report: Report

    @property
    def kube(self) -> Kube:
        return self.bed.kube

    def settled(self) -> bool:
        return services.settled(self.kube, self.namespace, NAME, 2)

    def streams_of(self, router: Object) -> float:
        """Requests that a router pod has at replicas."""
        return self.shoal.metrics(router, 8000).get("shoal_endpoint_in_flight", 0.0)

    @contextmanager
    def fault(
        self, what: str, recovered: str, seconds: float = 240, *, takes_streams: bool = False
    ) -> Iterator[None]:
        """Does the block, waits until two replicas serve again, and judges every answer.

        `takes_streams`: it kills a router, whose clients have to ask again."""
        self.report.head(
            TABLE,
            *("fault", "recovered when", "s to recover", "answers", "failed", "altered"),
            *("asked again by the client", "longest silence in a stream, s"),
        )
        with self.load.window() as window:
            started = time.monotonic()
            yield
            wait_for(f"recovery from: {what}", seconds, self.settled, every=0.3)
            took = time.monotonic() - started
        self.report.row(
            TABLE,
            *(what, recovered, f"{took:.1f}", str(len(window.answers)), str(len(window.failed))),
            *(str(window.altered), str(window.asked_again), f"{window.longest_silence:.1f}"),
        )
        assert len(window.answers) >= STREAMS
        assert not window.failed, window.failed[:3]
        assert not window.altered
        assert takes_streams or not window.asked_again


@pytest.fixture(scope="module")
def steady(cluster: Testbed, shoal: Platform, report: Report, say: Say) -> Iterator[Steady]:
    """The load begins before the first test of this file and ends after the last."""
    namespace = cluster.make_namespace("faults")
    cluster.kube.apply(namespace, services.service(NAME, replicas=2))
    wait_for(
        "two replicas", 240, lambda: services.settled(cluster.kube, namespace, NAME, 2), every=0.5
    )
    say("two replicas serve")
    expected = undisturbed(shoal.url, NAME, STREAMS)
    say(f"{len(expected)} undisturbed answers")
    with Load(shoal.url, NAME, expected) as load:
        yield Steady(cluster, shoal, namespace, load, report)
    cluster.remove_namespace(namespace)


@pytest.fixture(autouse=True)
def evidence(steady: Steady, request: pytest.FixtureRequest) -> Iterator[None]:
    """What explains a failure is kept."""
    yield
    outcome = getattr(request.node, "outcome_of_call", None)
    if outcome is None or outcome.failed:
        print(f"evidence: {steady.bed.keep(steady.namespace, request.node.name)}")


@pytest.fixture
def own(steady: Steady) -> Testbed:
    """The node, where it is ours to break."""
    if steady.bed.layout is None:
        pytest.skip("this breaks the host of a node, and the cluster is not ours")
    return steady.bed


def test_a_worker_pod_is_deleted(steady: Steady) -> None:
    """kubectl delete pod: its streams end or move, and another replica takes its place."""
    pod = services.workers(steady.kube, steady.namespace, NAME)[0]["metadata"]["name"]
    with steady.fault("kubectl delete of a worker pod", "2 replicas routable"):
        steady.kube.delete("pod", pod, steady.namespace, "--wait=false")
        wait_for("the pod's being missed", 30, lambda: not steady.settled())


def test_an_engine_is_killed(steady: Steady, own: Testbed) -> None:
    """kill -9 of the engine in its container: the kubelet starts it again."""
    pod = services.workers(steady.kube, steady.namespace, NAME)[0]
    with steady.fault("kill -9 of the engine in its container", "2 replicas routable"):
        own.kill_in_pod(pod, "shoal.worker")
        wait_for("the engine's being missed", 30, lambda: not steady.settled())


def test_a_pod_is_evicted(steady: Steady) -> None:
    """An eviction, as by kubectl drain, within the service's disruption budget."""
    pod = services.workers(steady.kube, steady.namespace, NAME)[1]["metadata"]["name"]
    with steady.fault("eviction of a worker pod", "2 replicas routable"):
        evict(steady.kube, steady.namespace, pod)
        wait_for("the pod's being missed", 30, lambda: not steady.settled())


def test_a_router_is_killed(steady: Steady, own: Testbed) -> None:
    """SIGKILL of one router of two: clients ask again as they would ask any server."""
    routers = steady.kube.list("pods", platform.NAMESPACE, platform.ROUTER)
    assert len(routers) == 2
    # A client asks again by itself as long as no token has come: let most streams be past that.
    wait_for("streams to flow", 60, lambda: steady.load.flowing > STREAMS // 2)
    carried = {one["metadata"]["name"]: steady.streams_of(one) for one in routers}
    router = max(routers, key=lambda one: carried[one["metadata"]["name"]])
    name = router["metadata"]["name"]
    restarts = router["status"]["containerStatuses"][0]["restartCount"]
    assert carried[name], carried

    def back() -> bool:
        pod = steady.kube.get("pod", name, platform.NAMESPACE)
        restarted = pod["status"]["containerStatuses"][0]["restartCount"] > restarts
        return restarted and is_ready(pod)

    what = f"SIGKILL of one router of two, with {carried[name]:.0f} streams"
    with steady.fault(what, "2 routers ready", takes_streams=True):
        own.kill_in_pod(router, "shoal.router")
        wait_for("the router's return", 60, back)


def test_a_rolling_update(steady: Steady) -> None:
    """A changed spec replaces both replicas, one after the other."""
    with steady.fault("rolling update (engine.maxNumSeqs)", "2 new replicas, no old one", 400):
        engine = {"engine": {"maxNumSeqs": 24}}
        steady.kube.patch("infs", NAME, steady.namespace, {"spec": engine})
        wait_for("the change's being seen", 30, lambda: not steady.settled())


def test_the_operator_is_killed_in_the_middle_of_a_rollout(steady: Steady, own: Testbed) -> None:
    """SIGKILL of the leading operator once the first new pod is there."""
    before = {
        pod["metadata"]["name"] for pod in services.workers(steady.kube, steady.namespace, NAME)
    }

    def began() -> bool:
        now = services.workers(steady.kube, steady.namespace, NAME)
        return bool({pod["metadata"]["name"] for pod in now} - before)

    with steady.fault("SIGKILL of the operator in a rollout", "2 new replicas, no old one", 400):
        engine = {"engine": {"maxNumSeqs": 28}}
        steady.kube.patch("infs", NAME, steady.namespace, {"spec": engine})
        wait_for("the rollout's begin", 30, began)
        own.kill_in_pod(steady.shoal.leader(), "shoal.operator")


def test_the_api_server_is_away(steady: Steady, own: Testbed) -> None:
    """20 s without an API server: routers serve what they know, and all goes on afterwards."""
    pods = services.workers(steady.kube, steady.namespace, NAME)
    what = f"API server stopped for {AWAY_SECONDS} s, a pod deleted right after"
    with steady.fault(what, "2 replicas routable"):
        own.stop_api_server()
        time.sleep(AWAY_SECONDS)
        own.start_api_server()
        wait_for("the API server", 60, own.api_server_answers)
        steady.kube.delete("pod", pods[0]["metadata"]["name"], steady.namespace, "--wait=false")
        wait_for("the pod's being missed", 30, lambda: not steady.settled())
