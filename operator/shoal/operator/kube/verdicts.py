"""Statuses for what the planner cannot see. Pure.

The API server checks documents against the type that is installed, which may be of a later
release than this operator: what runs is left as it is, and the conditions say why. And an object
beside the pods may be refused: the service goes on without it, and is degraded.
"""

from datetime import UTC, datetime
from typing import Final

from shoal.api.types import Condition, ConditionStatus, ConditionType, InferenceServiceStatus

INVALID: Final = "InvalidSpec"
INCOMPLETE: Final = "ChildRefused"


def unreadable_status(
    before: InferenceServiceStatus, problem: str, generation: int, now: float
) -> InferenceServiceStatus:
    """The status as it was, with `problem` in the conditions that concern changes."""
    verdicts = {
        ConditionType.PROGRESSING: ConditionStatus.FALSE,
        ConditionType.DEGRADED: ConditionStatus.TRUE,
    }
    ready = before.condition(ConditionType.READY)
    if ready is None or ready.status is not ConditionStatus.TRUE:
        verdicts = {ConditionType.READY: ConditionStatus.FALSE, **verdicts}
    conditions = {condition.type: condition for condition in before.conditions}
    for kind, status in verdicts.items():
        conditions[kind] = _condition(kind, status, INVALID, problem, before, generation, now)
    return before.model_copy(
        update={"observed_generation": generation, "conditions": tuple(conditions.values())}
    )


def incomplete_status(
    before: InferenceServiceStatus, planned: InferenceServiceStatus, problem: str, now: float
) -> InferenceServiceStatus:
    """The planned status, degraded by `problem` where it is not by something worse."""
    kind = ConditionType.DEGRADED
    worse = planned.condition(kind)
    if worse is not None and worse.status is ConditionStatus.TRUE:
        return planned
    conditions = {condition.type: condition for condition in planned.conditions}
    conditions[kind] = _condition(
        kind, ConditionStatus.TRUE, INCOMPLETE, problem, before, planned.observed_generation, now
    )
    return planned.model_copy(update={"conditions": tuple(conditions.values())})


def _condition(
    kind: ConditionType,
    status: ConditionStatus,
    reason: str,
    message: str,
    before: InferenceServiceStatus,
    generation: int,
    now: float,
) -> Condition:
    last = before.condition(kind)
    same = last is not None and last.status is status
    return Condition(
        type=kind,
        status=status,
        reason=reason,
        message=message,
        last_transition_time=last.last_transition_time if last and same else _time(now),
        observed_generation=generation,
    )


def _time(now: float) -> datetime:
    return datetime.fromtimestamp(int(now), UTC)
