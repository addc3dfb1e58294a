"""Canaries: steps, pauses, promotion, the way back; and what holds through any mishap."""

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.api.rollout import CanarySpec
from shoal.operator.analysis import Verdict
from shoal.operator.canary import Situation, advance, describe, needed
from shoal.operator.canary_moves import Replica, canary_moves
from shoal.operator.rollout import Bounds

OLD, NEW, THIRD = "0ld", "new", "third"
STEPS = [
    {"weight": 5, "pauseSeconds": 60},
    {"weight": 50, "pauseSeconds": 60},
    {"weight": 100, "pauseSeconds": 10},
]


def spec(steps=STEPS, *, analysis=True, **fields):
    judged = {"analysis": {}} if analysis else {}
    return CanarySpec.model_validate({"steps": steps, **judged, **fields})


class World:
    """Replicas and routers in memory; the operator may be killed before it writes its state."""

    def __init__(self, canary, *, replicas=4, surge=1, unavailable=0):
        self.spec, self.bounds = canary, Bounds(replicas, surge, unavailable)
        self.now, self.count = 1000.0, 0
        self.active, self.wanted = OLD, OLD
        self.state, self.in_force = None, {OLD: 100}
        self.verdict, self.promoted, self.paused = Verdict.HEALTHY, None, False
        self.replicas = []
        self.deaf = False  # routers do not take up weights
        self.promotions, self.weights_seen = [], []
        for _ in range(replicas):
            self.make(OLD, ready=True)

    def make(self, revision, *, ready=False):
        self.count += 1
        name = f"{revision}-{self.count}"
        self.replicas.append(Replica(name, revision, ready, ready, created=self.count))

    def counts(self, chosen=lambda replica: True):
        return Counter(replica.revision for replica in self.replicas if chosen(replica))

    def reconcile(self, *, killed=False):
        """One round of the operator; killed: before its status and its second action."""
        situation = Situation(
            wanted=self.wanted,
            active=self.active,
            bounds=self.bounds,
            routable=self.counts(lambda r: r.ready and not r.draining),
            existing=self.counts(lambda r: not r.draining),
            in_force=self.in_force,
            paused=self.paused,
            verdict=self.verdict,
            message="judged",
            promoted=self.promoted,
        )
        course = advance(self.spec, self.state, situation, self.now)
        weights = course.weights if course.weights is not None else {self.active: 100}
        self.weights_seen.append(weights)
        if not self.deaf:
            self.in_force = weights
        wanted = course.replicas or {self.active: self.bounds.replicas}
        moves = canary_moves(self.serving(weights), wanted, self.active, self.bounds)
        for revision in moves.create[: 1 if killed else None]:
            self.make(revision)
        if not killed:
            self.replicas = [
                replace(
                    r, draining=(r.draining or r.name in moves.drain) and r.name not in moves.resume
                )
                for r in self.replicas
            ]
        if not killed:
            self.state = course.state
            if course.completed:
                self.promotions.append(self.wanted)
                self.active = self.wanted
        return course

    def serving(self, weights):
        return [
            replace(r, serving=r.ready and weights.get(r.revision, 0) > 0) for r in self.replicas
        ]

    def settle(self, *, seconds=1.0):
        """Replicas get ready, those that leave are gone, time passes."""
        self.replicas = [replace(r, ready=True) for r in self.replicas if not r.draining]
        self.now += seconds

    def run(self, rounds=40, *, seconds=1.0):
        for _ in range(rounds):
            self.reconcile()
            self.settle(seconds=seconds)


def test_a_good_revision_is_promoted_step_by_step():
    """Weights rise one step at a time, each for its pause, and the old revision leaves."""
    world = World(spec())
    world.wanted = NEW
    world.run(200)
    weights = [seen.get(NEW, 0) for seen in world.weights_seen]
    assert [w for w, before in zip(weights[1:], weights, strict=False) if w != before] == [
        5,
        50,
        100,
    ]
    assert weights.count(5) > 60 and weights.count(50) > 60
    assert world.promotions == [NEW]
    assert world.counts() == {NEW: 4}


