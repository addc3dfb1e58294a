"""What the commands need of the place where services live: this machine or a cluster.

`get`, `describe`, `apply`, `scale`, `delete`, `wait`, `logs` and `top` are written against
`Backend`; `LocalBackend` reads and writes a state directory, `KubeBackend` an API server.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from shoal.api.types import InferenceService, InferenceServiceSpec
    from shoal.api.v1.router_pb2 import RouterLoad

Document = Mapping[str, Any]
ApplyResult = Literal["created", "configured", "unchanged"]


@dataclass(frozen=True, slots=True)
class PodView:
    """One pod, as tables show it."""

    name: str
    service: str  # "" of a router, which serves all
    role: str
    revision: str
    ready: str  # containers: "1/1"
    status: str  # one word
    restarts: int
    created: float  # Unix seconds
    place: str  # node, or process id
    address: str
    document: Document
    message: str = ""  # what happened and what comes next, one sentence
    namespace: str = ""


@dataclass(frozen=True, slots=True)
class LogLine:
    pod: str
    text: str
    several: bool  # whether other pods' lines may be among this one's


@dataclass(frozen=True, slots=True)
class EventView:
    """Something that happened to a service or to what belongs to it."""

    kind: str  # Normal | Warning
    reason: str
    subject: str  # kind/name
    message: str
    last: float  # Unix seconds
    count: int


class Backend(Protocol):
    """All methods raise CliError with a sentence where the place cannot be reached, or refuses."""

    where: str  # in words, as in "nothing found in <where>"
    hint: str  # the next command where nothing is found
    place: str  # what PodView.place is: node | pid
    namespaced: bool  # whether tables have a column for the namespace
    poll_seconds: float  # a good pause between two looks

    def services(self, name: str | None = None) -> list[dict[str, Any]]:
        """Services with their status, by name; one of them if asked for. [] where there is none."""
        ...

    def pods(self, service: str | None = None) -> list[PodView]:
        """Pods by name, routers among them; of one service if asked for."""
        ...

    def events(self, service: str) -> list[EventView]:
        """What was told of a service and its pods, the oldest first."""
        ...

    def load(self, filenames: Sequence[str]) -> list["InferenceService"]:
        """The services of YAML files, in order; all are checked before one is returned."""
        ...

    def key(self, service: "InferenceService") -> str:
        """The name by which the other methods find a service of a file: `namespace/name` where
        it is of another namespace than the one looked at."""
        ...

    def apply(self, service: "InferenceService") -> ApplyResult:
        """Makes it the desired state of its name. `replicas` left out keeps the number in force."""
        ...

    def scale(self, name: str, replicas: int) -> ApplyResult: ...

    def patch(self, name: str, change: Mapping[str, object]) -> None:
        """Merges `change` into a service's document (RFC 7386): null takes a key out."""
        ...

    def delete(self, name: str) -> bool:
        """False where there is no such service."""
        ...

    def gone(self, name: str) -> bool:
        """Whether nothing of a deleted service is left."""
        ...

    def asleep(self) -> str | None:
        """Why nothing acts on the desired state, as a sentence; None where something does."""
        ...

    def warnings(self, spec: "InferenceServiceSpec") -> list[str]:
        """What of a spec has no effect there."""
        ...

    def logs(self, name: str, tail: int | None, *, follow: bool) -> Iterator[LogLine]:
        """Lines of a pod, of a service's pods, or of "router": the last `tail` of each, then,
        following, what comes until the pods are gone. Raises CliError for an unknown name."""
        ...

    def loads(self) -> tuple[list["RouterLoad"], list[str]]:
        """What each router says of its load, and a sentence for each that did not answer.
        Raises CliError where none answers."""
        ...

    def service_name(self, key: str) -> str | None:
        """The name of the service that routers call `key`; None where it is not of this place."""
        ...

    def wait(self, ready: Callable[[], bool], timeout: float) -> bool:
        """Asks `ready` until it says yes; False after `timeout` seconds."""
        ...


def not_found(backend: Backend, name: str) -> str:
    """The sentence for a service that is not there."""
    known = ", ".join(document["metadata"]["name"] for document in backend.services()) or "none"
    return f'inferenceservice "{name}" not found; there are: {known} (in {backend.where})'
