"""A new revision takes over step by step: which weight is next, as a pure function.

    step 0 .. n-1, each:  enough replicas of the new revision are routable
                          -> its weight is in force at every router   (the step's clock starts)
                          -> its time is over, the analysis is content, nobody holds it
    after the last:       promoted: the new revision is the active one
    at any time:          the analysis fails -> weight 0 at once, aborted

Every fact is in the state, which the status keeps, or in what is observed, so it may be killed and
called again anywhere: a state that was not written is decided again, with a later clock. An aborted
revision stays aborted until another one is wanted; a spec that goes back to the active revision
ends the canary. A third revision begins at step 0, against the same stable one.

A step waits for the analysis: while it has too few requests or a look has just failed, time alone
does not promote. `promoted` (the index of a step, given by a person) passes that and any pause.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from types import MappingProxyType
from typing import Final

from shoal.api.rollout import CanarySpec, CanaryStep
from shoal.operator.analysis import Verdict
from shoal.operator.rollout import Bounds

WHOLE: Final = 100


@dataclass(frozen=True, slots=True)
class CanaryState:
    """Where a canary stands. Times are Unix seconds."""

    revision: str  # on trial
    stable: str  # that serves the rest
    step: int = 0
    since: float | None = None  # when the step's weight came into force; None: not yet
    aborted: float | None = None  # when it was given up
    message: str = ""  # why, or the analysis' last sentence


@dataclass(frozen=True, slots=True)
class Situation:
    """What a canary has to know of the service."""

    wanted: str  # the revision of the spec
    active: str | None  # the one that served last at full strength
    bounds: Bounds
    routable: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    existing: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    in_force: Mapping[str, int] | None = None  # weights that every router acts on; None: not one
    paused: bool = False  # spec.paused
    verdict: Verdict | None = None  # of the analysis, since the canary began; None: no look yet
    message: str = ""  # the analysis' sentence
    promoted: int | None = None  # the last step that a person lets pass


@dataclass(frozen=True, slots=True)
class Course:
    """What is to be brought about now."""

    state: CanaryState | None  # to be kept; None: no canary
    weights: Mapping[str, int] | None = None  # by revision, in sum 100; None: as without a canary
    replicas: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))  # by revision
    completed: bool = False  # the new revision is the active one from now on


def advance(
    spec: CanarySpec | None, state: CanaryState | None, situation: Situation, now: float
) -> Course:
    """The next state of a canary, and the weights and replicas that belong to it."""
    stable, wanted = situation.active, situation.wanted
    if spec is None or stable is None or wanted == stable:
        return Course(None)
    if state is None or (state.revision, state.stable) != (wanted, stable):
        state = CanaryState(wanted, stable)
    state = replace(state, step=min(state.step, len(spec.steps) - 1))
    if not situation.bounds.replicas:
        # Nobody serves, so nothing is tried and nothing is promoted meanwhile.
        return Course(replace(state, since=None), _split(state, 0))
    if state.aborted is None and situation.verdict is Verdict.FAILED:
        state = replace(state, aborted=now, since=None, message=situation.message)
    if state.aborted is not None:
        return _aborted(spec, state, state.aborted, situation, now)

    if situation.message:
        state = replace(state, message=situation.message)
    state = _clocked(spec, state, situation, now)
    while _passed(spec, state, situation, now):
        if state.step == len(spec.steps) - 1:
            # Nothing is taken away before the promotion is written down.
            kept = _replicas(spec, state, situation)
            return Course(None, {wanted: WHOLE, stable: 0}, kept, completed=True)
        state = _clocked(spec, replace(state, step=state.step + 1, since=None), situation, now)
    return Course(state, _weights(spec, state, situation), _replicas(spec, state, situation))


def needed(replicas: int, weight: int) -> int:
    """Replicas that carry a share of `weight` percent as the others carry theirs; at least 1."""
    return max(1, ceil(replicas * weight / WHOLE))


def _clocked(spec: CanarySpec, state: CanaryState, situation: Situation, now: float) -> CanaryState:
    """`state` with the step's clock started, once its weight is in force."""
    if state.since is not None or situation.in_force is None:
        return state
    weights = {r: w for r, w in situation.in_force.items() if w}
    weight = spec.steps[state.step].weight
    wanted = {r: w for r, w in _split(state, weight).items() if w}
    return replace(state, since=now) if weights == wanted else state


def _passed(spec: CanarySpec, state: CanaryState, situation: Situation, now: float) -> bool:
    """Whether the present step is over."""
    if state.since is None or situation.paused:
        return False
    if situation.promoted is not None and situation.promoted >= state.step:
        return True
    judged = spec.analysis is None or situation.verdict is Verdict.HEALTHY
    step = spec.steps[state.step]
    return judged and not step.until_promoted and now >= state.since + step.pause_seconds


def _weights(spec: CanarySpec, state: CanaryState, situation: Situation) -> dict[str, int]:
    """The step's weight once enough replicas can carry it, until then the one before."""
    weight = spec.steps[state.step].weight
    enough = needed(situation.bounds.replicas, weight)
    if state.since is None and situation.routable.get(state.revision, 0) < enough:
        # A weight that is in force stays: replicas that are lost come back, or fail the analysis.
        weight = spec.steps[state.step - 1].weight if state.step else 0
    return _split(state, weight)


def _replicas(spec: CanarySpec, state: CanaryState, situation: Situation) -> dict[str, int]:
    bounds = situation.bounds
    canary = needed(bounds.replicas, spec.steps[state.step].weight)
    return {
        state.revision: canary,
        state.stable: max(0, min(bounds.replicas, bounds.limit - canary)),
    }


def _aborted(
    spec: CanarySpec, state: CanaryState, at: float, situation: Situation, now: float
) -> Course:
    """Everything to the stable revision, at full strength first. What the surge leaves room for
    stays for a while, to be looked at."""
    bounds = situation.bounds
    room = bounds.limit - bounds.replicas
    kept = min(room, situation.existing.get(state.revision, 0))
    if now >= at + spec.abort_retention_seconds:
        kept = 0
    replicas = {state.revision: kept, state.stable: bounds.replicas}
    return Course(state, _split(state, 0), replicas)


def _split(state: CanaryState, weight: int) -> dict[str, int]:
    return {state.revision: weight, state.stable: WHOLE - weight}


def describe(spec: CanarySpec, state: CanaryState) -> str:
    """Where it stands, as a sentence without a clock."""
    if state.aborted is not None:
        return f"revision {state.revision} was given up: {state.message}"
    step: CanaryStep = spec.steps[min(state.step, len(spec.steps) - 1)]
    place = f"step {state.step + 1} of {len(spec.steps)}, weight {step.weight}"
    if state.since is None:
        return f"{place}: waiting for replicas of revision {state.revision} and for routers"
    if step.until_promoted:
        return f"{place}: until somebody promotes it"
    return place
