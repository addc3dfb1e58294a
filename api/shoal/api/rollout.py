"""How a service changes over from one revision to the next."""

from enum import StrEnum

from pydantic import Field

from shoal.api.base import MAX_COUNT, ApiModel


class RolloutStrategy(StrEnum):
    """How a new revision takes over."""

    IN_PLACE = "InPlace"
    ROLLING_UPDATE = "RollingUpdate"
    BLUE_GREEN = "BlueGreen"


class InFlight(StrEnum):
    """What becomes of requests in flight when weights are swapped in place."""

    FINISH = "finish"
    RECOMPUTE = "recompute"


class CanaryStep(ApiModel):
    """A share of new requests for the new revision, and how long it stays."""

    weight: int = Field(ge=1, le=100, description="Percent of new requests for the new revision.")
    pause_seconds: int = Field(
        default=0, ge=0, le=604_800, description="Time at this weight before the next step."
    )
    until_promoted: bool = Field(
        default=False,
        description="Stay at this weight until somebody promotes the canary by hand.",
    )


class AnalysisWebhook(ApiModel):
    """Somebody else's judgement of the new revision.

    A POST of JSON {service, revision, stable, step, weight}; status 200 with {"healthy": true}
    or {"healthy": false, "message": "..."} is an answer, anything else is none.
    """

    url: str = Field(
        pattern="^https?://[^/ ]+", max_length=2048, description="Where the question is sent."
    )
    timeout_seconds: int = Field(
        default=5, ge=1, le=60, description="Longest wait for the answer; none is no answer."
    )


class CanaryAnalysis(ApiModel):
    """Compares the new revision with the stable one, and rolls back where it is worse."""

    interval_seconds: int = Field(default=10, ge=1, le=3600, description="Time between two looks.")
    min_requests: int = Field(
        default=50,
        ge=1,
        le=1_000_000,
        description="Requests of the new revision before it is judged.",
    )
    max_failures: int = Field(
        default=3, ge=1, le=1000, description="Looks in a row that may fail before the way back."
    )
    max_error_rate: float = Field(
        default=0.01, ge=0, le=1, description="Share of requests that may fail."
    )
    max_ttft_p95_ratio: float = Field(
        default=1.3,
        ge=1,
        le=1000,
        description="p95 time to first token, relative to the stable revision.",
    )
    max_itl_p95_ratio: float = Field(
        default=1.3,
        ge=1,
        le=1000,
        description="p95 time between tokens, relative to the stable revision.",
    )
    webhook: AnalysisWebhook | None = Field(
        default=None, description="Asked at every look too. Default: the routers' figures decide."
    )


class CanaryAudience(ApiModel):
    """Requests by a header of theirs."""

    header: str = Field(
        pattern="^[A-Za-z0-9-]+$", max_length=128, description="Name of the header, in any case."
    )
    value: str = Field(min_length=1, max_length=256, description="Its value, to the letter.")


class CanarySpec(ApiModel):
    """A new revision takes over step by step."""

    steps: tuple[CanaryStep, ...] = Field(
        min_length=1,
        max_length=20,
        description="Rising weights; the last is 100.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    analysis: CanaryAnalysis | None = Field(
        default=None,
        description="Judges the new revision at every step. Default: time alone decides.",
    )
    audience: tuple[CanaryAudience, ...] = Field(
        default=(),
        max_length=8,
        description="Requests that go to the new revision whatever its weight, and to the "
        "stable one once it is given up.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    abort_retention_seconds: int = Field(
        default=600,
        ge=0,
        le=604_800,
        description="Time that replicas of an aborted canary stay, without requests, "
        "to be looked at.",
    )


class BlueGreenSpec(ApiModel):
    """A full second set of replicas, one switch, and the first set kept for a while."""

    keep_seconds: int = Field(
        default=300,
        ge=0,
        le=604_800,
        description="Time that the old replicas stay after the switch, so that the way back is "
        "another switch.",
    )


class RollbackSpec(ApiModel):
    """An earlier revision that serves instead of the one that the spec describes."""

    revision: str = Field(
        pattern="^[0-9a-f]{10}$",
        description="Its name, as in status.previousRevision.",
    )
    instead_of: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{10}$",
        description="Only as long as the spec describes this revision, so that the next change "
        "of the model ends it. Default: until it is taken out.",
    )


class RolloutSpec(ApiModel):
    """How a new revision takes over."""

    strategy: RolloutStrategy = Field(
        default=RolloutStrategy.ROLLING_UPDATE,
        description="RollingUpdate: replica by replica. BlueGreen: a full second set, "
        "then a switch. InPlace: new weights in running replicas.",
    )
    max_surge: int = Field(
        default=1,
        ge=0,
        le=MAX_COUNT,
        description="Replicas above the wanted number during a rollout.",
    )
    max_unavailable: int = Field(
        default=0, ge=0, le=MAX_COUNT, description="Replicas that may be missing during a rollout."
    )
    drain_seconds: int = Field(
        default=60,
        ge=0,
        le=86_400,
        description="Time for requests in flight to end before a replica is stopped; "
        "what is left then goes on at another replica.",
    )
    in_flight: InFlight = Field(
        default=InFlight.FINISH,
        description="InPlace only. finish: requests end on the weights they began with. "
        "recompute: those of which no token was sent yet begin anew on the new ones.",
    )
    canary: CanarySpec | None = Field(
        default=None, description="Take over step by step. Default: at once."
    )
    blue_green: BlueGreenSpec | None = Field(
        default=None, description="Settings of strategy BlueGreen; not of the others."
    )
    rollback_to: RollbackSpec | None = Field(
        default=None, description="Serve an earlier revision instead of the one specified."
    )
