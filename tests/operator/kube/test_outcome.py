"""When a service is looked at again without news."""

from dataclasses import replace

import pytest

from shoal.api.types import AutoscalingStatus, InferenceServiceStatus
from shoal.operator.canary import Course
from shoal.operator.kube.outcome import (
    DRAIN_SECONDS,
    REFUSED_SECONDS,
    Next,
    Outcome,
    leads_on,
    next_look,
    waits_for_routers,
)
from shoal.operator.observe import Observed, ObservedPod, RouterView, ScalingView, TrialView
from shoal.operator.plan import Plan
from shoal.operator.scaler import LOOK_SECONDS

NOTHING = Plan((), InferenceServiceStatus())
POD = ObservedPod("p", "r", 0, 0.0)
SCALING = ScalingView(1, AutoscalingStatus(desired=1), True, "", "")


def test_at_rest_news_alone_lead_on() -> None:
    """Time is no reason to look."""
    assert next_look(Observed(pods=(POD,)), NOTHING, Outcome()) == Next()


@pytest.mark.parametrize(
    ("observed", "decided", "outcome", "after"),
    [
        (Observed(), NOTHING, Outcome(rejected="no quota"), REFUSED_SECONDS),
        (Observed(), NOTHING, Outcome(missing="no monitor"), REFUSED_SECONDS),
        (Observed(), NOTHING, Outcome(again=0.1, rejected="no quota"), 0.1),
        (Observed(), replace(NOTHING, again=7.0), Outcome(), 7.0),
        (Observed(pods=(replace(POD, deleting=True),)), NOTHING, Outcome(), DRAIN_SECONDS),
        (Observed(scaling=SCALING), NOTHING, Outcome(rejected="no quota"), LOOK_SECONDS),
    ],
)
def test_the_soonest_reason_counts(
    observed: Observed, decided: Plan, outcome: Outcome, after: float
) -> None:
    """What is refused is tried again now and then, what goes on is followed."""
    assert next_look(observed, decided, outcome) == Next(after=after)


def test_records_lead_on_where_somebody_acts_on_them() -> None:
    """Whoever acted looks again; who only wrote down does where routers or a trial go by it."""
    assert leads_on(Observed(), NOTHING, Outcome(acted=True))
    assert not leads_on(Observed(), NOTHING, Outcome())
    written = Outcome(acted=True, recorded=True)
    assert not leads_on(Observed(pods=(POD,)), NOTHING, written)
    admission = replace(NOTHING, status=InferenceServiceStatus(ready_replicas=1))
    assert leads_on(Observed(routers=(RouterView(1),)), admission, written)
    assert not leads_on(Observed(), admission, written), "there is nobody to ask"
    trial = TrialView(Course(None), None, None, "")
    assert leads_on(Observed(trial=trial), NOTHING, written)


def test_routers_are_waited_for_while_they_have_something_to_say() -> None:
    """An admission or the end of a drain; a pod that is being deleted is past both."""
    router = (RouterView(1),)
    admission = replace(NOTHING, status=InferenceServiceStatus(ready_replicas=1))
    assert waits_for_routers(Observed(routers=router), admission)
    assert not waits_for_routers(Observed(), admission), "there is nobody to ask"
    draining = replace(POD, drain_started=1.0)
    assert waits_for_routers(Observed(pods=(draining,)), NOTHING)
    gone = replace(draining, deleting=True)
    assert not waits_for_routers(Observed(pods=(gone,), routers=router), NOTHING)