def test_a_weight_waits_for_replicas_that_can_carry_it():
    """No request goes to a revision that has no replica, nor half of all to one of four."""
    world = World(spec())
    world.wanted = NEW
    world.reconcile()
    assert world.weights_seen[-1] == {NEW: 0, OLD: 100}
    world.settle()
    world.reconcile()
    assert world.weights_seen[-1] == {NEW: 5, OLD: 95}
    assert (needed(4, 5), needed(4, 50), needed(4, 100)) == (1, 2, 4)


def test_the_clock_of_a_step_starts_when_every_router_acts_on_it():
    """Routers that do not hear of a weight hold the canary where it is."""
    world = World(spec())
    world.wanted = NEW
    world.deaf = True
    world.run(100)
    assert world.state.since is None
    assert world.state.step == 0


def test_failure_takes_the_weight_away_at_once_and_for_good():
    """Whatever the step: zero, the stable revision at full strength, no second attempt."""
    world = World(spec())
    world.wanted = NEW
    world.run(70)
    assert world.in_force == {NEW: 50, OLD: 50}
    world.verdict = Verdict.FAILED
    world.reconcile()
    assert world.in_force == {NEW: 0, OLD: 100}
    world.verdict = None
    world.run(20)
    assert world.counts() == {OLD: 4, NEW: 1}  # one stays to be looked at, within the surge
    world.run(70, seconds=10)
    assert world.counts() == {OLD: 4}
    assert world.promotions == []
    assert "given up: judged" in describe(world.spec, world.state)


def test_too_few_requests_or_a_failing_look_hold_a_step():
    """Time alone promotes nobody that was not judged; a person may."""
    world = World(spec())
    world.wanted, world.verdict = NEW, Verdict.WAITING
    world.run(200)
    assert world.in_force == {NEW: 5, OLD: 95}
    world.verdict = Verdict.FAILING
    world.run(200)
    assert world.in_force == {NEW: 5, OLD: 95}
    world.promoted = 0
    world.run(20)
    assert world.in_force == {NEW: 50, OLD: 50}


def test_a_step_until_promoted_waits_for_a_person():
    """It lasts for ever, and one promotion passes one step."""
    steps = [{"weight": 20, "untilPromoted": True}, {"weight": 100}]
    world = World(spec(steps, analysis=False))
    world.wanted = NEW
    world.run(300, seconds=100)
    assert world.in_force == {NEW: 20, OLD: 80}
    assert "promotes" in describe(world.spec, world.state)
    world.promoted = 0
    world.run(20)
    assert world.promotions == [NEW]


def test_paused_holds_the_step():
    """spec.paused stops the clock's effect, not the way back."""
    world = World(spec())
    world.wanted, world.paused = NEW, True
    world.run(300)
    assert world.state.step == 0
    world.verdict = Verdict.FAILED
    world.run(1)
    assert world.in_force == {NEW: 0, OLD: 100}


def test_a_spec_that_goes_back_ends_the_canary():
    """The stable revision is whole again; nothing is promoted."""
    world = World(spec())
    world.wanted = NEW
    world.run(70)
    world.wanted = OLD
    world.run(20)
    assert (world.counts(), world.in_force, world.state) == ({OLD: 4}, {OLD: 100}, None)


def test_a_third_revision_begins_anew_against_the_same_stable_one():
    """The second is gone, weight and replicas; its failure is forgotten with it."""
    world = World(spec())
    world.wanted = NEW
    world.run(70)
    world.wanted = THIRD
    world.reconcile()
    assert world.weights_seen[-1] == {THIRD: 0, OLD: 100}
    world.run(300)
    assert world.promotions == [THIRD]
    assert world.counts() == {THIRD: 4}


def test_lost_replicas_of_a_canary_do_not_move_weights():
    """Routers fall back by themselves; a weight that flaps would hide what happened."""
    world = World(spec())
    world.wanted = NEW
    world.run(70)
    world.replicas = [r for r in world.replicas if r.revision != NEW]
    world.reconcile()
    assert world.in_force == {NEW: 50, OLD: 50}


