"""What the state directory says about running things: pods and the supervisor."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum


class PodPhase(StrEnum):
    """Where a pod's process stands."""

    WAITING = "Waiting"  # between two tries; the reason says why
    RUNNING = "Running"  # the process runs; `ready` says whether it serves
    STOPPING = "Stopping"  # asked to end


@dataclass(frozen=True, slots=True)
class PodRecord:
    """One pod as `shoal get pods` shows it: a file pods/<name>.json written by the supervisor."""

    name: str
    service: str  # "" for the router, which serves all
    role: str  # leader | router
    phase: str  # a PodPhase
    revision: str = ""
    replica: int = 0
    ready: bool = False
    reason: str = ""  # e.g. CrashLoopBackOff
    message: str = ""  # what happened and what comes next, one sentence
    restarts: int = 0
    pid: int | None = None
    process_started: float | None = None  # as the kernel tells it, to know the pid again
    created: float = 0.0  # Unix seconds
    started: float | None = None  # Unix seconds, of the present process
    drain_started: float | None = None  # Unix seconds
    address: str | None = None  # host:port of gRPC
    ports: Mapping[str, int] | None = None  # by name: grpc, metrics, http
    serves: str | None = None  # mark of a swap of its weights, see `inplace`

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> "PodRecord | None":
        """Reads what `dataclasses.asdict` wrote; None where fields are missing."""
        known = {
            field.name: document[field.name] for field in fields(cls) if field.name in document
        }
        try:
            return cls(**known)  # type: ignore[arg-type]  # written by ourselves, names checked
        except TypeError:
            return None


@dataclass(frozen=True, slots=True)
class SupervisorInfo:
    """Who holds the state directory, and where its router listens."""

    pid: int
    url: str  # http://host:port
    grpc_address: str  # host:port
    started: float  # Unix seconds
