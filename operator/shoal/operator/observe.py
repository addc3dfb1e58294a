"""What the planner sees of the world: pods, routers, the route table, the last status.

Appliers fill these in, from processes or from the API server; the planner knows no difference.
Times are Unix seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from shoal.api.routes import RouteTable
from shoal.api.types import InferenceServiceStatus
from shoal.operator.revision import Revision


@dataclass(frozen=True, slots=True)
class ObservedPod:
    """One worker pod. A replica is a group of pods; a group has one pod where world size is 1."""

    name: str
    revision: str
    replica: int
    created: float
    address: str | None = None  # host:port of the engine; None until it is known
    ready: bool = False
    drain_started: float | None = None  # set by DrainPod, cleared by ResumePod
    deleting: bool = False
    restarts: int = 0
    reason: str = ""  # why it is not ready, in one CamelCase word, e.g. CrashLoopBackOff
    message: str = ""

    @property
    def retiring(self) -> bool:
        return self.deleting or self.drain_started is not None


@dataclass(frozen=True, slots=True)
class EndpointView:
    """What one router says about one endpoint."""

    address: str
    admitted: bool
    in_flight: int


@dataclass(frozen=True, slots=True)
class RouterView:
    """What one router says about the service: the table it acts on, and its endpoints by name."""

    generation: int
    endpoints: Mapping[str, EndpointView] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Claim:
    """An older service owns a model id that this one wants."""

    model_id: str
    owner: str


@dataclass(frozen=True, slots=True)
class Observed:
    """Everything about one service that is not in its spec."""

    pods: tuple[ObservedPod, ...] = ()
    routers: tuple[RouterView, ...] = ()  # those that answered lately
    table: RouteTable | None = None
    revisions: tuple[Revision, ...] = ()
    status: InferenceServiceStatus = field(default_factory=InferenceServiceStatus)
    claims: tuple[Claim, ...] = ()
    url: str | None = None

    def admitted(self, pod: ObservedPod) -> bool:
        """Whether every router that answered sends requests to this pod; False if none did."""
        views = [router.endpoints.get(pod.name) for router in self.routers]
        return bool(views) and all(
            view is not None and view.admitted and view.address == pod.address for view in views
        )

    def routable(self, pod: ObservedPod) -> bool:
        """Ready, admitted, and meant to stay."""
        return pod.ready and not pod.retiring and self.admitted(pod)

    def in_flight(self, pod: ObservedPod) -> int:
        """Requests that routers have at this pod."""
        views = (router.endpoints.get(pod.name) for router in self.routers)
        return sum(view.in_flight for view in views if view is not None)

    def drained(self, pod: ObservedPod) -> bool:
        """Whether no router has, or will send, a request to this pod."""
        if self.table is None or not any(e.name == pod.name for e in self.table.endpoints):
            return True  # no router ever heard of it
        told = any(e.name == pod.name and e.draining for e in self.table.endpoints)
        generation = self.table.generation
        heard = bool(self.routers) and all(r.generation >= generation for r in self.routers)
        return told and heard and self.in_flight(pod) == 0
