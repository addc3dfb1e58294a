"""Conditions that stand for what the planner cannot see: a document that cannot be read, an
object that the API server refuses. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from shoal.api.types import Condition, ConditionStatus, ConditionType, InferenceServiceStatus

INVALID = "InvalidSpec"
REFUSED = "Refused"


@dataclass(frozen=True, slots=True)
class _Verdict:
    type: ConditionType
    status: ConditionStatus
    reason: str
    message: str


def unreadable_status(
    before: InferenceServiceStatus, problem: str, generation: int, now: float
) -> InferenceServiceStatus:
    """The status of a service whose document this release cannot read: what runs is left alone."""
    return _overlaid(before, before, INVALID, problem, generation, now).model_copy(
        update={"observed_generation": generation}
    )


def refused_status(
    before: InferenceServiceStatus,
    planned: InferenceServiceStatus,
    problem: str,
    now: float,
) -> InferenceServiceStatus:
    """The planned status, where the API server refused what the plan asked for."""
    return _overlaid(before, planned, REFUSED, problem, planned.observed_generation, now)


def _overlaid(
    before: InferenceServiceStatus,
    status: InferenceServiceStatus,
    reason: str,
    problem: str,
    generation: int,
    now: float,
) -> InferenceServiceStatus:
    verdicts = [
        _Verdict(ConditionType.PROGRESSING, ConditionStatus.FALSE, reason, problem),
        _Verdict(ConditionType.DEGRADED, ConditionStatus.TRUE, reason, problem),
    ]
    ready = status.condition(ConditionType.READY)
    if ready is None or ready.status is not ConditionStatus.TRUE:
        verdicts.insert(0, _Verdict(ConditionType.READY, ConditionStatus.FALSE, reason, problem))
    return status.model_copy(
        update={"conditions": _merged(before, status.conditions, verdicts, generation, now)}
    )


def _merged(
    before: InferenceServiceStatus,
    conditions: Sequence[Condition],
    verdicts: Sequence[_Verdict],
    generation: int,
    now: float,
) -> tuple[Condition, ...]:
    """The conditions with the verdicts in place of theirs, in the same order; others follow."""
    merged = {condition.type: condition for condition in conditions}
    for verdict in verdicts:
        last = before.condition(verdict.type)
        same = last is not None and last.status is verdict.status
        moved = last.last_transition_time if last is not None and same else _time(now)
        merged[verdict.type] = Condition(
            type=verdict.type,
            status=verdict.status,
            reason=verdict.reason,
            message=verdict.message,
            last_transition_time=moved,
            observed_generation=generation,
        )
    return tuple(merged.values())


def _time(now: float) -> datetime:
    return datetime.fromtimestamp(int(now), UTC)