def test_without_surge_the_stable_revision_makes_room():
    """maxUnavailable alone: one stable replica goes first, never two."""
    world = World(spec(), surge=0, unavailable=1)
    world.wanted = NEW
    for _ in range(300):
        world.reconcile()
        assert len(world.replicas) <= 4
        assert sum(r.ready and not r.draining for r in world.replicas) >= 3
        world.settle()
    assert world.promotions == [NEW]


def test_a_stable_replica_that_drains_is_called_back():
    """The way back needs no new replica where the old one still lives."""
    world = World(spec())
    world.wanted = NEW
    world.run(66)
    draining = [r.name for r in world.replicas if r.draining]
    while not draining:
        world.run(1)
        world.reconcile()
        draining = [r.name for r in world.replicas if r.draining and r.revision == OLD]
    world.verdict = Verdict.FAILED
    world.reconcile()
    assert [r.name for r in world.replicas if r.draining and r.revision == OLD] == []


events = st.one_of(
    st.just(("round", 0)),
    st.just(("round", 0)),
    st.just(("killed", 0)),
    st.tuples(st.just("time"), st.integers(1, 700)),
    st.tuples(st.just("ready"), st.integers(0, 20)),
    st.tuples(st.just("lost"), st.integers(0, 20)),
    st.tuples(st.just("want"), st.sampled_from([OLD, NEW, THIRD])),
    st.tuples(st.just("verdict"), st.sampled_from([*Verdict, None])),
    st.tuples(st.just("promote"), st.integers(-1, 2)),
    st.tuples(st.just("pause"), st.booleans()),
    st.tuples(st.just("deaf"), st.booleans()),
    st.tuples(st.just("scale"), st.integers(1, 6)),
)


def happen(world, kind, value):
    chosen = value % len(world.replicas) if world.replicas and isinstance(value, int) else 0
    match kind:
        case "time":
            world.now += value
        case "ready" if world.replicas:
            world.replicas[chosen] = replace(world.replicas[chosen], ready=True)
        case "lost" if world.replicas:
            del world.replicas[chosen]
        case "want":
            world.wanted = value
        case "verdict":
            world.verdict = value
        case "promote":
            world.promoted = value
        case "pause":
            world.paused = value
        case "deaf":
            world.deaf = value
        case "scale":
            world.bounds = replace(world.bounds, replicas=value)
        case _:
            pass


@given(
    st.lists(events, max_size=80),
    st.sampled_from([(1, 0), (0, 1), (2, 0), (1, 1)]),
    st.booleans(),
)
@settings(deadline=None)
def test_any_story_ends_in_one_whole_revision(story, limits, good):
    """Through crashes, losses and changes of mind: weights are 100 in sum and go to two revisions
    at most, the limit holds, one promotion at a time; in the end one revision serves alone."""
    world = World(spec(), surge=limits[0], unavailable=limits[1])
    for kind, value in story:
        if kind not in ("round", "killed"):
            happen(world, kind, value)
            continue
        before, stable = len(world.replicas), world.active
        course = world.reconcile(killed=kind == "killed")
        assert len(world.replicas) <= max(before, world.bounds.limit)
        if course.weights is not None:
            assert sum(course.weights.values()) == 100
            assert set(course.weights) == {stable, world.wanted}
        if course.completed:
            assert not world.paused
    world.deaf = world.paused = False
    world.verdict = Verdict.HEALTHY if good else Verdict.FAILED
    world.run(400, seconds=10)
    world.run(10)
    promoted = good and (world.state is None or world.state.aborted is None)
    assert world.counts() == {world.wanted if promoted else world.active: world.bounds.replicas}
    if promoted:
        assert world.active == world.wanted
    assert len(world.promotions) == len(
        [
            p
            for p, before in zip(world.promotions, [OLD, *world.promotions], strict=False)
            if p != before
        ]
    )
