"""How many replicas a service should have: the decision, as a pure function of its load.

The algorithm is that of Kubernetes' HorizontalPodAutoscaler v2. Each metric asks for a number
(autoscale_metrics), the largest wins, stabilisation windows and rate policies hold it back
(autoscale_behavior), and the bounds have the last word. What is different, and why:

| HorizontalPodAutoscaler | here | why |
|---|---|---|
| looks every 15 s | as often as it is called, about every 2 s | a queue is acted on within seconds |
| a metric far below its target shrinks the service | never below what the present work fills | an empty queue or a short TTFT says that capacity suffices, not that it is idle: the replica that goes would bring back the load that brought it |
| a recommendation that is not known is not remembered | the present number is remembered | after an outage of the metrics nothing shrinks at once |
| a metric that is silent in part counts what it has | a silent router forbids scaling down | see autoscale_load |
| windows apply always | a panic overrides the window for scaling up, and forbids scaling down | a step of ten times is no noise |
| from zero to zero only by an external metric (alpha gate) | to zero after `idleSeconds`, at once; from zero at the first queued request | scale to zero is a contract of its own |
| memory is lost at a restart | changes can be written down (`Memory.began`) | limits hold over restarts |

Panic is Knative's (serving, pkg/autoscaler/scaling/autoscaler.go: panicTime, maxPanicPods): where
the average wish of the last 6 s is twice the ready replicas or more, there is no scaling down
until it has been below that for 60 s. Unlike there, rate policies and bounds still hold: they are
the user's word on cost.
"""  # noqa: E501

from dataclasses import dataclass, replace
from math import ceil
from typing import Final

from shoal.api.scaling import AutoscalingSpec, MetricSpec, MetricType, SelectPolicy
from shoal.operator.autoscale_behavior import Memory, Wish, changed, limit, remember, stabilize
from shoal.operator.autoscale_load import Load
from shoal.operator.autoscale_metrics import Replicas, Tolerance, overall, per_replica, shared

PANIC_WINDOW_SECONDS = 6.0
PANIC_THRESHOLD = 2.0
CALM_SECONDS = 60.0
PANIC_SAMPLES = 2  # a single look proves no surge


@dataclass(frozen=True, slots=True)
class Decision:
    """What to bring about, and what to remember until the next decision."""

    wanted: int
    reason: str  # one CamelCase word: which metric or rule decided
    message: str  # a sentence without running figures, the same as long as the reason stands
    active: bool  # whether metrics decide, for the condition ScalingActive
    memory: Memory


@dataclass(frozen=True, slots=True)
class Scaling:
    """One service's settings as the decision needs them."""

    spec: AutoscalingSpec
    slots: int  # sequences that one replica runs at once: spec.engine.maxNumSeqs
    enabled: bool = True  # False: spec.replicas is 0, which switches the service off

    @property
    def tolerance(self) -> Tolerance:
        behavior = self.spec.behavior
        return Tolerance(behavior.scale_up.tolerance, behavior.scale_down.tolerance)


@dataclass(frozen=True, slots=True)
class _Look:
    """One decision's inputs that no rule changes."""

    scaling: Scaling
    replicas: Replicas
    now: float

    @property
    def wanted(self) -> int:
        return self.replicas.wanted

    def moved(
        self, wanted: int, reason: str, message: str, memory: Memory, *, active: bool = True
    ) -> Decision:
        if wanted != self.wanted:
            behavior = self.scaling.spec.behavior
            memory = changed(memory, wanted - self.wanted, behavior, self.now)
        return Decision(wanted, reason, message, active, memory)

    def settled(
        self, wanted: int, reason: str, message: str, memory: Memory, *, active: bool = True
    ) -> Decision:
        """By a rule that stands above metrics and limits; what was wished for before is void."""
        memory = replace(memory, wishes=(Wish(self.now, wanted),), recent=(), alarmed=None)
        return self.moved(wanted, reason, message, memory, active=active)

    def held(self, reason: str, message: str, memory: Memory) -> Decision:
        """As it is, since nothing is known that would justify a change."""
        return Decision(self.wanted, reason, message, False, self.wished(memory, self.wanted))

    def wished(self, memory: Memory, count: int) -> Memory:
        wish = Wish(self.now, count)
        wishes = remember(memory.wishes, wish, self.scaling.spec.behavior)
        return replace(memory, wishes=wishes)


