"""What is worth an event: changes of mind between two statuses, and pods that came to grief.

Pure. An event repeats no state: conditions hold that.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from shoal.api.types import Condition, ConditionStatus, ConditionType, InferenceServiceStatus
from shoal.operator.observe import ObservedPod

# What happens to a pod that is no longer there to show it later.
_LOSSES: Final = frozenset({"NodeLost", "Evicted", "MemberLost", "PodEnded", "OOMKilled"})


@dataclass(frozen=True, slots=True)
class Notice:
    """One event about a service."""

    reason: str  # a CamelCase word
    message: str
    warning: bool = False


def news(before: InferenceServiceStatus, after: InferenceServiceStatus) -> Iterator[Notice]:
    """What happened between two statuses of a service, in the order in which people care."""
    for read in (_canary, _progress, _trouble, _readiness):
        yield from read(before, after)


def pod_news(pods: Iterable[ObservedPod]) -> Iterator[Notice]:
    """Pods that fail or were lost; the same words for as long as it is so."""
    for pod in pods:
        if pod.failing or pod.reason in _LOSSES:
            yield Notice(pod.reason, f"{pod.name}: {pod.message or pod.reason}", warning=True)


def _canary(before: InferenceServiceStatus, after: InferenceServiceStatus) -> Iterator[Notice]:
    old, new = before.canary, after.canary
    if old is not None and new is None and after.active_revision == old.revision:
        yield Notice("CanaryPromoted", f"revision {old.revision} takes all requests")
    if new is None:
        return
    same = old is not None and old.revision == new.revision
    if new.aborted_time is not None:
        if old is None or not same or old.aborted_time is None:
            sentence = f"revision {new.revision} was given up: {new.last_analysis or 'no reason'}"
            yield Notice("CanaryFailed", sentence, warning=True)
    elif old is None or not same or (old.step, old.weight) != (new.step, new.weight):
        sentence = f"revision {new.revision}: step {new.step + 1}, {new.weight} % of requests"
        yield Notice("CanaryStep", sentence)


def _progress(before: InferenceServiceStatus, after: InferenceServiceStatus) -> Iterator[Notice]:
    old, new = _both(before, after, ConditionType.PROGRESSING)
    if new is None or _same(old, new):
        return
    if new.reason == "Complete":
        yield Notice("RolloutComplete", new.message)
    elif new.reason == "RollingOut":
        if old is not None:  # else it has only just been made, as its maker knows
            yield Notice("RolloutStarted", new.message)
    elif new.status is not ConditionStatus.TRUE and old is not None:
        if new.reason == "CanaryFailed":
            return  # told as the canary's end
        yield Notice(new.reason, new.message, warning=new.status is ConditionStatus.FALSE)


def _trouble(before: InferenceServiceStatus, after: InferenceServiceStatus) -> Iterator[Notice]:
    old, new = _both(before, after, ConditionType.DEGRADED)
    if new is None or _same(old, new):
        return
    if new.status is ConditionStatus.TRUE:
        yield Notice(new.reason, new.message, warning=True)
    elif old is not None and old.status is ConditionStatus.TRUE:
        yield Notice("Recovered", f"no longer so: {old.reason}")


def _readiness(before: InferenceServiceStatus, after: InferenceServiceStatus) -> Iterator[Notice]:
    old, new = _both(before, after, ConditionType.READY)
    if new is None or (old is not None and old.status is new.status):
        return
    if new.status is ConditionStatus.TRUE:
        yield Notice("Ready", new.message)
    elif old is not None:
        yield Notice("NotReady", f"{new.reason}: {new.message}", warning=True)


def _both(
    before: InferenceServiceStatus, after: InferenceServiceStatus, kind: ConditionType
) -> tuple[Condition | None, Condition | None]:
    return before.condition(kind), after.condition(kind)


def _same(old: Condition | None, new: Condition) -> bool:
    return old is not None and (old.status, old.reason) == (new.status, new.reason)
