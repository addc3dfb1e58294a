"""Where a start's time goes: counted once a replica, by whoever saw it."""

import pytest

from shoal.operator.coldstart import ColdStarts, startup_parts
from shoal.operator.observe import EndpointView, Observed, ObservedPod, RouterView

STARTUP = (6.0, 0.5)


def pod(name="chat-0", *, restarts=0, launched=104.0):
    return ObservedPod(
        name,
        "rev",
        int(name[-1]),
        100.0,
        address="h:1",
        ready=True,
        restarts=restarts,
        scheduled=101.0,
        launched=launched,
    )


def seen(*pods, admitted=True):
    views = {p.name: EndpointView("h:1", admitted, 0, STARTUP) for p in pods}
    return Observed(pods=pods, routers=(RouterView(1, views),))


def test_phases_add_up_to_the_whole():
    """From the pod's creation until every router admits it."""
    told = []
    starts = ColdStarts(told.append)
    assert starts.look("chat", seen(pod(), admitted=False), 105.0) is None
    found = starts.look("chat", seen(pod()), 112.0)
    assert told == [found]
    assert {p.phase: p.seconds for p in found.phases} == {
        "schedule": 1.0,
        "image": 3.0,
        "weights": 6.0,
        "warm-up": 0.5,
        "route": 1.5,
    }
    assert found.seconds == sum(p.seconds for p in found.phases) == 12.0


def test_a_replica_is_counted_once():
    """Not again while it serves, nor after routers lost it for a while."""
    told = []
    starts = ColdStarts(told.append)
    for admitted in (False, True, True, False, True):
        starts.look("chat", seen(pod(), admitted=admitted), 112.0)
    assert len(told) == 1
    starts.look("chat", seen(), 120.0)
    starts.look("chat", seen(pod(), admitted=False), 130.0)
    starts.look("chat", seen(pod()), 140.0)
    assert len(told) == 2, "a pod of the same name is another one"


def test_what_served_before_is_no_start():
    """A process that has just begun to look does not know when it was admitted."""
    starts = ColdStarts()
    assert starts.look("chat", seen(pod()), 500.0) is None
    assert starts.look("chat", seen(pod(), pod("chat-1")), 501.0).pod == "chat-1"
    starts.clear()
    assert starts.look("chat", seen(pod()), 502.0) is None


@pytest.mark.parametrize("changes", [{"restarts": 1}, {"launched": None}])
def test_a_start_whose_parts_are_not_known_is_left_out(changes):
    """A container that was started again took other times."""
    starts = ColdStarts()
    starts.look("chat", seen(), 100.0)
    assert starts.look("chat", seen(pod(**changes)), 112.0) is None


def test_the_engines_phases_come_down_to_two():
    """Everything until weights are there, and the warm-up."""
    phases = {"boot": 0.5, "import": 5.0, "load": 1.0, "warm-up": 0.25}
    assert startup_parts(phases) == (6.5, 0.25)
    assert startup_parts({}) is None
