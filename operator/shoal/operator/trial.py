"""A canary of one service between two plans: what is remembered, judged, decided and shown. Pure.

    routers' answers ─> a look every intervalSeconds ─> verdict ─┐
    observed pods, table, status ────────────────────────────────┴─> attend() ─> Attended

What the process remembers (counts at the last look, figures so far) may be lost at any time: the
status holds the step, its clock and the evidence, so that a restart neither repeats a step nor
gives chance another try.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final

from shoal.api import names
from shoal.api.rollout import CanarySpec
from shoal.api.status import CanaryEvidence, CanaryStatus
from shoal.api.types import InferenceService
from shoal.api.v1 import router_pb2
from shoal.operator.analysis import Analysis, Look, Opinion, Verdict, look, with_opinion
from shoal.operator.analysis_counts import Tally
from shoal.operator.analysis_evidence import Evidence
from shoal.operator.canary import WHOLE, CanaryState, Course, Situation, advance, describe
from shoal.operator.groups import groups_of
from shoal.operator.observe import Observed
from shoal.operator.rollout import Bounds
from shoal.operator.strategy import replicas_of

_FRESH: Final = Analysis()


@dataclass(frozen=True, slots=True)
class TrialState:
    """What one process remembers of one canary."""

    stable: str
    canary: str
    analysis: Analysis
    tally: Tally = field(default_factory=Tally)
    looked: float | None = None  # when, Unix seconds
    outcome: Look | None = None  # of the last look in this step
    stands: CanaryState | None = None  # where it was left; the status may not say so yet


@dataclass(frozen=True, slots=True)
class Attended:
    """The outcome: what to bring about, to remember and to show."""

    course: Course
    state: TrialState | None
    status: CanaryStatus | None
    healthy: bool | None  # for the condition CanaryHealthy; None: not judged, or no canary
    message: str


def attend(
    service: InferenceService,
    observed: Observed,
    answers: Mapping[str, router_pb2.ServiceLoad],
    wanted: str,
    bounds: Bounds,
    state: TrialState | None,
    now: float,
    opinion: Opinion | None = None,
) -> Attended:
    """What a service's canary asks for now; a course without a state where there is none.

    `answers` holds what routers said lately about the service, `wanted` is the spec's revision.
    `state` None: the process has just begun to look. `opinion` is the webhook's, where it has one.
    """
    observed = replace(observed, pods=tuple(g.as_replica() for g in groups_of(observed.pods)))
    spec, active = service.spec.rollout.canary, observed.status.active_revision
    shown = observed.status.canary
    if spec is None or active is None or active == wanted:
        return Attended(Course(None), None, None, None, "")
    if shown is not None and (shown.revision, shown.stable) != (wanted, active):
        shown = None
    if state is None or (state.stable, state.canary) != (active, wanted):
        evidence = shown.evidence if shown is not None else None
        state = TrialState(active, wanted, _analysis_of(evidence))
    stands = state.stands
    if stands is None and shown is not None:
        stands = _state_of(shown)
    if stands is None or stands.aborted is None:
        state = _looked(spec, state, stands, answers, now, opinion)
    situation = Situation(
        wanted=wanted,
        active=active,
        bounds=bounds,
        routable=Counter(r.revision for r in replicas_of(observed, None) if r.serving),
        existing=Counter(
            r.revision for r in replicas_of(observed, None) if not r.draining and not r.deleting
        ),
        in_force=_in_force(observed),
        paused=service.spec.paused,
        verdict=state.outcome.verdict if state.outcome is not None else None,
        message=state.outcome.message if state.outcome is not None else "",
        promoted=_promoted(service, wanted),
    )
    course = advance(spec, stands, situation, now)
    if course.state is not None:
        state = _moved(state, stands, course.state)
    if course.state is None:
        return Attended(course, state if not course.completed else None, None, None, "")
    return Attended(
        course,
        state,
        _status(spec, course, course.state, state),
        _healthy(course.state, state),
        describe(spec, course.state),
    )


def _moved(state: TrialState, before: CanaryState | None, now: CanaryState) -> TrialState:
    """`state` where the canary stands now. A step is judged by its own requests."""
    state = replace(state, stands=now)
    if before is None or before.step == now.step:
        return state
    return replace(state, outcome=None, analysis=replace(state.analysis, judged=0))


def _looked(
    spec: CanarySpec,
    state: TrialState,
    stands: CanaryState | None,
    answers: Mapping[str, router_pb2.ServiceLoad],
    now: float,
    opinion: Opinion | None,
) -> TrialState:
    """`state` after a look, if one is due. The first one only notes where the counts begin."""
    if spec.analysis is None:
        return state
    if state.looked is not None and now < state.looked + spec.analysis.interval_seconds:
        return state
    tally, stable, canary = state.tally.next(answers, state.stable, state.canary)
    state = replace(state, tally=tally, looked=now)
    outcome = look(spec.analysis, state.analysis, stable, canary, alone=_alone(spec, stands))
    if outcome is None:
        return state
    if spec.analysis.webhook is not None:
        outcome = with_opinion(spec.analysis, state.analysis, outcome, opinion)
    return replace(state, analysis=outcome.analysis, outcome=outcome)


def _alone(spec: CanarySpec, stands: CanaryState | None) -> bool:
    """Whether every router sends all requests to the new revision."""
    if stands is None or stands.since is None:
        return False
    return spec.steps[min(stands.step, len(spec.steps) - 1)].weight == WHOLE


def _in_force(observed: Observed) -> Mapping[str, int] | None:
    """The table's weights, once every router that answers acts on them."""
    table = observed.table
    if table is None or not observed.routers:
        return None
    heard = all(router.generation >= table.generation for router in observed.routers)
    return table.weights if heard else None


