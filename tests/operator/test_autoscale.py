"""The autoscaler's decision: bounds, silence, panic, scale to zero, restarts."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.api.scaling import AutoscalingSpec
from shoal.operator.autoscale import Scaling, decide
from shoal.operator.autoscale_behavior import Memory, Wish, remember
from shoal.operator.autoscale_load import Load
from shoal.operator.autoscale_metrics import Replicas

QUICK = {"scaleDown": {"stabilizationWindowSeconds": 0}}


def scaling(*, slots=8, enabled=True, **spec):
    spec = {"maxReplicas": 10, "behavior": QUICK, **spec}
    return Scaling(AutoscalingSpec.model_validate(spec), slots, enabled)


def load(queued=0, *, running=(), kv=(), ttft=None, idle=0.0, complete=True):
    return Load(
        queued=queued,
        in_flight={f"r{n}": float(value) for n, value in enumerate(running)},
        kv={f"r{n}": value for n, value in enumerate(kv)},
        ttft_p95=ttft,
        idle_seconds=idle,
        complete=complete,
    )


def replicas(wanted, ready=None, starting=0):
    names = [f"r{n}" for n in range(wanted)]
    ready = wanted if ready is None else ready
    return Replicas(wanted, names[:ready], [f"s{n}" for n in range(starting)])


@dataclass
class Service:
    """A service whose replicas are there as soon as they are wanted."""

    scaling: Scaling
    wanted: int = 1
    now: float = 1000.0
    memory: Memory | None = None
    reason: str = ""

    def look(self, found, *, ready=None, passes=2.0):
        self.memory = self.memory or Memory.began(self.wanted, (), self.now)
        decision = decide(self.scaling, replicas(self.wanted, ready), found, self.memory, self.now)
        self.now += passes
        self.wanted, self.memory, self.reason = decision.wanted, decision.memory, decision.reason
        return self.wanted

    def restart(self):
        changes = self.memory.changes if self.memory else ()
        self.memory = Memory.began(self.wanted, changes, self.now)


def test_a_queue_step_is_acted_on_at_the_first_look():
    """Nothing delays the way up by default but the policies' speed."""
    service = Service(scaling())
    assert service.look(load(20)) == 5
    assert service.reason == "QueueDepthAboveTarget"


def test_the_metric_that_asks_for_most_wins():
    """Queue and KV use ask for different numbers; the larger is taken."""
    metrics = [{"type": "QueueDepth", "target": 4}, {"type": "KvUtilization", "target": 0.5}]
    service = Service(scaling(metrics=metrics), wanted=2)
    assert service.look(load(4, kv=[0.9, 0.9])) == 4


def test_a_service_shrinks_no_further_than_its_work_allows():
    """An empty queue is no reason to stop replicas that are full."""
    service = Service(scaling(slots=8), wanted=4)
    assert service.look(load(0, running=[7, 7, 7, 7])) == 4
    assert service.reason == "WorkFillsReplicas"
    assert service.look(load(0, running=[3, 3, 3, 3])) == 2
    assert service.look(load(0, running=[0, 0])) == 1


def test_kv_use_counts_as_work():
    """Long contexts fill a replica before its slots are taken."""
    service = Service(scaling(slots=256), wanted=4)
    assert service.look(load(0, running=[2] * 4, kv=[0.6] * 4)) == 3


def test_nothing_goes_while_anything_waits():
    """A queue that is below its target still says that there is no room."""
    service = Service(scaling(), wanted=5)
    assert service.look(load(8, running=[0] * 5)) == 5


def test_ttft_scales_with_the_ready_replicas_only():
    """Twice the target asks for twice the ready replicas, not twice those under way."""
    service = Service(scaling(metrics=[{"type": "TtftP95", "target": 1}]), wanted=4)
    assert service.look(load(ttft=2.0, running=[1] * 4), ready=2) == 4


def test_no_router_or_an_unknown_metric_changes_nothing():
    """Without figures the number stays, and the condition says why."""
    service = Service(scaling(metrics=[{"type": "TtftP95", "target": 1}]), wanted=4)
    assert service.look(None) == 4
    assert service.reason == "NoRouter"
    assert service.look(load(ttft=None)) == 4
    assert service.reason == "MetricUnknown"


