"""What came of a look at a service, and when the next one is due. Pure."""

from dataclasses import dataclass
from typing import Final

from shoal.operator.kube.errors import ApiError
from shoal.operator.observe import Observed
from shoal.operator.plan import Plan
from shoal.operator.scaler import LOOK_SECONDS as SCALING_SECONDS
from shoal.operator.trials import LOOK_SECONDS as TRIAL_SECONDS

REFUSED_SECONDS: Final = 15.0  # quotas and limits change without an event of ours
DRAIN_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of what a look decided."""

    acted: bool = False  # something of the plan was done: there may be more to do
    rejected: str | None = None  # why the API server refuses an action
    missing: str | None = None  # why a child is not as it should be
    again: float | None = None  # seconds after which what is waited for may have ended
    error: ApiError | None = None  # what may go away by itself
    recorded: bool = False  # what was done is that records were written; the children came along


@dataclass(frozen=True, slots=True)
class Next:
    """When a service is looked at again though there is no news of it."""

    acted: bool = False  # soon: what was done may lead on
    after: float | None = None  # seconds; None: not before there is news


def next_look(observed: Observed, decided: Plan, outcome: Outcome) -> Next:
    """After a look that told how things stand."""
    waits = (
        outcome.again,
        decided.again,
        REFUSED_SECONDS if outcome.rejected or outcome.missing else None,
        DRAIN_SECONDS if any(pod.retiring for pod in observed.pods) else None,
        SCALING_SECONDS if observed.scaling is not None else None,
        TRIAL_SECONDS if observed.trial is not None else None,
    )
    return Next(after=min((seconds for seconds in waits if seconds is not None), default=None))


def leads_on(observed: Observed, decided: Plan, outcome: Outcome) -> bool:
    """Whether what was done may soon lead to something by itself. Records are written down, and
    that is all, unless routers act on them, or a trial goes by them."""
    if not outcome.recorded:
        return outcome.acted
    return observed.trial is not None or waits_for_routers(observed, decided)


def waits_for_routers(observed: Observed, decided: Plan) -> bool:
    """Whether the next step depends on what routers say: an admission, or the end of a drain."""
    if any(pod.drain_started is not None and not pod.deleting for pod in observed.pods):
        return True
    # Once as many are routable as are ready, only news from the cluster change anything.
    status = decided.status
    return status.routable_replicas < status.ready_replicas and bool(observed.routers)
