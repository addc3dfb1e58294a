"""Status: what people and scripts read of a service, as a pure function of what was observed.

Conditions, never a phase. Messages hold no clock and no counter that runs by itself, so that
nothing is written while nothing changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from shoal.api.types import (
    BlueGreenStatus,
    Condition,
    ConditionStatus,
    ConditionType,
    InferenceService,
    InferenceServiceStatus,
)
from shoal.operator.inplace import failure
from shoal.operator.metadata import selector
from shoal.operator.observe import Observed, ObservedPod, ScalingView, TrialView
from shoal.operator.rollout import Bounds
from shoal.operator.strategy import Goal, Steps

TRUE, FALSE, UNKNOWN = ConditionStatus.TRUE, ConditionStatus.FALSE, ConditionStatus.UNKNOWN
CRASH_LOOP: Final = "CrashLoopBackOff"
FETCHING: Final = "FetchingModel"
FETCH_FAILED: Final = "FetchFailed"
WOKEN: Final = "WokenByRequest"  # the autoscaler's word


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the spec is not acted on."""

    reason: str  # NotSupported | InvalidOverlay | ModelIdTaken
    message: str


@dataclass(frozen=True, slots=True)
class Situation:
    """One service's state, counted once for all conditions."""

    service: InferenceService
    observed: Observed
    goal: Goal
    steps: Steps
    refusals: Sequence[Refusal]
    spec_revision: str  # that the spec describes
    back: bool = False  # another, earlier one is wanted

    @property
    def target(self) -> str | None:
        """The revision that is being brought about; None: there is none."""
        return self.goal.target

    @property
    def bounds(self) -> Bounds:
        return self.goal.bounds

    @property
    def revisions_kept(self) -> frozenset[str]:
        """Revisions whose replicas stay without requests."""
        return self.steps.idle

    @property
    def given_up(self) -> bool:
        """The wanted revision has failed its trial."""
        trial = self.observed.trial
        return (
            trial is not None
            and trial.course.state is not None
            and trial.course.state.aborted is not None
        )

    @property
    def serving(self) -> int:
        """Routable replicas of the target revision, or of any where the spec is frozen."""
        return sum(
            self.observed.routable(pod) and (self.goal.frozen or pod.revision == self.target)
            for pod in self.observed.pods
        )

    @property
    def staying(self) -> list[ObservedPod]:
        return [
            pod
            for pod in self.observed.pods
            if self.observed.stays(pod) and pod.revision not in self.steps.idle
        ]

    @property
    def ready(self) -> int:
        return sum(pod.ready for pod in self.staying)

    @property
    def routable(self) -> int:
        return sum(map(self.observed.routable, self.staying))

    @property
    def complete(self) -> bool:
        """Whether the target revision serves at full strength, alone."""
        observed, staying = self.observed, self.staying
        return (
            self.target is not None
            and self.observed.trial is None
            and len(staying) == self.bounds.replicas
            and all(observed.routable(pod) for pod in staying)
            and all(
                p.revision == self.target or p.revision in self.steps.idle
                for p in observed.pods
                if not observed.gone(p)
            )
        )

    @property
    def failing(self) -> list[ObservedPod]:
        return [pod for pod in self.staying if pod.failing]

    @property
    def lost(self) -> list[ObservedPod]:
        """Replicas that were lost and are not being deleted yet."""
        return [pod for pod in self.observed.pods if pod.lost and not pod.deleting]


def build_status(situation: Situation, now: float) -> InferenceServiceStatus:
    """The status to show; transition times move only where a condition's status does."""
    observed, generation = situation.observed, situation.service.metadata.generation or 0
    before = observed.status
    active, previous = before.active_revision, before.previous_revision
    promoted = situation.steps.promoted or (situation.target if situation.complete else None)
    blue_green = _blue_green(situation, now)
    if promoted is not None and promoted != active:
        active, previous = promoted, active
    return InferenceServiceStatus(
        observed_generation=generation,
        desired_replicas=situation.bounds.replicas,
        replicas=sum(not pod.deleting for pod in observed.pods),
        ready_replicas=situation.ready,
        routable_replicas=situation.routable,
        selector=selector(situation.service.name),
        url=observed.url,
        spec_revision=situation.spec_revision,
        active_revision=active,
        previous_revision=previous,
        canary=observed.trial.status if observed.trial is not None else None,
        blue_green=blue_green,
        in_place=situation.steps.in_place,
        autoscaling=observed.scaling.status if observed.scaling is not None else None,
        cold_start=observed.cold_start or before.cold_start,
        conditions=tuple(
            _dated(condition, before, generation, now) for condition in _conditions(situation)
        ),
    )