def test_an_unknown_metric_does_not_stop_the_way_up():
    """What is known may still ask for more."""
    metrics = [{"type": "TtftP95", "target": 1}, {"type": "QueueDepth", "target": 1}]
    service = Service(scaling(metrics=metrics), wanted=2)
    assert service.look(load(5, ttft=None)) == 5


def test_a_silent_router_forbids_scaling_down_only():
    """Its load is unknown: more may come, nothing may go."""
    service = Service(scaling(), wanted=3)
    assert service.look(load(0, complete=False)) == 3
    assert service.reason == "RouterSilent"
    assert service.look(load(20, complete=False)) == 5


def test_bounds_hold_without_metrics():
    """Outside the bounds no figure is asked for."""
    assert Service(scaling(minReplicas=3)).look(None) == 3
    assert Service(scaling(maxReplicas=4), wanted=9).look(None) == 4


def test_replicas_zero_switches_the_service_off():
    """spec.replicas 0 is a decision of the user's, as in Kubernetes."""
    service = Service(scaling(enabled=False), wanted=3)
    assert service.look(load(50)) == 0
    assert service.reason == "ScalingDisabled"


ZERO = {"minReplicas": 0, "scaleToZero": {"idleSeconds": 60}}


def test_an_idle_service_goes_to_zero_and_wakes_for_one_request():
    """Idle for its time: all go at once; the first request brings one back."""
    service = Service(scaling(**ZERO, behavior={}), wanted=3)
    assert service.look(load(idle=1), passes=60) == 3
    assert service.look(load(idle=59), passes=0) == 3  # the window for scaling down
    assert service.look(load(idle=60)) == 0
    assert service.reason == "Idle"
    assert service.look(load(0, idle=70)) == 0
    assert service.look(load(1)) == 1
    assert service.reason == "WokenByRequest"


def test_a_start_is_not_idle_time():
    """A replica that takes longer to start than idleSeconds gets ready, and is then waited with."""
    service = Service(scaling(**ZERO), wanted=1)
    for _ in range(100):
        assert service.look(load(idle=600), ready=0) == 1
    for _ in range(30):
        assert service.look(load(idle=600), ready=1) == 1
    assert service.look(load(idle=600), ready=1) == 0


def test_a_long_queue_wakes_several_replicas():
    """From zero the queue counts as it does later, within the policies."""
    service = Service(scaling(**ZERO), wanted=0)
    assert service.look(load(12)) == 3
    assert Service(scaling(**ZERO), wanted=0).look(load(1000)) == 4  # four at once


def test_no_service_goes_to_zero_on_half_the_figures():
    """A silent router may have requests; metrics alone never ask for zero."""
    service = Service(scaling(**ZERO), wanted=1)
    assert service.look(load(idle=600, complete=False)) == 1
    assert service.look(load(idle=30)) == 1


def test_panic_overrides_the_window_for_scaling_up():
    """Noise waits for the window; ten times the load does not."""
    behavior = {"scaleUp": {"stabilizationWindowSeconds": 120}, **QUICK}
    calm = Service(scaling(behavior=behavior), wanted=4)
    assert [calm.look(load(24)) for _ in range(10)] == [4] * 10
    surge = Service(scaling(behavior=behavior), wanted=2)
    assert surge.look(load(40)) == 2
    assert surge.look(load(40)) == 6
    assert surge.reason == "ScaleUpLimit"


def test_nothing_goes_during_panic():
    """A surge that ends is waited out for a minute."""
    service = Service(scaling(), wanted=2)
    service.look(load(40), ready=2)
    service.look(load(40), ready=2)
    high = service.wanted
    counts = [service.look(load(0)) for _ in range(29)]
    assert set(counts) == {high}
    assert service.look(load(0), passes=20) == high
    assert service.look(load(0)) < high


