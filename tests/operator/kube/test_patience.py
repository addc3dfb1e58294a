"""What of a new service waits until there is something to tell."""

from dataclasses import replace
from typing import Any

import pytest

from shoal.api.routes import Endpoint, RouteTable
from shoal.api.types import InferenceServiceStatus
from shoal.operator.actions import WriteRoutes
from shoal.operator.kube.patience import ALONE_SECONDS, CROWD_SECONDS, patience
from shoal.operator.observe import Observed, ObservedPod
from shoal.operator.plan import plan
from shoal.operator.revision import revision_of
from tests.operator.conftest import CREATED, make_service

BORN = CREATED.timestamp()
SERVICE = make_service()
STARTING = ObservedPod("chat-0", revision_of(SERVICE.spec), 0, BORN, reason="Starting")


def look(observed: Observed, age: float = 0.5, *, crowd: bool = False, **spec: Any) -> float | None:
    """How long the status of a service of that age waits, as the planner decides about it."""
    service = make_service(**spec)
    now = BORN + age
    return patience(service, observed, plan(service, observed, now), now, crowd=crowd)


def first_table() -> RouteTable:
    """What the first look writes: model ids, and no replica yet."""
    actions = plan(SERVICE, Observed(), BORN).actions
    return next(action.table for action in actions if isinstance(action, WriteRoutes))


def test_a_pod_that_starts_is_waited_for() -> None:
    """From the look that makes it, for a while, and for longer where many services want
    something; the table that tells routers of the model does not end it."""
    assert look(Observed()) == pytest.approx(ALONE_SECONDS - 0.5)
    started = Observed(pods=(STARTING,), table=first_table())
    assert look(started) == pytest.approx(ALONE_SECONDS - 0.5)
    assert look(started, age=3.0, crowd=True) == pytest.approx(CROWD_SECONDS - 3.0)
    assert look(started, age=3.0) is None


@pytest.mark.parametrize("age", [-600.0, ALONE_SECONDS, 600.0])
def test_clocks_that_differ_hold_nothing_up(age: float) -> None:
    """A service that is not new, or is of the future, is told of at once."""
    assert look(Observed(), age=age) is None


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
    assert look(observed) is None


def test_what_was_told_once_is_kept_up() -> None:
    """A status that is there, a table that is there, and pods that were refused do not wait."""
    pods = (STARTING,)
    told = InferenceServiceStatus(observed_generation=1)
    assert look(Observed(pods=pods, status=told)) is None
    assert look(Observed(pods=pods, rejected="no quota")) is None
    served = Endpoint(name="chat-0", address="10.0.0.1:9000", revision=STARTING.revision)
    table = first_table().model_copy(update={"endpoints": (served,)})
    assert look(Observed(pods=pods, table=table)) is None


def test_a_service_without_pods_has_nothing_to_wait_for() -> None:
    """At zero replicas, and where the spec is refused."""
    assert look(Observed(), replicas=0) is None
    nameless = {"spec": {"containers": [{"image": "nameless"}]}}
    assert look(Observed(), podOverlay=nameless) is None


def test_a_service_of_unknown_age_does_not_wait() -> None:
    """As where a server leaves the time of its creation out."""
    meta = SERVICE.metadata.model_copy(update={"creation_timestamp": None})
    ageless = SERVICE.model_copy(update={"metadata": meta})
    decided = plan(ageless, Observed(), BORN)
    assert patience(ageless, Observed(), decided, BORN, crowd=True) is None
