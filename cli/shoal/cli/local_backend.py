"""Services of this machine: a state directory, served by `shoal up`."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from shoal.cli.backend import ApplyResult, EventView, LogLine, PodView
from shoal.cli.errors import CliError
from shoal.cli.tail import Tailer, last
from shoal.cli.view import pod_status, service_documents

if TYPE_CHECKING:
    from shoal.api.types import InferenceService, InferenceServiceSpec
    from shoal.api.v1.router_pb2 import RouterLoad
    from shoal.operator.local.records import PodRecord
    from shoal.operator.local.store import Store

_FOLLOW_SECONDS = 0.2
_LOAD_SECONDS = 3.0


class LocalBackend:
    """See shoal.cli.backend.Backend."""

    place = "pid"
    namespaced = False
    hint = (
        "start with: shoal up -f service.yaml; services of a cluster are shown with "
        "--namespace, --context or SHOAL_BACKEND=kubernetes"
    )
    poll_seconds = 0.3

    def __init__(self, store: "Store", sleep: Callable[[float], None] = time.sleep) -> None:
        self.store = store
        self.where = str(store.root)
        self._sleep = sleep

    def services(self, name: str | None = None) -> list[dict[str, Any]]:
        return service_documents(self.store, name)

    def pods(self, service: str | None = None) -> list[PodView]:
        return [pod_view(record) for record in self.store.pods(service)]

    def events(self, service: str) -> list[EventView]:
        """`shoal up` tells events where it runs, and keeps none."""
        return []

    def load(self, filenames: Sequence[str]) -> list["InferenceService"]:
        from shoal.cli.manifests import load

        return load(filenames)

    def key(self, service: "InferenceService") -> str:
        return service.name

    def apply(self, service: "InferenceService") -> ApplyResult:
        return self.store.apply(service)

    def scale(self, name: str, replicas: int) -> ApplyResult:
        return self.store.scale(name, replicas)

    def patch(self, name: str, change: Mapping[str, object]) -> None:
        self.store.patch(name, change)

    def delete(self, name: str) -> bool:
        return self.store.delete(name)

    def gone(self, name: str) -> bool:
        return (
            self.store.get(name) is None
            and self.store.status(name) is None
            and not self.store.pods(name)
        )

    def asleep(self) -> str | None:
        if self.store.supervisor() is not None:
            return None
        return f"nothing serves from {self.where}; start it with: shoal up"

    def warnings(self, spec: "InferenceServiceSpec") -> list[str]:
        from shoal.operator.unsupported import unsupported

        return unsupported(spec)

    def logs(self, name: str, tail: int | None, *, follow: bool) -> Iterator[LogLine]:
        pods = self._logged(name)
        if not pods:
            known = [pod.name for pod in self.store.pods()]
            known += [service.metadata.name for service in self.store.services()]
            names = ", ".join(known) or "none"
            raise CliError(f'no pod and no service "{name}"; there are: {names}')
        tailers = {pod: Tailer(self.store.log_path(pod)) for pod in pods}
        for pod, tailer in tailers.items():
            for line in last(tailer.read(), tail):
                yield LogLine(pod, line, len(pods) > 1)
        while follow and self.store.supervisor() is not None:
            self._sleep(_FOLLOW_SECONDS)
            alive = self._logged(name)
            for pod in alive:
                tailers.setdefault(pod, Tailer(self.store.log_path(pod)))
            for pod, tailer in tailers.items():
                for line in tailer.read():
                    yield LogLine(pod, line, len(tailers) > 1)
            if not alive:
                return

    def loads(self) -> tuple[list["RouterLoad"], list[str]]:
        from shoal.cli.load import ask_router

        supervisor = self.store.supervisor()
        if supervisor is None:
            raise CliError(str(self.asleep()))
        return [ask_router(supervisor.grpc_address, _LOAD_SECONDS)], []

    def service_name(self, key: str) -> str | None:
        return key

    def wait(self, ready: Callable[[], bool], timeout: float) -> bool:
        return self.store.wait(ready, timeout)

    def _logged(self, name: str) -> list[str]:
        """The pods behind a name; a pod that is gone counts while its log is there."""
        pods = [pod.name for pod in self.store.pods() if name in (pod.name, pod.service)]
        if not pods and "/" not in name and self.store.log_path(name).is_file():
            return [name]
        return pods


def pod_view(record: "PodRecord") -> PodView:
    """A pod that is a process here."""
    return PodView(
        name=record.name,
        service=record.service,
        role=record.role,
        revision=record.revision,
        ready="1/1" if record.ready else "0/1",
        status=pod_status(record),
        restarts=record.restarts,
        created=record.created,
        place="" if record.pid is None else str(record.pid),
        address=record.address or "",
        document={"kind": "Pod", **asdict(record)},
        message=record.message,
    )
