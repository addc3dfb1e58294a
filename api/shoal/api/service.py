"""The InferenceService itself."""

from typing import Annotated, Literal

from pydantic import AwareDatetime, ConfigDict, Field, JsonValue
from typing_extensions import TypedDict

from shoal.api.base import MAX_COUNT, ApiModel
from shoal.api.rollout import RolloutSpec
from shoal.api.routes import RoutingPolicy
from shoal.api.scaling import AutoscalingSpec
from shoal.api.status import InferenceServiceStatus
from shoal.api.workload import (
    CacheSpec,
    CostSpec,
    EngineSpec,
    ModelSpec,
    ParallelismSpec,
    ResourcesSpec,
)


class OverlayMetadata(TypedDict, total=False):
    """Metadata of the pods."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]  # pydantic's protocol

    labels: Annotated[
        dict[str, Annotated[str, Field(max_length=63)]],
        Field(max_length=64, description="More labels for the pods; not those that Shoal sets."),
    ]


class PodOverlay(TypedDict, total=False):
    """A partial pod template. The labels are typed so that a rule can see them."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]  # pydantic's protocol

    metadata: Annotated[OverlayMetadata, Field(description="Metadata of the pods.")]


Labels = Annotated[dict[str, str], Field(max_length=256)]


class RoutingSpec(ApiModel):
    """How routers pick a replica, and what they do when one fails."""

    policy: RoutingPolicy = Field(
        default=RoutingPolicy.PREFIX_AWARE,
        description="PrefixAware: soonest first token, cached prefixes counted. "
        "RoundRobin: in turn. LeastRequests: fewest in flight.",
    )
    session_header: str = Field(
        default="x-session-id",
        pattern=r"^[A-Za-z0-9-]+$",
        max_length=128,
        description="HTTP header whose value keeps a session on its replica.",
    )
    max_retries: int = Field(
        default=2, ge=0, le=10, description="Times a request is sent again before its first token."
    )
    migration_limit: int = Field(
        default=3,
        ge=0,
        le=100,
        description="Times a stream goes on at another replica after one failed.",
    )


class InferenceServiceSpec(ApiModel):
    """What is wanted."""

    model: ModelSpec = Field(description="The model, and the names clients ask for it by.")
    engine: EngineSpec = Field(default=EngineSpec(), description="The engine's settings.")
    parallelism: ParallelismSpec = Field(
        default=ParallelismSpec(), description="How a replica's ranks share the model."
    )
    resources: ResourcesSpec = Field(
        default=ResourcesSpec(), description="What each pod of a replica gets."
    )
    replicas: int = Field(
        default=1,
        ge=0,
        le=MAX_COUNT,
        description="Number of replicas; the scale subresource writes here.",
    )
    autoscaling: AutoscalingSpec | None = Field(
        default=None, description="Replicas follow the load. Default: spec.replicas decides."
    )
    rollout: RolloutSpec = Field(
        default=RolloutSpec(), description="How a new revision takes over."
    )
    routing: RoutingSpec = Field(default=RoutingSpec(), description="How routers pick a replica.")
    cost: CostSpec | None = Field(
        default=None, description="Prices, for the cost of a million tokens."
    )
    cache: CacheSpec = Field(default=CacheSpec(), description="Where downloaded models are kept.")
    pod_overlay: PodOverlay = Field(
        default=PodOverlay(),
        description="Merged into the pod template (strategic merge patch); "
        "may not touch the labels that Shoal sets.",
    )
    paused: bool = Field(
        default=False,
        description="Hold back new revisions: the one that serves stays. Scaling and repair go on.",
    )


class ObjectMeta(ApiModel):
    """Metadata as Kubernetes has it. Shoal reads the first few and carries the rest along."""

    name: str
    namespace: str = "default"
    labels: Labels = Field(default={})
    annotations: Labels = Field(default={})
    generation: int | None = None
    uid: str | None = None
    creation_timestamp: AwareDatetime | None = None
    deletion_timestamp: AwareDatetime | None = None
    resource_version: str | None = None
    deletion_grace_period_seconds: int | None = None
    generate_name: str | None = None
    self_link: str | None = None
    finalizers: tuple[str, ...] = ()
    owner_references: tuple[JsonValue, ...] = ()
    managed_fields: tuple[JsonValue, ...] = ()


class InferenceService(ApiModel):
    """Serves a language model behind the OpenAI API and gRPC."""

    api_version: Literal["serving.shoal.dev/v1alpha1"] = "serving.shoal.dev/v1alpha1"
    kind: Literal["InferenceService"] = "InferenceService"
    metadata: ObjectMeta
    spec: InferenceServiceSpec = Field(description="What is wanted.")
    status: InferenceServiceStatus = Field(
        default=InferenceServiceStatus(),
        description="What the operator last saw; nobody else writes it.",
    )

    @property
    def name(self) -> str:
        return self.metadata.name

    @property
    def model_ids(self) -> tuple[str, ...]:
        """The OpenAI model ids of the service itself: its name first, then its aliases."""
        return (self.spec.model.name or self.metadata.name, *self.spec.model.aliases)