def _blue_green(situation: Situation, now: float) -> BlueGreenStatus | None:
    """What is kept for the way back, since when."""
    before, kept = situation.observed.status, situation.steps.kept
    if kept is None:
        return None
    if before.blue_green is not None and before.blue_green.kept == kept:
        return before.blue_green
    return BlueGreenStatus(kept=kept, switch_time=datetime.fromtimestamp(int(now), UTC))


@dataclass(frozen=True, slots=True)
class _Verdict:
    type: ConditionType
    status: ConditionStatus
    reason: str
    message: str


def _conditions(situation: Situation) -> list[_Verdict]:
    scaling, trial = situation.observed.scaling, situation.observed.trial
    return [
        _ready(situation),
        _model_cached(situation),
        _replicas_ready(situation),
        _routable(situation),
        _progressing(situation),
        *([_canary_healthy(trial)] if trial is not None and trial.status is not None else []),
        *([_scaling_active(scaling)] if scaling is not None else []),
        _degraded(situation),
    ]


def _canary_healthy(trial: TrialView) -> _Verdict:
    status, reason = {
        True: (TRUE, "NoWorse"),
        False: (FALSE, "Worse"),
        None: (UNKNOWN, "NotJudged"),
    }[trial.healthy]
    return _Verdict(ConditionType.CANARY_HEALTHY, status, reason, trial.message)


def _scaling_active(scaling: ScalingView) -> _Verdict:
    status = TRUE if scaling.active else FALSE
    return _Verdict(ConditionType.SCALING_ACTIVE, status, scaling.reason, scaling.message)


def _at_zero(kind: ConditionType, situation: Situation) -> _Verdict:
    """Nobody serves, as it is wanted."""
    if situation.service.spec.replicas and situation.observed.scaling is not None:
        message = "no request came for spec.autoscaling.scaleToZero.idleSeconds; the next one "
        return _Verdict(kind, FALSE, "ScaledToZero", f"{message}starts a replica")
    return _Verdict(kind, FALSE, "ScaledToZero", "spec.replicas is 0")


def _ready(situation: Situation) -> _Verdict:
    kind, wanted = ConditionType.READY, situation.bounds.replicas
    if situation.refusals:
        return _refused(kind, situation)
    if not wanted:
        return _at_zero(kind, situation)
    if situation.routable >= max(1, situation.bounds.floor):
        message = f"{situation.routable} of {wanted} replicas take requests"
        return _Verdict(kind, TRUE, "Serving", message)
    cause = _replicas_ready(situation)
    if cause.status is TRUE:
        cause = _routable(situation)
    return _Verdict(kind, FALSE, cause.reason, cause.message)


def _model_cached(situation: Situation) -> _Verdict:
    """A worker fetches its model before it loads it, so one that is ready proves the copy."""
    loaded = any(pod.ready and pod.revision == situation.target for pod in situation.staying)
    kind, uri = ConditionType.MODEL_CACHED, situation.service.spec.model.uri
    served = situation.observed.status.active_revision
    if loaded or (situation.target is not None and situation.target == served):
        return _Verdict(kind, TRUE, "Loaded", f"{uri} is here")
    mine = [pod for pod in situation.staying if pod.revision == situation.target]
    for pod in mine:
        if pod.reason == FETCH_FAILED:
            return _Verdict(kind, FALSE, FETCH_FAILED, f"{uri}: {_pod_sentence(pod)}")
    percents = [pod.fetched for pod in mine if pod.fetched is not None]
    if percents or any(pod.reason == FETCHING for pod in mine):
        so_far = f", {max(percents)} % so far" if percents else ""
        return _Verdict(kind, FALSE, FETCHING, f"{uri} is being downloaded{so_far}")
    return _Verdict(kind, UNKNOWN, "NotLoadedYet", f"no replica has loaded {uri} yet")


def _replicas_ready(situation: Situation) -> _Verdict:
    kind, wanted = ConditionType.REPLICAS_READY, situation.bounds.replicas
    message = f"{situation.ready} of {wanted} replicas are ready"
    if situation.ready >= wanted:
        return _Verdict(kind, TRUE, "AllReady", message)
    waiting = sorted(
        [*(pod for pod in situation.staying if not pod.ready), *situation.lost],
        key=lambda pod: (not pod.failing, not pod.lost, pod.name),
    )
    if (rejected := situation.observed.rejected) is not None:
        return _Verdict(kind, FALSE, "PodRejected", f"{message}; {rejected}")
    if not waiting:
        return _Verdict(kind, FALSE, "TooFewReplicas", message)
    first = waiting[0]
    return _Verdict(kind, FALSE, first.reason or "Starting", f"{message}; {_pod_sentence(first)}")


