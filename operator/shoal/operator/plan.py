"""The planner: from what is wanted and what is there, to what to do next. Pure.

Appliers perform the actions in their order and plan again. Each action is durable by itself
(a pod's drain mark, a table, a record), so being killed between any two of them, or acting on
an outdated observation, leads back here and nowhere else. A drain goes in three steps that
anyone may repeat: the pod is marked, the table tells the routers, and once they have no request
there any more, or `drainSeconds` have passed, it is deleted.

A spec that is refused, or paused, freezes the revisions that serve; scaling and repair go on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from shoal.api.routes import RouteTable
from shoal.api.types import InferenceService, InferenceServiceStatus
from shoal.operator.build import Pod, PodDefaults, build_pod, pod_name
from shoal.operator.observe import Observed, ObservedPod
from shoal.operator.revision import Revision, revision_of
from shoal.operator.rollout import Bounds, Member, Moves, next_moves
from shoal.operator.status import Refusal, Situation, build_status
from shoal.operator.table import closed_table, frozen_table, route_table
from shoal.operator.unsupported import unsupported

KILL_SECONDS = 10.0  # a pod that is deleted has no requests left, or is past its time
DEFAULT_DRAIN_SECONDS = 60


@dataclass(frozen=True, slots=True)
class SaveRevision:
    """Remember the spec of a revision before the first of its pods is made."""

    revision: Revision


@dataclass(frozen=True, slots=True)
class CreatePod:
    pod: Pod


@dataclass(frozen=True, slots=True)
class DrainPod:
    """Mark the pod with the time from which `drainSeconds` count."""

    name: str


@dataclass(frozen=True, slots=True)
class ResumePod:
    """Take the mark back: the pod is wanted again."""

    name: str


@dataclass(frozen=True, slots=True)
class WriteRoutes:
    table: RouteTable


@dataclass(frozen=True, slots=True)
class DeletePod:
    """End the pod, by force after `grace_seconds`."""

    name: str
    grace_seconds: float


@dataclass(frozen=True, slots=True)
class ForgetRevision:
    name: str


@dataclass(frozen=True, slots=True)
class RemoveRoutes:
    """The service is gone: routers forget it."""


Action = (
    SaveRevision
    | CreatePod
    | DrainPod
    | ResumePod
    | WriteRoutes
    | DeletePod
    | ForgetRevision
    | RemoveRoutes
)


@dataclass(frozen=True, slots=True)
class Plan:
    actions: tuple[Action, ...]
    status: InferenceServiceStatus


def plan(
    service: InferenceService,
    observed: Observed,
    now: float,
    defaults: PodDefaults = PodDefaults(),  # noqa: B008  # frozen
) -> Plan:
    """What to do next for `service`, and its status as observed. `now` in Unix seconds."""
    refusals = refusals_of(service, observed)
    frozen = bool(refusals) or service.spec.paused
    wanted = revision_of(service.spec)
    active = _active(observed)
    target = active if frozen else wanted
    bounds = _bounds(service)

    moves = next_moves(
        [_member(pod, observed, target, active, frozen) for pod in observed.pods],
        bounds,
        can_repair=not frozen and active not in (None, target),
    )
    leaving = _leaving(observed, moves)
    saved = {revision.name: revision for revision in observed.revisions}
    if not frozen:
        saved.setdefault(wanted, Revision(wanted, _time(now), service.spec))
    table = frozen_table(observed, leaving) if refusals else route_table(service, observed, leaving)
    situation = Situation(service, observed, bounds, target, active, refusals)
    drain_seconds = service.spec.rollout.drain_seconds
    actions: list[Action] = [
        *_creations(service, observed, moves, target, active, saved, defaults),
        *(ResumePod(name) for name in moves.resume),
        *(DrainPod(name) for name in moves.drain),
        *([WriteRoutes(table)] if table is not None and table != observed.table else []),
        *(
            DeletePod(pod.name, KILL_SECONDS)
            for pod in observed.pods
            if pod.name not in moves.resume and _may_go(pod, observed, drain_seconds, now)
        ),
    ]
    status = build_status(situation, now)
    if situation.complete:
        kept = {wanted, target, status.active_revision, status.previous_revision}
        actions += [ForgetRevision(r.name) for r in observed.revisions if r.name not in kept]
    return Plan(tuple(actions), status)


def plan_removal(observed: Observed, now: float) -> tuple[Action, ...]:
    """What to do next for a service that nobody wants any more; () once nothing is left."""
    if not observed.pods:
        return (RemoveRoutes(),) if observed.table is not None else ()
    drain = {r.name: r.spec.rollout.drain_seconds for r in observed.revisions}
    table = closed_table(observed)
    return (
        *(DrainPod(pod.name) for pod in observed.pods if not pod.retiring),
        *([WriteRoutes(table)] if table is not None and table != observed.table else []),
        *(
            DeletePod(pod.name, KILL_SECONDS)
            for pod in observed.pods
            if _may_go(pod, observed, drain.get(pod.revision, DEFAULT_DRAIN_SECONDS), now)
        ),
    )


def refusals_of(service: InferenceService, observed: Observed) -> tuple[Refusal, ...]:
    """Why the spec cannot be acted on; () where it can."""
    return (
        *(Refusal("NotSupported", sentence) for sentence in unsupported(service.spec)),
        *(
            Refusal(
                "ModelIdTaken",
                f"model id {claim.model_id} belongs to service {claim.owner}, which is older; "
                f"choose another in spec.model.name or spec.model.aliases",
            )
            for claim in observed.claims
        ),
    )


def _bounds(service: InferenceService) -> Bounds:
    rollout = service.spec.rollout
    return Bounds(service.spec.replicas, rollout.max_surge, rollout.max_unavailable)


def _active(observed: Observed) -> str | None:
    """The revision that served last at full strength; before any did, that of the oldest pod."""
    if observed.status.active_revision is not None:
        return observed.status.active_revision
    staying = [pod for pod in observed.pods if not pod.retiring]
    return min(staying, key=lambda pod: (pod.created, pod.name)).revision if staying else None


def _member(
    pod: ObservedPod, observed: Observed, target: str | None, active: str | None, frozen: bool
) -> Member:
    return Member(
        name=pod.name,
        target=frozen or pod.revision == target,
        active=pod.revision == active,
        ready=pod.ready,
        routable=observed.routable(pod),
        draining=pod.drain_started is not None,
        deleting=pod.deleting,
        in_flight=observed.in_flight(pod),
        created=pod.created,
    )


def _leaving(observed: Observed, moves: Moves) -> frozenset[str]:
    retiring = {pod.name for pod in observed.pods if pod.retiring}
    return frozenset(retiring | set(moves.drain)) - set(moves.resume)


def _creations(
    service: InferenceService,
    observed: Observed,
    moves: Moves,
    target: str | None,
    active: str | None,
    saved: dict[str, Revision],
    defaults: PodDefaults,
) -> Iterator[Action]:
    """Pods of the active revision that repair it, then of the target; records before pods."""
    wanted = [active] * moves.repair + [target] * moves.create
    known = {revision.name for revision in observed.revisions}
    taken = {pod.name for pod in observed.pods}
    for name in wanted:
        revision = saved.get(name) if name is not None else None
        if revision is None:
            continue
        if revision.name not in known:
            known.add(revision.name)
            yield SaveRevision(revision)
        replica = 0
        while pod_name(service.name, revision.name, replica) in taken:
            replica += 1
        pod = build_pod(service, revision, replica, defaults)
        taken.add(pod.name)
        yield CreatePod(pod)


def _may_go(pod: ObservedPod, observed: Observed, drain_seconds: float, now: float) -> bool:
    if pod.deleting or pod.drain_started is None:
        return False
    return observed.drained(pod) or now >= pod.drain_started + drain_seconds


def _time(now: float) -> datetime:
    return datetime.fromtimestamp(int(now), UTC)
