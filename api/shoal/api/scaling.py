"""How many replicas a service has, and who decides it."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from shoal.api.base import MAX_COUNT, ApiModel, Unique


class MetricType(StrEnum):
    """What the autoscaler looks at, per replica."""

    QUEUE_DEPTH = "QueueDepth"
    RUNNING = "Running"
    KV_UTILIZATION = "KvUtilization"
    TTFT_P95 = "TtftP95"


class ScalingDriver(StrEnum):
    """Who writes the number of replicas."""

    INTERNAL = "internal"
    HPA = "hpa"
    KEDA = "keda"


class SelectPolicy(StrEnum):
    """Which of several scaling policies counts."""

    MAX = "Max"
    MIN = "Min"
    DISABLED = "Disabled"


class PolicyType(StrEnum):
    """The unit of a scaling policy."""

    PODS = "Pods"
    PERCENT = "Percent"


class MetricSpec(ApiModel):
    """One metric and the value per replica that the autoscaler aims at."""

    type: MetricType = Field(
        description="QueueDepth: requests waiting. Running: requests being served. "
        "KvUtilization: share of KV blocks in use. TtftP95: seconds to the first token."
    )
    target: float = Field(
        gt=0,
        le=1_000_000,
        description="Value per replica to aim at; a share of 1 for KvUtilization, "
        "seconds for TtftP95.",
    )


class ScalingPolicy(ApiModel):
    """So much change within so much time, at most. As in HorizontalPodAutoscaler v2."""

    type: PolicyType = Field(description="Pods: replicas. Percent: of the current replicas.")
    value: int = Field(ge=1, le=MAX_COUNT, description="Change that the policy allows.")
    period_seconds: int = Field(ge=1, le=1800, description="Window of time for the change.")


class ScalingRules(ApiModel):
    """Rules for one direction. As in HorizontalPodAutoscaler v2."""

    stabilization_window_seconds: int = Field(
        default=0,
        ge=0,
        le=3600,
        description="The most cautious count of this window is taken, so that noise moves nothing.",
    )
    select_policy: SelectPolicy = Field(
        default=SelectPolicy.MAX,
        description="Max: the policy that changes most. Min: least. "
        "Disabled: never in this direction.",
    )
    policies: tuple[ScalingPolicy, ...] = Field(
        default=(
            ScalingPolicy(type=PolicyType.PODS, value=4, period_seconds=15),
            ScalingPolicy(type=PolicyType.PERCENT, value=100, period_seconds=15),
        ),
        min_length=1,
        max_length=8,
        description="Limits to the speed of change.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    tolerance: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Relative distance from the target that changes nothing.",
    )


class ScaleDownRules(ScalingRules):
    """Rules for scaling down. As in HorizontalPodAutoscaler v2."""

    stabilization_window_seconds: int = Field(
        default=300,
        ge=0,
        le=3600,
        description="The largest count of this window is taken, so that noise moves nothing.",
    )
    policies: tuple[ScalingPolicy, ...] = Field(
        default=(ScalingPolicy(type=PolicyType.PERCENT, value=100, period_seconds=15),),
        min_length=1,
        max_length=8,
        description="Limits to the speed of change.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )


class ScalingBehavior(ApiModel):
    """How fast the number of replicas may change. As in HorizontalPodAutoscaler v2."""

    scale_up: ScalingRules = Field(default=ScalingRules(), description="Rules for scaling up.")
    scale_down: ScaleDownRules = Field(
        default=ScaleDownRules(), description="Rules for scaling down."
    )


class ScaleToZeroSpec(ApiModel):
    """When the last replica goes, and how requests wait for the first."""

    idle_seconds: int = Field(
        default=300,
        ge=1,
        le=604_800,
        description="Time without a request after which replicas go to zero.",
    )
    queue_timeout_seconds: int = Field(
        default=120, ge=1, le=86_400, description="Longest wait of a request for a replica to wake."
    )
    max_queued: int = Field(
        default=1000,
        ge=1,
        le=1_000_000,
        description="Requests that may wait; more are refused with 429.",
    )


class AutoscalingSpec(ApiModel):
    """Replicas follow the load between two bounds."""

    driver: ScalingDriver = Field(
        default=ScalingDriver.INTERNAL,
        description="internal: Shoal's own autoscaler. hpa: a HorizontalPodAutoscaler that Shoal "
        "makes and serves the metrics of. keda: a ScaledObject, likewise.",
    )
    min_replicas: int = Field(
        default=1, ge=0, le=MAX_COUNT, description="Fewest replicas; 0 needs scaleToZero."
    )
    max_replicas: int = Field(ge=1, le=MAX_COUNT, description="Most replicas.")
    metrics: Annotated[
        tuple[MetricSpec, ...], Field(min_length=1, max_length=4), Unique("type")
    ] = Field(
        default=(MetricSpec(type=MetricType.QUEUE_DEPTH, target=4),),
        description="What the load is measured by; the metric that asks for most replicas wins.",
    )
    behavior: ScalingBehavior = Field(
        default=ScalingBehavior(), description="How fast the number of replicas may change."
    )
    scale_to_zero: ScaleToZeroSpec | None = Field(
        default=None, description="When the last replica goes. Needed where minReplicas is 0."
    )
