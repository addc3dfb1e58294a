"""What of a new service waits until there is something to tell."""

from dataclasses import replace
from typing import Any

import pytest

from shoal.api.types import InferenceServiceStatus
from shoal.operator.actions import CreatePod, SaveRevision, WriteRoutes
from shoal.operator.kube.patience import ALONE_SECONDS, CROWD_SECONDS, Portion, portion
from shoal.operator.observe import Observed, ObservedPod
from shoal.operator.plan import plan
from shoal.operator.revision import revision_of
from tests.operator.conftest import CREATED, make_service

BORN = CREATED.timestamp()
SERVICE = make_service()
STARTING = ObservedPod("chat-0", revision_of(SERVICE.spec), 0, BORN, reason="Starting")


def look(observed: Observed, age: float = 0.5, *, crowd: bool = False, **spec: Any) -> Portion:
    """What is done for a service of that age, as the planner decides about it."""
    service = make_service(**spec)
    now = BORN + age
    return portion(service, observed, plan(service, observed, now), now, crowd=crowd)


def kinds(portion: Portion) -> list[type]:
    return [type(action) for action in portion.actions]


def test_the_first_look_makes_the_pods_alone() -> None:
    """The table without a replica in it, and the status, wait for what becomes of them."""
    first = look(Observed())
    assert kinds(first) == [SaveRevision, CreatePod]
    assert first.wait == pytest.approx(ALONE_SECONDS - 0.5)


def test_a_pod_that_starts_is_waited_for() -> None:
    """For a while, and for longer where many services want something."""
    observed = Observed(pods=(STARTING,))
    assert look(observed) == Portion((), ALONE_SECONDS - 0.5)
    assert look(observed, age=3.0, crowd=True) == Portion((), CROWD_SECONDS - 3.0)
    assert kinds(look(observed, age=3.0)) == [WriteRoutes]


@pytest.mark.parametrize("age", [-600.0, ALONE_SECONDS, 600.0])
def test_clocks_that_differ_hold_nothing_up(age: float) -> None:
    """A service that is not new, or is of the future, is told of at once."""
    found = look(Observed(), age=age)
    assert found.wait is None
    assert WriteRoutes in kinds(found)


@pytest.mark.parametrize(
    "changes",
    [
        {"ready": True, "address": "10.0.0.1:9000", "reason": ""},
        {"reason": "ImagePullBackOff"},
        {"reason": "Unschedulable"},
        {"lost": True, "reason": "Evicted"},
        {"deleting": True},
        {"group_size": 2},
    ],
)
def test_what_people_want_to_know_is_told_at_once(changes: dict[str, Any]) -> None:
    """A replica that is ready, and one that gets nowhere; members that look for each other."""
    observed = Observed(pods=(replace(STARTING, **changes),))
    assert look(observed).wait is None


def test_what_was_told_once_is_kept_up() -> None:
    """A status that is there, a table that is there, and pods that were refused do not wait."""
    pods = (STARTING,)
    told = InferenceServiceStatus(observed_generation=1)
    assert look(Observed(pods=pods, status=told)).wait is None
    assert look(Observed(pods=pods, rejected="no quota")).wait is None
    table = next(a.table for a in look(Observed(), 9.0).actions if isinstance(a, WriteRoutes))
    assert look(Observed(pods=pods, table=table)).wait is None


def test_a_service_without_pods_has_nothing_to_wait_for() -> None:
    """At zero replicas, and where the spec is refused."""
    assert kinds(look(Observed(), replicas=0)) == [WriteRoutes]
    assert look(Observed(), replicas=0).wait is None
    refused = look(Observed(), podOverlay={"spec": {"containers": [{"image": "nameless"}]}})
    assert refused.wait is None


def test_a_service_of_unknown_age_does_not_wait() -> None:
    """As where a server leaves the time of its creation out."""
    meta = SERVICE.metadata.model_copy(update={"creation_timestamp": None})
    ageless = SERVICE.model_copy(update={"metadata": meta})
    decided = plan(ageless, Observed(), BORN)
    assert portion(ageless, Observed(), decided, BORN, crowd=True) == Portion(decided.actions)
