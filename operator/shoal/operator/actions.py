"""What a planner may ask for, one durable step each; appliers perform them in their order."""

from dataclasses import dataclass

from shoal.api.routes import RouteTable
from shoal.api.types import InFlight
from shoal.operator.build import Pod
from shoal.operator.revision import Revision


@dataclass(frozen=True, slots=True)
class SaveRevision:
    """Remember the spec of a revision before the first of its pods is made."""

    revision: Revision


@dataclass(frozen=True, slots=True)
class CreatePod:
    pod: Pod


@dataclass(frozen=True, slots=True)
class DrainPod:
    """Mark the pod, the leader of its group, with the time from which `drainSeconds` count."""

    name: str


@dataclass(frozen=True, slots=True)
class ResumePod:
    """Take the mark back: the pod is wanted again."""

    name: str


@dataclass(frozen=True, slots=True)
class SwapWeights:
    """Have the replica's engine load a revision's model and serve it from then on. It takes its
    time: performing this only begins it, and what became of it is observed (`Observed.swaps`)."""

    name: str
    address: str
    restarts: int  # of the process that is called
    revision: Revision
    in_flight: InFlight


@dataclass(frozen=True, slots=True)
class MarkServed:
    """Write down which revision the replica serves, until its container restarts."""

    name: str
    revision: str
    restarts: int


@dataclass(frozen=True, slots=True)
class WriteRoutes:
    table: RouteTable


@dataclass(frozen=True, slots=True)
class DeletePod:
    """End the pod, by force after `grace_seconds`."""

    name: str
    grace_seconds: float


@dataclass(frozen=True, slots=True)
class ForgetRevision:
    name: str


@dataclass(frozen=True, slots=True)
class RemoveRoutes:
    """The service is gone: routers forget it."""


Action = (
    SaveRevision
    | CreatePod
    | DrainPod
    | ResumePod
    | SwapWeights
    | MarkServed
    | WriteRoutes
    | DeletePod
    | ForgetRevision
    | RemoveRoutes
)
