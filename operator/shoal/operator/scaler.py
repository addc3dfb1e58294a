"""Autoscaling of services between plans: what is remembered, decided and shown.

    routers' reports, pods, status ─> Scalers.look() ─> ScalingView, which the planner plans for

What a process remembers may be lost: what limits have to know over a restart (the number and its
last changes) is in the status, which is written only when the number changes.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime

from shoal.api.scaling import AutoscalingSpec, ScalingDriver
from shoal.api.status import AutoscalingStatus, ScaleChange
from shoal.api.types import InferenceService
from shoal.operator.autoscale import Decision, Scaling, decide
from shoal.operator.autoscale_behavior import Change, Memory
from shoal.operator.autoscale_load import TtftHistory, total_load
from shoal.operator.autoscale_metrics import Replicas
from shoal.operator.groups import groups_of
from shoal.operator.observe import Observed, ScalingView

LOOK_SECONDS = 2.0  # between two looks at a service
STALE_SECONDS = 30.0  # a memory that is older has missed too much: it begins anew
KEPT_CHANGES = 32  # as many as the status may hold


@dataclass(frozen=True, slots=True)
class ScalerState:
    """What one process remembers of one service."""

    looked: float  # Unix seconds
    view: ScalingView
    memory: Memory
    history: TtftHistory = field(default_factory=TtftHistory)


class Scalers:
    """The memory of all services' autoscaling, in one process."""

    def __init__(self) -> None:
        self._states: dict[str, ScalerState] = {}

    def look(
        self, key: str, service: InferenceService, observed: Observed, now: float
    ) -> ScalingView | None:
        """What to plan for; None where the service has no autoscaling. `now` in Unix seconds.

        May be called at any time: it decides anew every `LOOK_SECONDS`.
        """
        if service.spec.autoscaling is None:
            self.forget(key)
            return None
        if not scales_itself(service):
            self.forget(key)
            return _driven_view(service, service.spec.autoscaling, observed, now)
        state = self._states.get(key)
        if state is not None and not 0 <= now - state.looked < STALE_SECONDS:
            state = None
        if state is None or now >= state.looked + LOOK_SECONDS:
            state = self._states[key] = scale(
                service, service.spec.autoscaling, observed, state, now
            )
        return state.view

    def wanted(self, key: str) -> int | None:
        """The number decided last; None where there is none."""
        state = self._states.get(key)
        return state.view.wanted if state is not None else None

    def forget(self, key: str) -> None:
        """The service is gone, or scales by itself no more."""
        self._states.pop(key, None)

    def clear(self) -> None:
        """Somebody else decides from here on."""
        self._states.clear()


def scales_itself(service: InferenceService) -> bool:
    """Whether the operator's own autoscaler decides."""
    spec = service.spec.autoscaling
    return spec is not None and spec.driver is ScalingDriver.INTERNAL


def planned_replicas(service: InferenceService, observed: Observed) -> int:
    """The number of replicas to bring about: the autoscaler's where there is one."""
    if observed.scaling is not None:
        return observed.scaling.wanted
    spec = service.spec.autoscaling
    if spec is None or not scales_itself(service):
        return service.spec.replicas
    return _first(service, spec, observed.status.autoscaling)


def scale(
    service: InferenceService,
    spec: AutoscalingSpec,
    observed: Observed,
    state: ScalerState | None,
    now: float,
) -> ScalerState:
    """One look. `state` None: the process has just begun to look at the service. Pure."""
    shown = state.view.status if state is not None else observed.status.autoscaling
    wanted = state.view.wanted if state is not None else _first(service, spec, shown)
    memory = state.memory if state is not None else _memory(wanted, shown, now)
    history = state.history if state is not None else TtftHistory()
    reports = {view.name: view.report for view in observed.routers if view.report is not None}
    silent = [f"silent {number}" for number in range(observed.silent_routers)]
    load = total_load(reports, [*reports, *silent], history, now)
    scaling = Scaling(spec, service.spec.engine.max_num_seqs, enabled=service.spec.replicas > 0)
    decision = decide(scaling, _replicas(observed, wanted), load, memory, now)
    view = ScalingView(
        wanted=decision.wanted,
        status=_status(shown, decision, now),
        active=decision.active,
        # Which metric decides may change at every look: no news for a status.
        reason="MetricsDecide" if decision.active else decision.reason,
        message="" if decision.active else decision.message,
    )
    return ScalerState(now, view, decision.memory, history.followed_by(reports, now))


_DRIVEN = {
    ScalingDriver.HPA: ("DrivenByHpa", "the HorizontalPodAutoscaler {} writes spec.replicas"),
    ScalingDriver.KEDA: ("DrivenByKeda", "KEDA writes spec.replicas, by the ScaledObject {}"),
}


def _driven_view(
    service: InferenceService, spec: AutoscalingSpec, observed: Observed, now: float
) -> ScalingView:
    """Somebody else decides: what they wrote."""
    reason, message = _DRIVEN[spec.driver]
    wanted, before = service.spec.replicas, observed.status.autoscaling
    status = AutoscalingStatus(desired=wanted, reason=reason)
    if before is not None and before.reason == reason:
        moved = {"desired": wanted, "last_scale_time": _time(now)}
        status = before if before.desired == wanted else before.model_copy(update=moved)
    return ScalingView(wanted, status, True, reason, message.format(service.name))


def _first(
    service: InferenceService, spec: AutoscalingSpec, status: AutoscalingStatus | None
) -> int:
    """The number to begin with: that of the status; for a new service the spec's."""
    if status is not None:
        return status.desired
    if not service.spec.replicas:
        return 0
    return min(max(service.spec.replicas, spec.min_replicas), spec.max_replicas)


def _memory(wanted: int, status: AutoscalingStatus | None, now: float) -> Memory:
    changes = status.changes if status is not None else ()
    return Memory.began(wanted, tuple(Change(c.time.timestamp(), c.by) for c in changes), now)


def _replicas(observed: Observed, wanted: int) -> Replicas:
    groups = [group.as_replica() for group in groups_of(observed.pods)]
    staying = [pod for pod in groups if observed.stays(pod)]
    ready = [pod.name for pod in staying if observed.routable(pod)]
    return Replicas(wanted, ready, [pod.name for pod in staying if pod.name not in ready])


def _status(before: AutoscalingStatus | None, decision: Decision, now: float) -> AutoscalingStatus:
    """The status after a decision: the same as before as long as the number is."""
    if before is None:
        return AutoscalingStatus(desired=decision.wanted, reason=decision.reason)
    if before.desired == decision.wanted:
        return before
    return before.model_copy(
        update={
            "desired": decision.wanted,
            "last_scale_time": _time(now),
            "reason": decision.reason,
            "changes": tuple(
                ScaleChange(time=_time(change.at), by=change.by)
                for change in decision.memory.changes[-KEPT_CHANGES:]
            ),
        }
    )


def _time(now: float) -> datetime:
    return datetime.fromtimestamp(int(now), UTC)
