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

from shoal.api.types import InferenceService, InferenceServiceStatus
from shoal.operator.actions import (
    Action,
    CreatePod,
    DeletePod,
    DrainPod,
    ForgetRevision,
    MarkServed,
    RemoveRoutes,
    ResumePod,
    SaveRevision,
    SwapWeights,
    WriteRoutes,
)
from shoal.operator.build import STOP_MARGIN_SECONDS, build_group
from shoal.operator.groups import Group, groups_of
from shoal.operator.inplace import served
from shoal.operator.metadata import pod_name
from shoal.operator.observe import Observed, ObservedPod
from shoal.operator.overlay import OverlayError, overlay_problems
from shoal.operator.platform import KUBERNETES, Platform
from shoal.operator.revision import Revision, revision_of
from shoal.operator.rollout import Bounds
from shoal.operator.scaler import planned_replicas
from shoal.operator.status import Refusal, Situation, build_status
from shoal.operator.strategy import Goal, Steps, next_steps
from shoal.operator.table import closed_table, frozen_table, route_table
from shoal.operator.unsupported import unsupported
from shoal.operator.wanted import Wanted, unknown_sentence, wanted_revision

KILL_SECONDS = 10.0  # a pod that is deleted has no requests left, or is past its time
DEFAULT_DRAIN_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Plan:
    actions: tuple[Action, ...]
    status: InferenceServiceStatus
    again: float | None = None  # seconds after which time alone may change this


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
    wanted = wanted_revision(service, observed.revisions, platform)
    refusals = refusals_of(service, observed, platform)
    frozen = bool(refusals) or service.spec.paused
    active = _active(observed)
    saved = {revision.name: revision for revision in observed.revisions}
    if not frozen:
        own = Revision(wanted.own, _time(now), service.spec, platform.pods)
        saved.setdefault(wanted.own, own)
    goal = Goal(
        target=active if frozen else wanted.name,
        active=active,
        bounds=bounds_of(service, observed),
        frozen=frozen,
        refused=bool(refusals),
        saved=saved,
    )
    steps = next_steps(service, observed, goal, now)
    leaving = _leaving(observed, steps)
    key = platform.service_key(service)
    table = frozen_table(observed, leaving)
    if not refusals:
        table = route_table(service, key, observed, leaving, steps.weights, steps.pins)
    situation = Situation(service, observed, goal, steps, refusals, wanted.own, wanted.back)
    leave = _Departure(observed, service.spec.rollout.drain_seconds, now)
    replaced = situation.serving >= goal.bounds.replicas
    marks = served(observed)
    actions: list[Action] = [
        *(ResumePod(name) for name in steps.resume),
        *(DrainPod(name) for name in steps.drain),
        *(MarkServed(p.name, marks[p.name], p.restarts) for p in observed.pods if p.name in marks),
        *([WriteRoutes(table)] if table is not None and table != observed.table else []),
        *(
            action
            for group in groups
            if group.name not in steps.resume
            for action in leave.deletions(group, replaced=replaced)
        ),
        *_swaps(service, observed, steps, goal),
        # Last, as a cluster may refuse a pod: nothing else waits for it.
        *_completions(service, groups, steps, saved),
        *_creations(service, observed, steps, saved),
    ]
    status = build_status(situation, now)
    if situation.complete:
        kept = {wanted.own, goal.target, *situation.revisions_kept}
        kept |= {wanted.name, status.active_revision, status.previous_revision}
        actions += [ForgetRevision(r.name) for r in observed.revisions if r.name not in kept]
    return Plan(tuple(actions), status, steps.again)


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
    wanted = wanted_revision(service, observed.revisions, platform)
    return (
        *_rollback_faults(wanted, observed),
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


def _rollback_faults(wanted: Wanted, observed: Observed) -> list[Refusal]:
    if wanted.unknown is None:
        return []
    return [Refusal("NoSuchRevision", unknown_sentence(wanted, observed.revisions))]


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


def bounds_of(service: InferenceService, observed: Observed) -> Bounds:
    """How many replicas are wanted now, and how far a rollout may stray from that."""
    rollout = service.spec.rollout
    replicas = planned_replicas(service, observed)
    return Bounds(replicas, rollout.max_surge, rollout.max_unavailable)


def _active(observed: Observed) -> str | None:
    """The revision that served last at full strength; before any did, that of the oldest pod."""
    if observed.status.active_revision is not None:
        return observed.status.active_revision
    staying = [pod for pod in observed.pods if not pod.retiring]
    return min(staying, key=lambda pod: (pod.created, pod.name)).revision if staying else None


def _leaving(observed: Observed, steps: Steps) -> frozenset[str]:
    retiring = {pod.name for pod in observed.pods if pod.retiring}
    return frozenset(retiring | set(steps.drain)) - set(steps.resume)


def _completions(
    service: InferenceService,
    groups: Sequence[Group],
    steps: Steps,
    saved: Mapping[str, Revision],
) -> Iterator[Action]:
    """The pods that groups still lack of which no pod has run yet."""
    for group in groups:
        revision = saved.get(group.revision)
        if group.unfinished and revision is not None and group.name not in steps.drain:
            pods = build_group(service, revision, group.replica)
            yield from (CreatePod(pod) for pod in pods if pod.member in group.missing)


def _swaps(
    service: InferenceService, observed: Observed, steps: Steps, goal: Goal
) -> Iterator[Action]:
    """The record before the first call."""
    revision = goal.saved.get(goal.target or "")
    called = [pod for pod in observed.pods if pod.name in steps.swap]
    if revision is None or not called:
        return
    if all(known.name != revision.name for known in observed.revisions):
        yield SaveRevision(revision)
    for pod in called:
        if pod.address is not None:
            in_flight = service.spec.rollout.in_flight
            yield SwapWeights(pod.name, pod.address, pod.restarts, revision, in_flight)


def _creations(
    service: InferenceService,
    observed: Observed,
    steps: Steps,
    saved: Mapping[str, Revision],
) -> Iterator[Action]:
    """New groups, in the order of `steps`; records before pods."""
    known = {revision.name for revision in observed.revisions}
    taken = {pod.name for pod in observed.pods}
    for name in steps.create:
        revision = saved.get(name)
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
