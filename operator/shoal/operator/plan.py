"""The planner: from what is wanted and what is there, to what to do next. Pure.

Appliers perform the actions in their order and plan again. Each action is durable by itself
(a pod's drain mark, a table, a record), so being killed between any two of them, or acting on
an outdated observation, leads back here and nowhere else. A drain goes in three steps that
anyone may repeat: the pod is marked, the table tells the routers, and once they have no request
there any more, or `drainSeconds` have passed, it is deleted.

A spec that is refused, or paused, freezes the revisions that serve; scaling and repair go on.

A replica is a group of pods (`groups`). What is decided is decided for groups; actions name single
pods, so that whoever performs them knows nothing of groups: the mark of a drain is the leader's,
pods are made and deleted one by one, and what a crash left half-done is completed or taken away.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from shoal.api.routes import RouteTable
from shoal.api.types import InferenceService, InferenceServiceStatus
from shoal.operator.build import STOP_MARGIN_SECONDS, Pod, build_group
from shoal.operator.groups import Group, groups_of
from shoal.operator.metadata import pod_name
from shoal.operator.observe import Observed, ObservedPod
from shoal.operator.overlay import OverlayError, overlay_problems
from shoal.operator.platform import KUBERNETES, Platform
from shoal.operator.revision import Revision, revision_of
from shoal.operator.rollout import Bounds, Member, Moves, next_moves
from shoal.operator.scaler import planned_replicas
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
    """Mark the pod, the leader of its group, with the time from which `drainSeconds` count."""

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
    platform: Platform = KUBERNETES,
) -> Plan:
    """What to do next for `service`, and its status as observed. `now` in Unix seconds."""
    groups = groups_of(observed.pods)
    # From here on a group counts as one pod under its leader's name.
    observed = replace(observed, pods=tuple(group.as_replica() for group in groups))
    refusals = refusals_of(service, observed, platform)
    frozen = bool(refusals) or service.spec.paused
    wanted = revision_of(service.spec, platform.pods)
    active = _active(observed)
    target = active if frozen else wanted
    bounds = _bounds(service, observed)

    members = [
        _member(pod, observed, target, active, frozen)
        for pod in observed.pods
        if not observed.gone(pod)
    ]
    moves = next_moves(members, bounds, can_repair=not frozen and active not in (None, target))
    leaving = _leaving(observed, moves)
    saved = {revision.name: revision for revision in observed.revisions}
    if not frozen:
        saved.setdefault(wanted, Revision(wanted, _time(now), service.spec, platform.pods))
    key = platform.service_key(service)
    table = frozen_table(observed, leaving)
    if not refusals:
        table = route_table(service, key, observed, leaving)
    situation = Situation(service, observed, bounds, target, active, refusals)
    leave = _Departure(observed, service.spec.rollout.drain_seconds, now)
    replaced = sum(m.target and m.routable for m in members) >= bounds.replicas
    actions: list[Action] = [
        *(ResumePod(name) for name in moves.resume),
        *(DrainPod(name) for name in moves.drain),
        *([WriteRoutes(table)] if table is not None and table != observed.table else []),
        *(
            action
            for group in groups
            if group.name not in moves.resume
            for action in leave.deletions(group, replaced=replaced)
        ),
        # Last, as a cluster may refuse a pod: nothing else waits for it.
        *_completions(service, groups, moves, saved),
        *_creations(service, observed, moves, target, active, saved),
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
    groups = groups_of(observed.pods)
    observed = replace(observed, pods=tuple(group.as_replica() for group in groups))
    drain = {r.name: r.spec.rollout.drain_seconds for r in observed.revisions}
    table = closed_table(observed)
    return (
        *(DrainPod(pod.name) for pod in observed.pods if not pod.retiring),
        *([WriteRoutes(table)] if table is not None and table != observed.table else []),
        *(
            action
            for group in groups
            for action in _Departure(
                observed, drain.get(group.revision, DEFAULT_DRAIN_SECONDS), now
            ).deletions(group, replaced=False)
        ),
    )


def refusals_of(
    service: InferenceService, observed: Observed, platform: Platform
) -> tuple[Refusal, ...]:
    """Why the spec cannot be acted on; () where it can."""
    return (
        *(Refusal("NotSupported", sentence) for sentence in unsupported(service.spec, platform)),
        *(
            Refusal("InvalidOverlay", sentence)
            for sentence in _overlay_faults(service, observed, platform)
        ),
        *(
            Refusal(
                "ModelIdTaken",
                f"model id {claim.model_id} belongs to service {claim.owner}, which is older; "
                f"choose another in spec.model.name or spec.model.aliases",
            )
            for claim in observed.claims
        ),
    )


def _overlay_faults(service: InferenceService, observed: Observed, platform: Platform) -> list[str]:
    """What is wrong with the overlays that pods of the spec would have."""
    if platform.processes or not (service.spec.pod_overlay or platform.pods.pod_overlay):
        return []
    wanted = revision_of(service.spec, platform.pods)
    if any(revision.name == wanted for revision in observed.revisions):
        return []  # it was saved because its pods could be made
    faults = [f"spec.podOverlay.{fault}" for fault in overlay_problems(service.spec.pod_overlay)]
    if not faults:
        try:
            build_group(service, Revision("0" * 10, _time(0), service.spec, platform.pods), 0)
        except OverlayError as error:
            faults.append(str(error))
    return faults


def _bounds(service: InferenceService, observed: Observed) -> Bounds:
    rollout = service.spec.rollout
    replicas = planned_replicas(service, observed)
    return Bounds(replicas, rollout.max_surge, rollout.max_unavailable)


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


def _completions(
    service: InferenceService,
    groups: Sequence[Group],
    moves: Moves,
    saved: Mapping[str, Revision],
) -> Iterator[Action]:
    """The pods that groups still lack of which no pod has run yet."""
    for group in groups:
        revision = saved.get(group.revision)
        if group.unfinished and revision is not None and group.name not in moves.drain:
            pods = build_group(service, revision, group.replica)
            yield from (CreatePod(pod) for pod in pods if pod.member in group.missing)


def _creations(
    service: InferenceService,
    observed: Observed,
    moves: Moves,
    target: str | None,
    active: str | None,
    saved: Mapping[str, Revision],
) -> Iterator[Action]:
    """Groups of the active revision that repair it, then of the target; records before pods."""
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
        while (leader := pod_name(service.name, revision.name, replica)) in taken:
            replica += 1
        taken.add(leader)
        yield from (CreatePod(pod) for pod in build_group(service, revision, replica))


@dataclass(frozen=True, slots=True)
class _Departure:
    """Which pods of a group may be deleted now."""

    observed: Observed  # with one pod a group
    drain_seconds: float
    now: float

    def deletions(self, group: Group, *, replaced: bool) -> Iterator[DeletePod]:
        """`replaced`: as many serve as are wanted, so nobody waits for a node to come back."""
        replica = group.as_replica()
        stray = self.observed.gone(replica) and replica.drain_started is None
        if group.broken or (stray and replaced) or self._may_go(replica):
            grace = KILL_SECONDS
        elif group.leaving:
            # Somebody deletes a member: the others end their requests as it does.
            grace = self.drain_seconds + STOP_MARGIN_SECONDS
        else:
            return
        yield from (DeletePod(pod.name, grace) for pod in group.pods if not pod.deleting)

    def _may_go(self, replica: ObservedPod) -> bool:
        if replica.deleting or replica.drain_started is None:
            return False
        drained = self.observed.drained(replica)
        return drained or self.now >= replica.drain_started + self.drain_seconds


def _time(now: float) -> datetime:
    return datetime.fromtimestamp(int(now), UTC)
