"""What the strategy of a rollout asks for next: replicas by revision, and who gets requests. Pure.

    a revision on trial        canary, canary_moves
    BlueGreen                  bluegreen, canary_moves
    InPlace, where it goes     weights are swapped in replicas that run; others are replaced
    else                       rollout

Replicas are groups, each seen as one pod under its leader's name.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from shoal.api.routes import Pin
from shoal.api.types import BlueGreenSpec, InferenceService, InPlaceStatus, RolloutStrategy
from shoal.operator.bluegreen import Sets, held_sets, next_sets
from shoal.operator.canary_moves import Replica, canary_moves
from shoal.operator.inplace import next_swaps
from shoal.operator.observe import Observed, ObservedPod, TrialView
from shoal.operator.revision import Revision
from shoal.operator.rollout import Bounds, Member, next_moves


@dataclass(frozen=True, slots=True)
class Goal:
    """What is to be brought about."""

    target: str | None  # revision; None: the spec is refused and nothing has served
    active: str | None  # that served last at full strength
    bounds: Bounds
    frozen: bool  # no new revision may begin
    refused: bool  # the spec cannot be acted on
    saved: Mapping[str, Revision]  # whose replicas can be made


@dataclass(frozen=True, slots=True)
class Steps:
    """One round; applying any part of it and asking again is safe."""

    create: tuple[str, ...] = ()  # revisions, in order
    drain: tuple[str, ...] = ()  # replicas
    resume: tuple[str, ...] = ()
    swap: tuple[str, ...] = ()  # that are to serve the target revision
    weights: Mapping[str, int] | None = None  # in sum 100; None: by the number of replicas
    idle: frozenset[str] = frozenset()  # revisions whose replicas stay and serve nobody
    kept: str | None = None  # of these, that which stays for the way back
    promoted: str | None = None  # the revision that is the active one from now on
    pins: tuple[Pin, ...] = ()  # requests that go to a revision whatever its weight
    in_place: InPlaceStatus | None = None  # why weights are not swapped
    again: float | None = None  # seconds after which time alone changes this


def next_steps(service: InferenceService, observed: Observed, goal: Goal, now: float) -> Steps:
    """What to do next. `now` in Unix seconds."""
    rollout, active, target = service.spec.rollout, goal.active, goal.target
    if goal.frozen and active is not None and rollout.strategy is RolloutStrategy.BLUE_GREEN:
        return _held(observed, goal, active)
    if goal.refused or active is None or target is None:
        return _rolling(observed, goal, frozenset())
    if (trial := observed.trial) is not None and trial.course.weights is not None:
        return _on_trial(service, observed, goal, active, trial)
    if rollout.strategy is RolloutStrategy.BLUE_GREEN:
        return _blue_green(service, observed, goal, active, target, now)
    if rollout.strategy is RolloutStrategy.IN_PLACE and goal.frozen:
        return replace(_rolling(observed, goal, frozenset()), in_place=observed.status.in_place)
    if rollout.strategy is RolloutStrategy.IN_PLACE:
        swaps = next_swaps(observed, goal.bounds, target, active, goal.saved)
        steps = _rolling(observed, goal, swaps.pods)
        drained = set(steps.drain)
        swap = tuple(name for name in swaps.now if name not in drained)
        return replace(steps, swap=swap, in_place=swaps.refusal)
    return _rolling(observed, goal, frozenset())


def replicas_of(observed: Observed, weights: Mapping[str, int] | None) -> list[Replica]:
    """The service's replicas for `canary_moves`. `serving` are those that are routable and whose
    revision has a weight; `weights` None: every revision has one."""
    return [
        Replica(
            name=pod.name,
            revision=pod.revision,
            ready=pod.ready,
            serving=(weights is None or weights.get(pod.revision, 0) > 0)
            and observed.routable(pod),
            draining=pod.drain_started is not None,
            deleting=pod.deleting,
            in_flight=observed.in_flight(pod),
            warm=observed.warm(pod),
            created=pod.created,
        )
        for pod in observed.pods
        if not observed.gone(pod)
    ]


def _rolling(observed: Observed, goal: Goal, swappable: frozenset[str]) -> Steps:
    members = [
        _member(pod, observed, goal, swappable) for pod in observed.pods if not observed.gone(pod)
    ]
    can_repair = not goal.frozen and goal.active not in (None, goal.target)
    moves = next_moves(members, goal.bounds, can_repair=can_repair)
    made = [goal.active] * moves.repair + [goal.target] * moves.create
    return Steps(tuple(name for name in made if name is not None), moves.drain, moves.resume)


def _on_trial(
    service: InferenceService, observed: Observed, goal: Goal, active: str, trial: TrialView
) -> Steps:
    course, spec = trial.course, service.spec.rollout.canary
    assert course.weights is not None
    replicas = replicas_of(observed, course.weights)
    moves = canary_moves(replicas, course.replicas, active, goal.bounds)
    promoted = None
    if course.completed:
        promoted = next(name for name, weight in course.weights.items() if weight)
    aborted = course.state is not None and course.state.aborted is not None
    audience = spec.audience if spec is not None and course.state is not None else ()
    pins = tuple(
        Pin(header=one.header.lower(), value=one.value, revision=course.state.revision)
        for one in audience
        if course.state is not None and not aborted
    )
    idle = {name for name, weight in course.weights.items() if not weight}
    return Steps(
        moves.create,
        moves.drain,
        moves.resume,
        weights=course.weights,
        idle=frozenset(idle) if aborted else frozenset(),
        promoted=promoted,
        pins=pins,
    )


def _blue_green(
    service: InferenceService,
    observed: Observed,
    goal: Goal,
    active: str,
    target: str,
    now: float,
) -> Steps:
    spec = service.spec.rollout.blue_green
    staying = [pod for pod in observed.pods if observed.stays(pod)]
    sets = next_sets(
        target,
        active,
        goal.bounds,
        Counter(pod.revision for pod in staying),
        Counter(pod.revision for pod in staying if observed.routable(pod)),
        observed.status.blue_green,
        spec.keep_seconds if spec is not None else BlueGreenSpec().keep_seconds,
        now,
    )
    return _over_sets(observed, active, sets)


def _held(observed: Observed, goal: Goal, active: str) -> Steps:
    staying = [pod for pod in observed.pods if observed.stays(pod)]
    sets = held_sets(
        active,
        goal.bounds,
        Counter(pod.revision for pod in staying),
        observed.table.weights if observed.table is not None else {},
        observed.status.blue_green,
    )
    steps = _over_sets(observed, active, sets)
    idle = (name for name, weight in sets.weights.items() if not weight)
    return replace(steps, idle=frozenset(idle))


def _over_sets(observed: Observed, active: str, sets: Sets) -> Steps:
    moves = canary_moves(replicas_of(observed, sets.weights), sets.replicas, active, sets.room)
    serving = next(name for name, weight in sets.weights.items() if weight)
    return Steps(
        moves.create,
        moves.drain,
        moves.resume,
        weights=sets.weights,
        idle=frozenset({sets.kept} if sets.kept is not None else ()),
        kept=sets.kept,
        promoted=serving if sets.switched else None,
        again=sets.again,
    )


def _member(pod: ObservedPod, observed: Observed, goal: Goal, swappable: frozenset[str]) -> Member:
    return Member(
        name=pod.name,
        target=goal.frozen or pod.revision == goal.target or pod.name in swappable,
        active=pod.revision == goal.active,
        ready=pod.ready,
        routable=observed.routable(pod) and not (goal.frozen and _without_weight(pod, observed)),
        draining=pod.drain_started is not None,
        deleting=pod.deleting,
        in_flight=observed.in_flight(pod),
        warm=observed.warm(pod),
        created=pod.created,
    )


def _without_weight(pod: ObservedPod, observed: Observed) -> bool:
    """Whether the table in force keeps requests from the pod's revision."""
    weights = observed.table.weights if observed.table is not None else {}
    return weights.get(pod.revision) == 0 and any(weights.values())
