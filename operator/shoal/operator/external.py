"""Autoscaling by somebody else: what a HorizontalPodAutoscaler or KEDA is given. Pure.

Each metric of the spec is served as an external metric: a total that replicas share, except
TtftP95, which is one value that more replicas bring down. One more metric is added to those of the
spec. It keeps what the internal autoscaler keeps by itself: replicas that the present work fills,
and all of them while a request waits or a router is silent, since an empty queue says that there
is enough, not that there is too much.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, Final

from shoal.api import names
from shoal.api.scaling import (
    AutoscalingSpec,
    MetricType,
    ScalingBehavior,
    ScalingDriver,
    ScalingRules,
)
from shoal.api.types import InferenceService
from shoal.operator.autoscale_load import Load
from shoal.operator.metadata import metadata

FILLED: Final = "shoal_replicas_filled"
METRIC_NAMES: Final[Mapping[MetricType, str]] = {
    MetricType.QUEUE_DEPTH: "shoal_queue_depth",
    MetricType.RUNNING: "shoal_running",
    MetricType.KV_UTILIZATION: "shoal_kv_utilization",
    MetricType.TTFT_P95: "shoal_ttft_p95_seconds",
}
_DEFAULT_TOLERANCE: Final = 0.1
_IDLE_DEFAULT: Final = 300
_POLL_SECONDS: Final = 5


@dataclass(frozen=True, slots=True)
class ExternalMetric:
    """One metric as an autoscaler is asked to aim at it."""

    name: str
    target: float
    shared: bool  # `target` is per replica of a total, else of one value

    @property
    def kind(self) -> str:
        """The type of the target, in the words of autoscaling/v2."""
        return "AverageValue" if self.shared else "Value"


def external_metrics(spec: AutoscalingSpec) -> tuple[ExternalMetric, ...]:
    """What an autoscaler looks at: the spec's metrics, and the one that keeps what is filled."""
    asked = (
        ExternalMetric(METRIC_NAMES[m.type], m.target, m.type is not MetricType.TTFT_P95)
        for m in spec.metrics
    )
    return (*asked, ExternalMetric(FILLED, 1.0, True))


def values(service: InferenceService, load: Load) -> Mapping[str, float]:
    """Every metric by name, of which a service has a value now; one that is missing is not
    known. Totals over all replicas, TTFT in seconds."""
    found = {
        METRIC_NAMES[MetricType.QUEUE_DEPTH]: float(load.queued),
        METRIC_NAMES[MetricType.RUNNING]: sum(load.in_flight.values()),
        METRIC_NAMES[MetricType.KV_UTILIZATION]: sum(load.kv.values()),
        FILLED: float(_filled(service, load)),
    }
    if load.ttft_p95 is not None:
        found[METRIC_NAMES[MetricType.TTFT_P95]] = load.ttft_p95
    return found


def has_work(load: Load) -> bool:
    """Whether a service at zero is to be woken; one that serves stays while it is, and for the
    cooldown after it."""
    busy = load.queued > 0 or any(load.in_flight.values())
    return busy or not load.complete or load.idle_seconds < _POLL_SECONDS


def autoscaler(service: InferenceService, scaler_address: str = "") -> dict[str, Any] | None:
    """The object that drives the service, as a manifest; None where Shoal itself does.

    `scaler_address`: host:port of the operator as KEDA reaches it.
    """
    spec = service.spec.autoscaling
    if spec is None or spec.driver is ScalingDriver.INTERNAL:
        return None
    if spec.driver is ScalingDriver.KEDA:
        made = _scaled_object(service, spec, scaler_address)
    else:
        made = _horizontal_pod_autoscaler(service, spec)
    text = json.dumps(made["spec"], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    made["metadata"]["annotations"] = {names.ANNOTATION_APPLIED: digest}
    return made


def _filled(service: InferenceService, load: Load) -> int:
    wanted = service.spec.replicas
    if load.queued or not load.complete:
        return wanted
    spare = _DEFAULT_TOLERANCE
    if service.spec.autoscaling is not None:
        spare = service.spec.autoscaling.behavior.scale_down.tolerance
    filled = ceil(load.busy(service.spec.engine.max_num_seqs) / max(0.1, 1.0 - spare))
    return min(filled, wanted)


def _horizontal_pod_autoscaler(service: InferenceService, spec: AutoscalingSpec) -> dict[str, Any]:
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": metadata(service, service.name, {}),
        "spec": {
            "scaleTargetRef": _target(service),
            "minReplicas": max(1, spec.min_replicas),
            "maxReplicas": spec.max_replicas,
            "metrics": [
                {
                    "type": "External",
                    "external": {
                        "metric": {
                            "name": metric.name,
                            "selector": {"matchLabels": {names.LABEL_SERVICE: service.name}},
                        },
                        "target": {
                            "type": metric.kind,
                            metric.kind[0].lower() + metric.kind[1:]: quantity(metric.target),
                        },
                    },
                }
                for metric in external_metrics(spec)
            ],
            "behavior": _behavior(spec.behavior),
        },
    }


def _scaled_object(
    service: InferenceService, spec: AutoscalingSpec, scaler_address: str
) -> dict[str, Any]:
    zero = spec.scale_to_zero
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": metadata(service, service.name, {}),
        "spec": {
            "scaleTargetRef": _target(service),
            "minReplicaCount": spec.min_replicas,
            "maxReplicaCount": spec.max_replicas,
            "pollingInterval": _POLL_SECONDS,
            "cooldownPeriod": zero.idle_seconds if zero is not None else _IDLE_DEFAULT,
            "triggers": [
                {
                    # A push wakes at once; one is enough.
                    "type": "external-push" if metric.name == FILLED else "external",
                    "metricType": metric.kind,
                    "metadata": {
                        "scalerAddress": scaler_address,
                        "service": service.name,
                        "metric": metric.name,
                    },
                }
                for metric in external_metrics(spec)
            ],
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": _behavior(spec.behavior)}},
        },
    }


def _target(service: InferenceService) -> dict[str, str]:
    return {"apiVersion": names.API_VERSION, "kind": names.KIND, "name": service.name}


def _behavior(behavior: ScalingBehavior) -> dict[str, Any]:
    return {"scaleUp": _rules(behavior.scale_up), "scaleDown": _rules(behavior.scale_down)}


def _rules(rules: ScalingRules) -> dict[str, Any]:
    document: dict[str, Any] = {
        "stabilizationWindowSeconds": rules.stabilization_window_seconds,
        "selectPolicy": str(rules.select_policy),
        "policies": [
            {"type": str(p.type), "value": p.value, "periodSeconds": p.period_seconds}
            for p in rules.policies
        ],
    }
    if rules.tolerance != _DEFAULT_TOLERANCE:
        # Needs Kubernetes' gate HPAConfigurableTolerance, on by default from 1.35.
        document["tolerance"] = quantity(rules.tolerance)
    return document


def quantity(value: float) -> str:
    """A number as Kubernetes writes it, in whole thousandths, which is all that it counts in."""
    thousandths = round(value * 1000)
    return f"{thousandths}m" if thousandths % 1000 else str(thousandths // 1000)