def decide(
    scaling: Scaling, replicas: Replicas, load: Load | None, memory: Memory, now: float
) -> Decision:
    """The number of replicas to want from now on. `now` in Unix seconds.

    Call it about every two seconds, with `memory` of the decision before, or with
    `Memory.began` after a restart. `load` None: no router answers.
    """
    spec, wanted, look = scaling.spec, replicas.wanted, _Look(scaling, replicas, now)
    served = (now if memory.served is None else memory.served) if replicas.ready else None
    memory = replace(memory, served=served)
    if not scaling.enabled and spec.min_replicas:
        return look.settled(0, "ScalingDisabled", "spec.replicas is 0", memory, active=False)
    if wanted > spec.max_replicas:
        message = f"spec.autoscaling.maxReplicas is {spec.max_replicas}"
        return look.settled(spec.max_replicas, "MaxReplicas", message, memory)
    if wanted < spec.min_replicas:
        message = f"spec.autoscaling.minReplicas is {spec.min_replicas}"
        return look.settled(spec.min_replicas, "MinReplicas", message, memory)
    if load is None:
        return look.held("NoRouter", "no router reports the load", memory)
    if not wanted:
        return _from_zero(look, load, memory)
    if _idle(spec, load, memory, now):
        assert spec.scale_to_zero is not None
        message = f"no request for {spec.scale_to_zero.idle_seconds} s"
        return look.settled(0, "Idle", message, memory)
    return _by_metrics(look, load, memory)


def _by_metrics(look: _Look, load: Load, memory: Memory) -> Decision:
    spec, wanted, replicas, now = look.scaling.spec, look.wanted, look.replicas, look.now
    tolerance = look.scaling.tolerance
    proposals = [(_proposal(m, replicas, load, tolerance), m.type) for m in spec.metrics]
    known = [(count, metric) for count, metric in proposals if count is not None]
    unknown = [metric for count, metric in proposals if count is None]
    wish, metric = max(known, key=lambda proposal: proposal[0], default=(-1, None))
    if metric is None or (unknown and wish < wanted):
        return look.held("MetricUnknown", f"{unknown[0]} is not known", memory)
    if wish < wanted and not load.complete:
        return look.held("RouterSilent", "no replica goes while a router is silent", memory)

    cautious = min(wanted, max(wish, _filled(look.scaling, load))) if wish < wanted else wish
    memory = _alarm(memory, Wish(now, cautious), len(replicas.ready))
    steady = stabilize(cautious, wanted, memory.wishes, spec.behavior, now)
    goal, rule = steady.count, steady.rule
    if memory.alarmed is not None:
        urgent = max(wanted, goal, ceil(_average(memory.recent)))
        goal, rule = (urgent, "Panic") if urgent > goal else (goal, rule)
    least = max(1, spec.min_replicas)
    limited = limit(goal, wanted, least, spec.max_replicas, memory.changes, spec.behavior, now)
    reason, message = _why(metric, wish, cautious, wanted, limited.rule or rule)
    return look.moved(limited.count, reason, message, look.wished(memory, cautious))


def _proposal(
    metric: MetricSpec, replicas: Replicas, load: Load, tolerance: Tolerance
) -> int | None:
    """Replicas that one metric asks for; None where its value is not known."""
    match metric.type:
        case MetricType.QUEUE_DEPTH:
            return shared(load.queued, replicas, metric.target, tolerance)
        case MetricType.RUNNING:
            return per_replica(load.in_flight, replicas, metric.target, tolerance)
        case MetricType.KV_UTILIZATION:
            return per_replica(load.kv, replicas, metric.target, tolerance)
        case MetricType.TTFT_P95:
            if load.ttft_p95 is None:
                return None
            return overall(load.ttft_p95, replicas, metric.target, tolerance)