def _promoted(service: InferenceService, revision: str) -> int | None:
    """The step that a person lets pass; None where the annotation is about another revision."""
    text = service.metadata.annotations.get(names.ANNOTATION_PROMOTE, "")
    name, _, step = text.partition(":")
    return int(step) if name == revision and step.isascii() and step.isdigit() else None


def _healthy(state: CanaryState, trial: TrialState) -> bool | None:
    if state.aborted is not None:
        return False
    if trial.outcome is None or trial.outcome.verdict is Verdict.WAITING:
        return None
    return trial.outcome.verdict is Verdict.HEALTHY


def _status(
    spec: CanarySpec, course: Course, state: CanaryState, trial: TrialState
) -> CanaryStatus:
    weights = course.weights or {}
    return CanaryStatus(
        revision=state.revision,
        stable=state.stable,
        weight=weights.get(state.revision, 0),
        step=state.step,
        step_time=_time(state.since),
        aborted_time=_time(state.aborted),
        last_analysis=state.message or None,
        evidence=_evidence_of(trial.analysis) if spec.analysis is not None else None,
    )


def _state_of(status: CanaryStatus) -> CanaryState:
    since, aborted = status.step_time, status.aborted_time
    return CanaryState(
        revision=status.revision,
        stable=status.stable,
        step=status.step,
        since=since.timestamp() if since is not None else None,
        aborted=aborted.timestamp() if aborted is not None else None,
        message=status.last_analysis or "",
    )


def _evidence_of(analysis: Analysis) -> CanaryEvidence:
    return CanaryEvidence(
        requests=analysis.requests,
        failures=analysis.failures,
        judged=analysis.judged,
        failed_looks=analysis.failed_looks,
        errors=_rounded(analysis.errors.logs),
        errors_alone=_rounded(analysis.errors_alone),
        ttft=_rounded(analysis.ttft.logs),
        itl=_rounded(analysis.itl.logs),
    )


def _analysis_of(evidence: CanaryEvidence | None) -> Analysis:
    """An analysis that goes on from the status; from nothing where it has none."""
    if evidence is None:
        return _FRESH
    return replace(
        _FRESH,
        requests=evidence.requests,
        failures=evidence.failures,
        judged=evidence.judged,
        failed_looks=evidence.failed_looks,
        errors=_restored(_FRESH.errors, evidence.errors),
        errors_alone=_restored(Evidence(_FRESH.errors_alone, ()), evidence.errors_alone).logs,
        ttft=_restored(_FRESH.ttft, evidence.ttft),
        itl=_restored(_FRESH.itl, evidence.itl),
    )


def _restored(fresh: Evidence, logs: tuple[float, ...]) -> Evidence:
    """Evidence of another release, with other guesses, is worth nothing."""
    return replace(fresh, logs=logs) if len(logs) == len(fresh.logs) else fresh


def _rounded(logs: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(round(value, 3) for value in logs)


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(int(seconds), UTC)
