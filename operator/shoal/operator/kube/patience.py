"""What may wait for a moment, so that one write tells what several would. Pure.

A service that has just been made changes all the time: its pods are made, get a node, start. Its
first status says little then, and is written again a moment later. So it waits for its pods, for
as long as all goes well and not for long; longer in a crowd, where each write holds up somebody
else's. Its first route table does not wait, though no replica is in it yet: by it routers know its
model ids, and requests that come with the service wait for a replica instead of being refused.
"""

from typing import Final

from shoal.api.types import ConditionStatus, ConditionType, InferenceService
from shoal.operator.actions import Action, CreatePod, SaveRevision, WriteRoutes
from shoal.operator.observe import Observed, ObservedPod
from shoal.operator.plan import Plan

ALONE_SECONDS: Final = 2.0  # of a service's age
CROWD_SECONDS: Final = 10.0


def patience(
    service: InferenceService, observed: Observed, decided: Plan, now: float, *, crowd: bool
) -> float | None:
    """Seconds that the status has time; None: it has none. `crowd`: many services have something
    to be done."""
    wait = _remaining(service, now, CROWD_SECONDS if crowd else ALONE_SECONDS)
    return wait if wait is not None and _starts_well(observed, decided) else None


def _remaining(service: InferenceService, now: float, longest: float) -> float | None:
    """Seconds until the service has that age; None where it has, or nobody knows: the clocks of
    two machines may differ."""
    made = service.metadata.creation_timestamp
    age = now - made.timestamp() if made is not None else longest
    return longest - age if 0 <= age < longest else None


def _starts_well(observed: Observed, decided: Plan) -> bool:
    """Whether nothing was told of the service yet, and nothing but a start is to be told."""
    degraded = decided.status.condition(ConditionType.DEGRADED)
    starting = any(isinstance(action, CreatePod) for action in decided.actions) or observed.pods
    return bool(
        starting
        and observed.status.observed_generation == 0
        and not (observed.table is not None and observed.table.endpoints)
        and observed.rejected is None
        and (degraded is None or degraded.status is not ConditionStatus.TRUE)
        and all(map(_on_its_way, observed.pods))
        and all(map(_begins, decided.actions))
    )


def _on_its_way(pod: ObservedPod) -> bool:
    quiet = not (pod.ready or pod.failing or pod.lost or pod.retiring)
    # Members of a group look for each other, by a Service that comes with the children.
    return quiet and pod.group_size == 1


def _begins(action: Action) -> bool:
    match action:
        case WriteRoutes(table):
            return not table.endpoints
        case CreatePod(pod):
            return pod.group_size == 1
        case _:
            return isinstance(action, SaveRevision)
