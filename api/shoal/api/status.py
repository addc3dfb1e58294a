"""What the operator tells about an InferenceService."""

from enum import StrEnum
from typing import Annotated

from pydantic import AwareDatetime, Field

from shoal.api.base import ApiModel, Unique


class ConditionStatus(StrEnum):
    """Whether a condition holds."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class ConditionType(StrEnum):
    """The conditions that the operator sets."""

    READY = "Ready"
    MODEL_CACHED = "ModelCached"
    REPLICAS_READY = "ReplicasReady"
    ROUTABLE = "Routable"
    PROGRESSING = "Progressing"
    CANARY_HEALTHY = "CanaryHealthy"
    SCALING_ACTIVE = "ScalingActive"
    DEGRADED = "Degraded"


class Condition(ApiModel):
    """One aspect of the service's state. As in Kubernetes' meta/v1."""

    type: ConditionType = Field(description="What the condition is about.")
    status: ConditionStatus = Field(description="Whether it holds.")
    reason: str = Field(
        pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
        max_length=1024,
        description="Why, as one CamelCase word for machines.",
    )
    message: str = Field(
        default="", max_length=32_768, description="Why, as a sentence for people."
    )
    last_transition_time: AwareDatetime = Field(description="When status last changed.")
    observed_generation: int = Field(
        default=0, ge=0, description="metadata.generation that the condition was computed from."
    )


class CanaryEvidence(ApiModel):
    """What the analysis of a canary has found so far; what it needs after a restart."""

    requests: int = Field(ge=0, description="Requests of the new revision so far.")
    failures: int = Field(ge=0, description="Of these, failed.")
    judged: int = Field(
        default=0, ge=0, description="Of these, whose times were compared, after the warm-up."
    )
    failed_looks: int = Field(ge=0, description="Looks in a row that failed.")
    errors: tuple[float, ...] = Field(
        max_length=64, description="Evidence of more errors, as logarithms of likelihood ratios."
    )
    errors_alone: tuple[float, ...] = Field(
        max_length=64, description="The same against maxErrorRate, without a stable revision."
    )
    ttft: tuple[float, ...] = Field(
        max_length=64, description="The same of a longer time to the first token."
    )
    itl: tuple[float, ...] = Field(
        max_length=64, description="The same of a longer time between tokens."
    )


class CanaryStatus(ApiModel):
    """Where a canary stands."""

    revision: str = Field(description="Revision on trial.")
    stable: str = Field(default="", description="Revision that serves the other requests.")
    weight: int = Field(ge=0, le=100, description="Percent of new requests it gets.")
    step: int = Field(ge=0, description="Index of the current step, from 0.")
    step_time: AwareDatetime | None = Field(
        default=None, description="When the step's weight came into force at every router."
    )
    aborted_time: AwareDatetime | None = Field(
        default=None, description="When the revision was given up."
    )
    last_analysis: str | None = Field(
        default=None, description="Outcome of the last look, as a sentence."
    )
    evidence: CanaryEvidence | None = Field(
        default=None, description="What the analysis has found so far."
    )


class BlueGreenStatus(ApiModel):
    """The replicas that a switch has left behind."""

    kept: str = Field(description="Revision whose replicas stay for the way back.")
    switch_time: AwareDatetime = Field(description="When requests went to the active revision.")


class InPlaceStatus(ApiModel):
    """Why weights are not swapped in running replicas."""

    revision: str = Field(description="Revision that takes over replica by replica instead.")
    message: str = Field(description="Why, as a sentence.")


class ScaleChange(ApiModel):
    """The number of replicas that are wanted has changed."""

    time: AwareDatetime = Field(description="When.")
    by: int = Field(description="Replicas more, or fewer where below zero.")


class AutoscalingStatus(ApiModel):
    """What the autoscaler decided last."""

    desired: int = Field(ge=0, description="Replicas it wants.")
    last_scale_time: AwareDatetime | None = Field(
        default=None, description="When the number of replicas last changed."
    )
    reason: str = Field(default="", description="Which metric or bound decided.")
    changes: tuple[ScaleChange, ...] = Field(
        default=(),
        max_length=32,
        description="The last changes, oldest first, which limits of speed count.",
    )


class ColdStartPhase(ApiModel):
    """A part of a replica's start."""

    phase: str = Field(description="schedule, image, weights, warm-up or route.")
    seconds: float = Field(ge=0, description="Time it took.")


class ColdStartStatus(ApiModel):
    """Where the time went between a replica's creation and its first request."""

    pod: str = Field(description="Leader pod of the replica.")
    time: AwareDatetime = Field(description="When routers began to send requests to it.")
    seconds: float = Field(ge=0, description="Time since it was created.")
    phases: tuple[ColdStartPhase, ...] = Field(
        default=(), max_length=8, description="What it is made of, in order."
    )


class InferenceServiceStatus(ApiModel):
    """What the operator last saw."""

    observed_generation: int = Field(
        default=0, ge=0, description="metadata.generation that the status was computed from."
    )
    desired_replicas: int = Field(
        default=0,
        ge=0,
        description="Replicas that are wanted, by the spec or the autoscaler.",
    )
    replicas: int = Field(default=0, ge=0, description="Replicas that exist, ready or not.")
    ready_replicas: int = Field(default=0, ge=0, description="Replicas whose engine is ready.")
    routable_replicas: int = Field(
        default=0, ge=0, description="Ready replicas that the routers have admitted."
    )
    selector: str | None = Field(
        default=None, description="Label selector of the leader pods, for the scale subresource."
    )
    url: str | None = Field(
        default=None, description="Base URL of the OpenAI API that serves the model."
    )
    spec_revision: str | None = Field(default=None, description="Revision that the spec describes.")
    active_revision: str | None = Field(default=None, description="Revision that serves.")
    previous_revision: str | None = Field(default=None, description="Revision that served before.")
    canary: CanaryStatus | None = Field(default=None, description="The canary under way, if any.")
    blue_green: BlueGreenStatus | None = Field(
        default=None, description="What strategy BlueGreen keeps for the way back, if anything."
    )
    in_place: InPlaceStatus | None = Field(
        default=None, description="Why strategy InPlace gives way to a rolling update, if it does."
    )
    autoscaling: AutoscalingStatus | None = Field(
        default=None, description="What the autoscaler decided last."
    )
    cold_start: ColdStartStatus | None = Field(
        default=None, description="Of the replica that was admitted last."
    )
    conditions: Annotated[tuple[Condition, ...], Field(max_length=16), Unique("type")] = Field(
        default=(),
        description="Ready, ModelCached, ReplicasReady, Routable, Progressing, CanaryHealthy, "
        "ScalingActive and Degraded, as far as they apply.",
    )

    def condition(self, type: ConditionType) -> Condition | None:
        """The condition of that type, where it is set."""
        return next((c for c in self.conditions if c.type == type), None)