def _routable(situation: Situation) -> _Verdict:
    kind, routable = ConditionType.ROUTABLE, situation.routable
    if routable:
        return _Verdict(
            kind,
            TRUE,
            "Admitted",
            f"routers send requests to {routable} of {situation.bounds.replicas} replicas",
        )
    if not situation.bounds.replicas:
        return _at_zero(kind, situation)
    if not situation.ready:
        return _Verdict(kind, FALSE, "NotReady", "no replica is ready")
    if not situation.observed.routers:
        return _Verdict(kind, FALSE, "NoRouter", "no router answers")
    return _Verdict(kind, FALSE, "NotAdmitted", "no router has connected to a ready replica yet")


def _progressing(situation: Situation) -> _Verdict:
    kind, target = ConditionType.PROGRESSING, situation.target
    if situation.refusals:
        return _refused(kind, situation)
    if situation.service.spec.paused:
        return _Verdict(kind, UNKNOWN, "Paused", "spec.paused holds back new revisions")
    trial = situation.observed.trial
    if trial is not None and situation.given_up:
        return _Verdict(kind, FALSE, "CanaryFailed", trial.message)
    if situation.complete:
        wanted = situation.bounds.replicas
        message = f"revision {target} serves with {wanted} of {wanted} replicas{_asides(situation)}"
        return _Verdict(kind, TRUE, "Complete", message)
    if (rejected := situation.observed.rejected) is not None:
        return _Verdict(kind, FALSE, "PodRejected", rejected)
    if failing := [pod for pod in situation.failing if pod.revision == target]:
        return _Verdict(kind, FALSE, "ReplicaFails", _pod_sentence(failing[0]))
    if trial is not None and trial.status is not None:
        return _Verdict(kind, TRUE, "Canary", trial.message)
    if situation.steps.in_place is None and (said := failure(situation.observed, target)):
        return _Verdict(kind, FALSE, "SwapFailed", said)
    mine = [pod for pod in situation.staying if pod.revision == target]
    routable = sum(map(situation.observed.routable, mine))
    observed = situation.observed
    others = sum(not observed.gone(pod) for pod in observed.pods) - len(mine)
    message = f"revision {target}: {routable} of {situation.bounds.replicas} replicas take requests"
    if others:
        message += f"; {others} of other revisions still there"
    message += _asides(situation)
    rolling = others or target != situation.observed.status.active_revision
    return _Verdict(kind, TRUE, "RollingOut" if rolling else "ReplicasUpdating", message)


def _asides(situation: Situation) -> str:
    """What is out of the ordinary in how the target revision takes over."""
    said = ""
    if situation.back:
        said += "; spec.rollout.rollbackTo asks for it, and taking that out leads forward again"
    if (refusal := situation.steps.in_place) is not None:
        said += f"; replica by replica, not in place: {refusal.message}"
    if (kept := situation.steps.kept) is not None:
        said += f"; replicas of revision {kept} stay for the way back"
    return said


def _degraded(situation: Situation) -> _Verdict:
    kind = ConditionType.DEGRADED
    if situation.refusals:
        refusal = situation.refusals[0]
        return _Verdict(kind, TRUE, refusal.reason, _sentences(situation.refusals))
    if (rejected := situation.observed.rejected) is not None:
        return _Verdict(kind, TRUE, "PodRejected", rejected)
    if situation.failing:
        return _Verdict(kind, TRUE, "ReplicaFails", _pod_sentence(situation.failing[0]))
    if situation.lost:
        lost = situation.lost[0]
        return _Verdict(kind, TRUE, lost.reason or "ReplicaLost", _pod_sentence(lost))
    served = situation.observed.status.active_revision is not None
    if served and situation.bounds.replicas and not situation.routable and not _wakes(situation):
        return _Verdict(kind, TRUE, "NobodyServes", _ready(situation).message)
    return _Verdict(kind, FALSE, "AsWanted", "")


def _wakes(situation: Situation) -> bool:
    """Whether a service that was at zero starts its first replicas, as it is meant to."""
    scaling = situation.observed.scaling
    woken = scaling is not None and scaling.status.reason == WOKEN
    return woken and not any(pod.restarts for pod in situation.staying)


def _refused(kind: ConditionType, situation: Situation) -> _Verdict:
    return _Verdict(kind, FALSE, situation.refusals[0].reason, _sentences(situation.refusals))


def _sentences(refusals: Sequence[Refusal]) -> str:
    return "; ".join(refusal.message for refusal in refusals)


def _pod_sentence(pod: ObservedPod) -> str:
    return f"{pod.name}: {pod.message or pod.reason or 'starting'}"


def _dated(
    verdict: _Verdict, before: InferenceServiceStatus, generation: int, now: float
) -> Condition:
    last = before.condition(verdict.type)
    if last is not None and last.status is verdict.status:
        moved = last.last_transition_time
    else:
        moved = datetime.fromtimestamp(int(now), UTC)
    return Condition(
        type=verdict.type,
        status=verdict.status,
        reason=verdict.reason,
        message=verdict.message,
        last_transition_time=moved,
        observed_generation=generation,
    )
