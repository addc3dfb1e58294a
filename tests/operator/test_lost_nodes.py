"""Nodes that do not answer: what routers reach serves on, and nothing else is given up too soon."""

from dataclasses import replace

import pytest

from shoal.operator.actions import CreatePod, DeletePod, DrainPod, WriteRoutes
from shoal.operator.observe import RouterView
from tests.operator.simulated import NODES
from tests.operator.test_plan_machine import BROKEN, Story


def settled(ranks=1):
    """Two replicas that serve, all on one node."""
    told = Story(ranks, 1, 0)
    told.cluster.settle(told.wanted())
    return told


def condition(decided, kind):
    return next(c for c in decided.status.conditions if c.type == kind)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_node_that_only_the_cluster_does_not_hear_serves_on(ranks):
    """Routers reach its engines: no action at all, Ready, and a condition that names the node."""
    told = settled(ranks)
    told.cluster.node_silent(NODES[0])
    decided = told.cluster.step(told.wanted())
    assert decided.actions == ()
    assert condition(decided, "Ready").status == "True"
    assert condition(decided, "Degraded").reason == "NodeLost"


@pytest.mark.parametrize("happening", ["node_silent", "node_down"])
def test_a_rollout_that_cannot_succeed_deletes_no_lost_replica(happening):
    """The revision that served is all there is, whoever still reaches it."""
    told = settled()
    serving = set(told.cluster.pods)
    told.happen("model", BROKEN)
    told.step(None)
    getattr(told.cluster, happening)(NODES[0])
    for _ in range(10):
        told.step(None)
        told.happen("grow", 1)
        told.happen("time", 20)
    kept = [told.cluster.pods[name]["metadata"] for name in serving]
    assert not any("deletionTimestamp" in meta for meta in kept)
    told.cluster.node_up(NODES[0])
    assert serving & told.cluster.serving()


def test_a_rollout_goes_on_over_a_silent_node():
    """Its old replicas are drained as others are: once their successors serve."""
    told = settled()
    old = set(told.cluster.pods)
    told.happen("model", "0.1.1")
    told.cluster.node_silent(NODES[0])
    for _ in range(30):
        told.step(None)
        told.happen("grow", 1)
        for name in list(told.cluster.pods):
            told.cluster.finish(name)
    assert len(told.cluster.serving() - old) == 2
    assert all("deletionTimestamp" in told.cluster.pods[name]["metadata"] for name in old)


def test_while_no_router_answers_a_lost_replica_is_replaced_but_kept():
    """Nobody knows whether it serves: a new one is made, and no old one is given up."""
    told = settled()
    told.cluster.routers_up = False
    told.cluster.node_silent(NODES[0])
    decided = told.cluster.step(told.wanted())
    assert [type(a) for a in decided.actions] == [CreatePod, CreatePod]
    told.happen("grow", 1)
    decided = told.cluster.step(told.wanted())
    assert not any(isinstance(a, DrainPod | DeletePod) for a in decided.actions)


def test_a_member_on_a_silent_node_is_no_reason_to_end_its_group():
    """The ranks still compute: the group goes only after another serves in its place."""
    told = settled(ranks=2)
    hit = told.cluster.groups()[0]
    told.cluster.pods[hit.pods[1].name]["spec"]["nodeName"] = NODES[1]
    told.cluster.node_down(NODES[1])
    decided = told.cluster.step(told.wanted())
    assert {type(a) for a in decided.actions} == {CreatePod}
    for _ in range(4):
        told.step(None)
        told.happen("grow", 0)
    assert all("deletionTimestamp" in told.cluster.pods[p.name]["metadata"] for p in hit.pods)


def test_a_table_that_was_lost_comes_back_after_that_on_which_routers_act():
    """Its generation is higher, and it holds what a silent node serves."""
    told = settled()
    before = told.cluster.table
    told.cluster.table, told.cluster.router_lags = None, True
    told.cluster.node_silent(NODES[0])
    told.step(None)
    assert told.cluster.table.generation == before.generation + 1
    assert told.cluster.table.endpoints == before.endpoints


def test_who_acts_on_another_table_has_not_heard_of_a_drain():
    """Routers with a higher generation are outbid, and a drain waits until they have read it."""
    told = settled()
    told.happen("replicas", 1)
    told.step(2)  # the mark, and the table
    told.cluster.router_lags = True
    seen = told.cluster.snapshot()
    (view,) = seen.observed.routers
    ahead = RouterView(view.generation + 40, view.endpoints)
    seen = replace(seen, observed=replace(seen.observed, routers=(ahead,)))
    decided = told.cluster.step(told.wanted(), seen=seen)
    assert [type(a) for a in decided.actions] == [WriteRoutes]
    assert told.cluster.table.generation == ahead.generation + 1


def test_a_node_that_comes_back_keeps_its_replica():
    """Nothing is deleted before a replacement serves; then the cheaper of the two goes."""
    told = Story(1, 1, 0)
    told.cluster.settle(told.wanted())
    for name, node in zip(sorted(told.cluster.pods), NODES, strict=False):
        told.cluster.pods[name]["spec"]["nodeName"] = node
    told.cluster.node_down(NODES[0])
    decided = told.cluster.step(told.wanted())
    kinds = [type(action).__name__ for action in decided.actions]
    assert "CreatePod" in kinds and "DeletePod" not in kinds
    degraded = next(c for c in decided.status.conditions if c.type == "Degraded")
    assert degraded.reason == "NodeLost" and "node-a does not answer" in degraded.message
    lost = sorted(told.cluster.pods)[0]
    told.cluster.node_up(NODES[0])
    told.cluster.settle(told.wanted())
    assert lost in told.cluster.pods and len(told.cluster.pods) == 2


def test_a_lost_replica_goes_once_it_is_replaced():
    """Its pod is deleted, so that it ends when its node comes back."""
    told = Story(1, 1, 0)
    told.cluster.settle(told.wanted())
    hit = sorted(told.cluster.pods)[0]
    told.cluster.pods[hit]["spec"]["nodeName"] = NODES[1]
    told.cluster.node_down(NODES[1])
    for _ in range(4):
        told.step(None)
        told.happen("grow", 0)
    assert "deletionTimestamp" in told.cluster.pods[hit]["metadata"]
    assert told.cluster.routable() == 2
