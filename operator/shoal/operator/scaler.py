"""Autoscaling of one service between two plans: what is remembered, decided and shown. Pure.

    reports (of routers) ─┐
    observed pods ────────┼─> scale() ─> Scaled: the number to plan for, the next state, the status
    state, status ────────┘

The state lives in the process; what limits have to know over a restart (the last number and its last
changes) is in the status, which is written only when the number changes.
"""  # noqa: E501

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from shoal.api.scaling import AutoscalingSpec
from shoal.api.status import AutoscalingStatus, ScaleChange
from shoal.api.types import InferenceService
from shoal.operator.autoscale import Decision, Scaling, decide
from shoal.operator.autoscale_behavior import Change, Memory
from shoal.operator.autoscale_load import RouterReport, TtftHistory, total_load
from shoal.operator.autoscale_metrics import Replicas
from shoal.operator.groups import groups_of
from shoal.operator.observe import Observed

KEPT_CHANGES = 32  # as many as the status may hold


@dataclass(frozen=True, slots=True)
class ScalerState:
    """What one process remembers of one service."""

    wanted: int
    memory: Memory
    history: TtftHistory = field(default_factory=TtftHistory)


@dataclass(frozen=True, slots=True)
class Scaled:
    """The outcome of one look."""

    wanted: int
    state: ScalerState
    status: AutoscalingStatus
    active: bool  # for the condition ScalingActive
    reason: str
    message: str


def scale(
    service: InferenceService,
    observed: Observed,
    reports: Mapping[str, RouterReport],
    routers: Collection[str],
    state: ScalerState | None,
    now: float,
) -> Scaled | None:
    """The number of replicas to plan for; None where the service has no autoscaling.

    `reports` holds each router's last report on the service, `routers` the names of those that
    take requests. `state` None: the process has just begun to look at the service.
    """
    spec = service.spec.autoscaling
    if spec is None:
        return None
    if state is None:
        state = _restored(service, spec, observed.status.autoscaling, now)
    load = total_load(reports, routers, state.history, now)
    history = state.history.followed_by(reports, now)
    scaling = Scaling(spec, service.spec.engine.max_num_seqs, enabled=service.spec.replicas > 0)
    decision = decide(scaling, _replicas(observed, state.wanted), load, state.memory, now)
    before = observed.status.autoscaling
    return Scaled(
        wanted=decision.wanted,
        state=ScalerState(decision.wanted, decision.memory, history),
        status=_status(before, decision, now),
        active=decision.active,
        # Figures that change by themselves are not for the status: see AutoscalingStatus.reason.
        reason="MetricsDecide" if decision.active else decision.reason,
        message="" if decision.active else decision.message,
    )


def _restored(
    service: InferenceService, spec: AutoscalingSpec, status: AutoscalingStatus | None, now: float
) -> ScalerState:
    """A state from what the status says; from the spec for a service that is new."""
    if status is None:
        first = min(max(service.spec.replicas, spec.min_replicas), spec.max_replicas)
        return ScalerState(first, Memory.began(first, (), now))
    changes = tuple(Change(change.time.timestamp(), change.by) for change in status.changes)
    return ScalerState(status.desired, Memory.began(status.desired, changes, now))


def _replicas(observed: Observed, wanted: int) -> Replicas:
    staying = [
        pod
        for pod in (group.as_replica() for group in groups_of(observed.pods))
        if not pod.retiring
    ]
    ready = [pod.name for pod in staying if observed.routable(pod)]
    return Replicas(wanted, ready, [pod.name for pod in staying if pod.name not in ready])


def _status(before: AutoscalingStatus | None, decision: Decision, now: float) -> AutoscalingStatus:
    """The status after a decision: the same as before as long as the number is."""
    if before is not None and before.desired == decision.wanted:
        return before
    return AutoscalingStatus(
        desired=decision.wanted,
        last_scale_time=_time(now) if before is not None else None,
        reason=decision.reason,
        changes=tuple(
            ScaleChange(time=_time(change.at), by=change.by)
            for change in decision.memory.changes[-KEPT_CHANGES:]
        ),
    )


def _time(now: float) -> datetime:
    return datetime.fromtimestamp(int(now), UTC)
