"""What the planner sees of the world: pods, routers, the route table, the last status.

Appliers fill these in, from processes or from the API server; the planner knows no difference.
Times are Unix seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from shoal.api.routes import RouteTable
from shoal.api.status import ColdStartStatus
from shoal.api.types import AutoscalingStatus, CanaryStatus, InferenceServiceStatus
from shoal.api.v1 import router_pb2
from shoal.operator.autoscale_load import RouterReport
from shoal.operator.canary import Course
from shoal.operator.revision import Revision

# Reasons that time alone does not mend: somebody has to change something.
FAILING: Final = frozenset(
    {
        "CrashLoopBackOff",
        "OOMKilled",
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
        "ImageInspectError",
        "RegistryUnavailable",
        "CreateContainerConfigError",
        "CreateContainerError",
        "RunContainerError",
        "PostStartHookError",
        "Unschedulable",
        "FetchFailed",
    }
)


@dataclass(frozen=True, slots=True)
class ObservedPod:
    """One worker pod. A replica is a group of pods; a group has one pod where world size is 1.

    The planner sees a whole group as one of these, under its leader's name (`groups`).
    """

    name: str
    revision: str  # that it serves
    replica: int
    created: float
    address: str | None = None  # host:port of the engine; None until it is known
    ready: bool = False
    drain_started: float | None = None  # set by DrainPod, cleared by ResumePod
    deleting: bool = False
    restarts: int = 0
    reason: str = ""  # why it is not ready, in one CamelCase word, e.g. CrashLoopBackOff
    message: str = ""
    member: int = 0  # place within the group; 0 leads and has the engine's port
    group_size: int = 1
    started: bool = False  # one of its containers has run
    lost: bool = False  # ended for good, or on a node that does not answer
    gone_node: bool = False  # lost with its node: it may come back
    fetched: int | None = None  # percent of the model, while it downloads and says so
    scheduled: float | None = None  # when it had a node
    launched: float | None = None  # when the engine's process began
    born: str | None = None  # revision that it was made of, where weights were swapped since

    @property
    def retiring(self) -> bool:
        """On its way out. A node that does not answer is no reason: the engine may serve on."""
        ended = self.lost and not self.gone_node
        return self.deleting or ended or self.drain_started is not None

    @property
    def failing(self) -> bool:
        return self.reason in FAILING


@dataclass(frozen=True, slots=True)
class EndpointView:
    """What one router says about one endpoint."""

    address: str
    admitted: bool
    in_flight: int
    # Seconds of the engine's start: until its weights were in memory, and of the warm-up.
    startup: tuple[float, float] | None = None
    warm: int = field(default=0, compare=False)  # blocks of prefixes in its cache: no news


@dataclass(frozen=True, slots=True)
class RouterView:
    """What one router says about the service: the table it acts on, and its endpoints by name.

    Its name and what it says of the load are no part of what two views are compared by: a load
    that changes is no reason to plan anew.
    """

    generation: int
    endpoints: Mapping[str, EndpointView] = field(default_factory=lambda: MappingProxyType({}))
    name: str = field(default="", compare=False)
    report: RouterReport | None = field(default=None, compare=False)
    load: router_pb2.ServiceLoad | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Claim:
    """An older service owns a model id that this one wants."""

    model_id: str
    owner: str


@dataclass(frozen=True, slots=True)
class ScalingView:
    """What the autoscaler decided last."""

    wanted: int  # replicas
    status: AutoscalingStatus
    active: bool  # whether metrics decide; else `reason` and `message` say what keeps them
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class TrialView:
    """What a canary asks for, and what is shown of it."""

    course: Course
    status: CanaryStatus | None
    healthy: bool | None  # None: not judged yet
    message: str


class SwapState(StrEnum):
    """How a call to swap a replica's weights stands."""

    RUNNING = "Running"
    DONE = "Done"
    REFUSED = "Refused"  # these weights do not go where the others are
    FAILED = "Failed"  # to be tried again after a while
    AGAIN = "Again"  # it failed, and that while is over


@dataclass(frozen=True, slots=True)
class SwapView:
    """The last call to swap one replica's weights."""

    revision: str  # that it is to serve
    restarts: int  # of the process that was called: one that starts anew knows nothing of it
    state: SwapState
    message: str = ""  # why it has not come to that so far, in the engine's words


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
    rejected: str | None = None  # why the cluster refused the pod that was to be made last
    cold_start: ColdStartStatus | None = None  # of the replica that was just admitted
    silent_routers: int = 0  # that take requests but did not answer lately; not among `routers`
    scaling: ScalingView | None = None  # None: the number of replicas is the spec's
    trial: TrialView | None = None  # None: no revision is on trial
    swaps: Mapping[str, SwapView] = field(
        default_factory=lambda: MappingProxyType({})
    )  # by pod, of calls that this process made

    def admitted(self, pod: ObservedPod) -> bool:
        """Whether every router that answered sends requests to this pod; False if none did."""
        views = [router.endpoints.get(pod.name) for router in self.routers]
        return bool(views) and all(
            view is not None and view.admitted and view.address == pod.address for view in views
        )

    def reached(self, pod: ObservedPod) -> bool:
        """Whether any router sends requests to this pod, whatever the cluster knows of it."""
        views = (router.endpoints.get(pod.name) for router in self.routers)
        return any(v is not None and v.admitted and v.address == pod.address for v in views)

    def gone(self, pod: ObservedPod) -> bool:
        """Ended, or lost to the routers too: not counted any more, though a node may come back."""
        return pod.lost and not (pod.gone_node and self.reached(pod))

    def stays(self, pod: ObservedPod) -> bool:
        """Serves, or is to be waited for."""
        return not pod.retiring and not self.gone(pod)

    def routable(self, pod: ObservedPod) -> bool:
        """Admitted, meant to stay, and ready as far as its node tells."""
        return (pod.ready or pod.gone_node) and not pod.retiring and self.admitted(pod)

    def in_flight(self, pod: ObservedPod) -> int:
        """Requests that routers have at this pod."""
        views = (router.endpoints.get(pod.name) for router in self.routers)
        return sum(view.in_flight for view in views if view is not None)

    def warm(self, pod: ObservedPod) -> int:
        """Blocks of prefixes that its cache holds, as the router says that knows most."""
        views = (router.endpoints.get(pod.name) for router in self.routers)
        return max((view.warm for view in views if view is not None), default=0)

    def drained(self, pod: ObservedPod) -> bool:
        """Whether no router has, or will send, a request to this pod."""
        if self.table is None or not any(e.name == pod.name for e in self.table.endpoints):
            return self.in_flight(pod) == 0  # never in one, or that table was lost
        told = any(e.name == pod.name and e.draining for e in self.table.endpoints)
        generation = self.table.generation
        heard = bool(self.routers) and all(r.generation == generation for r in self.routers)
        return told and heard and self.in_flight(pod) == 0
