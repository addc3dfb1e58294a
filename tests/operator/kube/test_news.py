"""Which changes are worth an event."""

from datetime import UTC, datetime

from shoal.api.types import Condition, ConditionStatus, ConditionType, InferenceServiceStatus
from shoal.operator.kube.news import news, pod_news
from shoal.operator.observe import ObservedPod

TRUE, FALSE = ConditionStatus.TRUE, ConditionStatus.FALSE


def of(kind: ConditionType, status: ConditionStatus, reason: str) -> InferenceServiceStatus:
    condition = Condition(
        type=kind,
        status=status,
        reason=reason,
        message="words",
        last_transition_time=datetime(2026, 1, 1, tzinfo=UTC),
    )
    return InferenceServiceStatus(conditions=(condition,))


def told(before: InferenceServiceStatus, after: InferenceServiceStatus) -> list[tuple[str, bool]]:
    return [(notice.reason, notice.warning) for notice in news(before, after)]


def test_a_rollout_is_told_when_it_begins_and_when_it_is_complete() -> None:
    """The steps between are in the condition."""
    kind, nothing = ConditionType.PROGRESSING, InferenceServiceStatus()
    rolling = of(kind, TRUE, "RollingOut")
    assert told(nothing, rolling) == [], "who has just made it knows"
    assert told(of(kind, TRUE, "Complete"), rolling) == [("RolloutStarted", False)]
    assert told(rolling, rolling) == []
    assert told(rolling, of(kind, TRUE, "Complete")) == [("RolloutComplete", False)]
    assert told(rolling, of(kind, FALSE, "ReplicaFails")) == [("ReplicaFails", True)]


def test_trouble_is_told_when_it_comes_changes_and_goes() -> None:
    """A new service that is not degraded is no news."""
    kind, nothing = ConditionType.DEGRADED, InferenceServiceStatus()
    fine, bad = of(kind, FALSE, "AsWanted"), of(kind, TRUE, "CrashLoopBackOff")
    assert told(nothing, fine) == []
    assert told(fine, bad) == [("CrashLoopBackOff", True)]
    assert told(bad, of(kind, TRUE, "OOMKilled")) == [("OOMKilled", True)]
    assert told(bad, fine) == [("Recovered", False)]


def test_readiness_is_told_when_it_turns() -> None:
    """A service that is not ready yet is no news; why it is not may change often."""
    kind, nothing = ConditionType.READY, InferenceServiceStatus()
    ready, starting = of(kind, TRUE, "Serving"), of(kind, FALSE, "Starting")
    assert told(nothing, starting) == []
    assert told(starting, of(kind, FALSE, "NoRouter")) == []
    assert told(starting, ready) == [("Ready", False)]
    assert told(ready, starting) == [("NotReady", True)]


def test_a_pod_that_fails_or_is_lost_is_told_by_name() -> None:
    """One that is only starting is not."""
    pods = [
        ObservedPod("a", "r", 0, 0.0, reason="Starting"),
        ObservedPod("b", "r", 1, 0.0, reason="Evicted", message="disk"),
        ObservedPod("c", "r", 2, 0.0, reason="CrashLoopBackOff"),
    ]
    found = [(notice.reason, notice.message) for notice in pod_news(pods)]
    assert found == [("Evicted", "b: disk"), ("CrashLoopBackOff", "c: CrashLoopBackOff")]