def _filled(scaling: Scaling, load: Load) -> int:
    """Replicas that the present work fills, up to the tolerance for scaling down. While anything
    waits for a replica, none is to spare."""
    if load.queued:
        return scaling.spec.max_replicas
    return ceil(load.busy(scaling.slots) / max(0.1, 1.0 - scaling.tolerance.down))


def _from_zero(look: _Look, load: Load, memory: Memory) -> Decision:
    """The first queued request wakes the service; a long queue wakes more of it."""
    spec, tolerance = look.scaling.spec, look.scaling.tolerance
    if not load.queued:
        return look.moved(0, "ScaledToZero", "no request waits", memory)
    queue = [m for m in spec.metrics if m.type is MetricType.QUEUE_DEPTH]
    wish = max([1, *(shared(load.queued, look.replicas, m.target, tolerance) for m in queue)])
    behavior = spec.behavior
    limited = limit(wish, 0, 1, spec.max_replicas, memory.changes, behavior, look.now)
    message = "a request waits for the first replica"
    memory = look.wished(memory, wish)
    return look.moved(max(1, limited.count), "WokenByRequest", message, memory)


def _idle(spec: AutoscalingSpec, load: Load, memory: Memory, now: float) -> bool:
    """Whether replicas have waited for a request for long enough. Their start does not count: it
    may take longer than that, and would then never end."""
    return (
        spec.scale_to_zero is not None
        and memory.served is not None
        and now - memory.served >= spec.scale_to_zero.idle_seconds
        and not spec.min_replicas
        and spec.behavior.scale_down.select_policy is not SelectPolicy.DISABLED
        and load.complete
        and not load.queued
        and load.idle_seconds >= spec.scale_to_zero.idle_seconds
    )


def _alarm(memory: Memory, wish: Wish, ready: int) -> Memory:
    """`memory` with one more wish in the panic window, and the panic that follows from it."""
    since = wish.at - PANIC_WINDOW_SECONDS
    recent = (*(w for w in memory.recent if w.at > since), wish)
    memory = replace(memory, recent=recent)
    if len(recent) >= PANIC_SAMPLES and _average(recent) >= PANIC_THRESHOLD * max(1, ready):
        return replace(memory, alarmed=wish.at)
    if memory.alarmed is not None and wish.at > memory.alarmed + CALM_SECONDS:
        return replace(memory, alarmed=None)
    return memory


def _average(wishes: tuple[Wish, ...]) -> float:
    return sum(wish.count for wish in wishes) / len(wishes) if wishes else 0.0


def _why(metric: MetricType, wish: int, cautious: int, wanted: int, rule: str) -> tuple[str, str]:
    if rule:
        return rule, _RULES[rule]
    if cautious > wanted:
        return f"{metric}AboveTarget", f"{metric} is above its target"
    if cautious < wanted:
        return "BelowTarget", "all metrics are below their targets"
    if wish < wanted:
        return "WorkFillsReplicas", "what runs now fills the replicas there are"
    return "OnTarget", f"{metric} is on target"


_RULES: Final = {
    "Panic": "the load is more than twice what the ready replicas are meant for",
    "ScaleUpStabilized": "the least that was asked for in the window for scaling up",
    "ScaleDownStabilized": "the most that was asked for in the window for scaling down",
    "ScaleUpLimit": "as fast as spec.autoscaling.behavior.scaleUp allows",
    "ScaleDownLimit": "as fast as spec.autoscaling.behavior.scaleDown allows",
    "MaxReplicas": "more is asked for than spec.autoscaling.maxReplicas",
    "MinReplicas": "less is asked for than spec.autoscaling.minReplicas",
}
