"""The status of a service whose document cannot be read. Pure.

The API server checks documents against the type that is installed, which may be of a later
release than this operator. What runs is left as it is, and the conditions say why.
"""

from datetime import UTC, datetime

from shoal.api.types import Condition, ConditionStatus, ConditionType, InferenceServiceStatus

INVALID = "InvalidSpec"


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
    merged = {condition.type: condition for condition in before.conditions}
    for kind, status in verdicts.items():
        last = merged.get(kind)
        moved = last is None or last.status is not status
        merged[kind] = Condition(
            type=kind,
            status=status,
            reason=INVALID,
            message=problem,
            last_transition_time=_time(now) if last is None or moved else last.last_transition_time,
            observed_generation=generation,
        )
    return before.model_copy(
        update={"observed_generation": generation, "conditions": tuple(merged.values())}
    )


def _time(now: float) -> datetime:
    return datetime.fromtimestamp(int(now), UTC)
