"""The route table: what the operator tells routers about one service.

One document a service, written by the operator alone: a file `<service>.json` in a watched
directory locally, a ConfigMap in Kubernetes. A router watches nothing else, and keeps serving
what it knows when the operator is gone.
"""

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class RoutingPolicy(StrEnum):
    """How a router picks the replica for a request."""

    PREFIX_AWARE = "PrefixAware"
    ROUND_ROBIN = "RoundRobin"
    LEAST_REQUESTS = "LeastRequests"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Endpoint(_Frozen):
    """One replica: the engine's gRPC address on the leader pod of a group."""

    name: str
    address: str  # host:port
    revision: str
    draining: bool = False  # takes no new requests; those in flight go on


class Pin(_Frozen):
    """Requests with this header of this value go to this revision, whatever its weight."""

    header: str  # in lower case
    value: str
    revision: str


class RouteTable(_Frozen):
    """All that a router needs to serve one InferenceService."""

    service: str
    generation: Annotated[int, Field(ge=0)] = 0  # rises with every change
    models: tuple[str, ...]  # OpenAI model ids: the name first, then its aliases
    endpoints: tuple[Endpoint, ...] = ()
    weights: dict[str, int] = {}  # revision -> percent of new requests; absent: 0
    pins: tuple[Pin, ...] = ()  # the first that matches counts
    policy: RoutingPolicy = RoutingPolicy.PREFIX_AWARE
    session_header: str = "x-session-id"
    max_retries: int = 2
    migration_limit: int = 3
    max_queued: int = 1000
    queue_timeout_seconds: float = 120.0