def test_limits_hold_over_a_restart():
    """What was added before a restart counts against the policies after it."""
    behavior = {"scaleUp": {"policies": [{"type": "Pods", "value": 2, "periodSeconds": 60}]}}
    service = Service(scaling(behavior=behavior), wanted=2)
    assert service.look(load(100)) == 4
    service.restart()
    assert service.look(load(100)) == 4
    assert service.reason == "ScaleUpLimit"


def test_a_restart_takes_nothing_away_before_its_window():
    """An autoscaler without a past keeps what there is for one full window."""
    service = Service(scaling(behavior={}), wanted=6)
    service.restart()
    assert [service.look(load(0)) for _ in range(150)] == [6] * 150
    assert service.look(load(0)) < 6


wishes = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 40)), max_size=60)


@given(wishes, st.integers(0, 60), st.integers(0, 60))
def test_what_is_forgotten_never_mattered(steps, up, down):
    """Windows over the few wishes that are kept equal windows over all of them."""
    behavior = scaling(
        behavior={
            "scaleUp": {"stabilizationWindowSeconds": up},
            "scaleDown": {"stabilizationWindowSeconds": down},
        }
    ).spec.behavior
    now, everything, kept = 0.0, [], ()
    for count, passed in steps:
        now += passed
        wish = Wish(now, count)
        everything.append(wish)
        kept = remember(kept, wish, behavior)
        for window, choose in ((up, min), (down, max)):
            counts = [w.count for w in everything if w.at > now - window] or [count]
            remembered = [w.count for w in kept if w.at > now - window] or [count]
            assert choose(counts) == choose(remembered)
        assert len(kept) <= 2 * len({w.count for w in everything})


looks = st.lists(
    st.builds(
        load,
        st.integers(0, 500),
        running=st.lists(st.integers(0, 20), max_size=6),
        ttft=st.none() | st.floats(0, 30),
        idle=st.floats(0, 200),
        complete=st.booleans(),
    )
    | st.none(),
    max_size=60,
)
specs = st.builds(
    lambda least, more, up, down, zero: {
        "minReplicas": 0 if zero else least,
        "maxReplicas": least + more,
        "metrics": [{"type": "QueueDepth", "target": 4}, {"type": "TtftP95", "target": 2}],
        "behavior": {
            "scaleUp": {"stabilizationWindowSeconds": up},
            "scaleDown": {"stabilizationWindowSeconds": down},
        },
        **({"scaleToZero": {"idleSeconds": 100}} if zero else {}),
    },
    st.integers(1, 4),
    st.integers(0, 10),
    st.sampled_from([0, 30]),
    st.sampled_from([0, 10, 300]),
    st.booleans(),
)


@given(specs, looks, st.integers(0, 20))
@settings(deadline=None)
def test_every_decision_keeps_its_promises(spec, figures, start):
    """Within the bounds; no way down on doubt; a waiting request never meets zero for long."""
    service = Service(scaling(**spec), wanted=start)
    for found in figures:
        before = service.wanted
        after = service.look(found)
        assert after <= spec["maxReplicas"]
        assert after >= spec["minReplicas"]
        if found is None or (not found.complete and before <= spec["maxReplicas"]):
            assert after >= min(before, spec["maxReplicas"])
        if found is not None and found.queued:
            assert after >= 1
            assert after >= min(before, spec["maxReplicas"])
        if after == 0 and before:
            assert found is not None and found.idle_seconds >= 100


steady = st.builds(load, st.integers(0, 60), running=st.lists(st.integers(0, 8), max_size=6))


@given(steady, st.integers(1, 10), st.sets(st.integers(0, 199)), st.sampled_from([0, 20, 300]))
@settings(deadline=None)
def test_restarts_never_make_it_flap(found, start, restarts, window):
    """Under one load the number goes one way, however often the operator is killed."""
    service = Service(scaling(behavior={"scaleDown": {"stabilizationWindowSeconds": window}}))
    service.wanted, numbers = start, []
    for number in range(200):
        numbers.append(service.look(found))
        if number in restarts:
            service.restart()
    assert numbers in (sorted(numbers), sorted(numbers, reverse=True))
