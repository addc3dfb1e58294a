"""Scaling down takes the replica whose loss costs least, and loses nothing with it."""

from dataclasses import replace

import pytest

from shoal.operator.actions import DeletePod, DrainPod
from shoal.operator.observe import EndpointView
from shoal.operator.rollout import Bounds, Member, next_moves


def member(name, *, in_flight=0, warm=0, created=0.0, **changes):
    found = Member(
        name,
        target=True,
        active=True,
        ready=True,
        routable=True,
        draining=False,
        deleting=False,
        in_flight=in_flight,
        created=created,
        warm=warm,
    )
    return replace(found, **changes)


def drained(*members, replicas):
    return next_moves(members, Bounds(replicas, 1, 0), can_repair=False).drain


@pytest.mark.parametrize(
    ("members", "goes"),
    [
        ((member("busy", in_flight=3), member("idle")), "idle"),
        ((member("warm", warm=900), member("cold", warm=4)), "cold"),
        ((member("warm", warm=900), member("cold but busy", in_flight=1)), "warm"),
        ((member("old", created=1.0), member("new", created=2.0)), "new"),
        ((member("serves"), member("starts", routable=False, ready=False)), "starts"),
        ((member("serves", in_flight=9), member("not admitted", routable=False)), "not admitted"),
    ],
)
def test_the_cheapest_goes(members, goes):
    """Who serves nobody, then fewest requests, then fewest cached prefixes, then the newest."""
    assert drained(*members, replicas=1) == (goes,)
    assert drained(*reversed(members), replicas=1) == (goes,)


def test_warm_prefixes_come_from_the_routers(world, service):
    """The planner takes the number from whatever router knows most of a replica's cache."""
    world.settle(service(replicas=2))
    first, second = sorted(world.pods)
    (view,) = world.observed.routers
    warm = {
        first: replace(view.endpoints[first], warm=2),
        second: replace(view.endpoints[second], warm=70),
    }
    world.observed = replace(world.observed, routers=(replace(view, endpoints=warm), view))
    decided = world.plan(service(replicas=1))
    assert [a.name for a in decided.actions if isinstance(a, DrainPod)] == [first]


def test_a_warmer_cache_is_no_news():
    """Views differ by what plans depend on at once, not by figures that move all the time."""
    assert EndpointView("h:1", True, 0, warm=1) == EndpointView("h:1", True, 0, warm=2)


def test_a_busy_replica_ends_its_requests_before_it_goes(world, service):
    """The drain waits for the last request, and takes no new ones meanwhile."""
    chat = service(replicas=2)
    world.settle(chat)
    for name in world.pods:
        world.busy[name] = 2
    world.look()
    smaller = service(replicas=1)
    for _ in range(6):
        decided = world.step(smaller)
        assert not any(isinstance(action, DeletePod) for action in decided.actions)
    (leaving,) = [pod.name for pod in world.observed.pods if pod.drain_started is not None]
    (entry,) = [e for e in world.observed.table.endpoints if e.name == leaving]
    assert entry.draining
    world.busy[leaving] = 0
    world.look()
    actions = world.plan(smaller).actions
    assert [action.name for action in actions if isinstance(action, DeletePod)] == [leaving]
