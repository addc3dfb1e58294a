"""The state directory: what the API server is to Kubernetes, files are to `shoal up`.

    services/<name>.yaml    desired: written by people through `shoal apply`, scale and delete
    status/<name>.json      observed: written by the supervisor, like all below
    pods/<pod>.json         one process each
    revisions/<name>.json   the specs of the revisions that still matter
    routes/<name>.json      route tables, watched by the router
    logs/<pod>.log          standard output and error
    supervisor.lock         held (flock) while a supervisor runs
    supervisor.json         its pid and addresses, meanwhile

A desired document has one writer at a time (services/.lock) and carries what an API server
would add: `metadata.generation` rises with every change of the spec, `creationTimestamp` says
who was first. Everything else has one writer, the supervisor, and can be lost: it is observed
or planned again.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

import yaml

from shoal.api.routes import RouteTable
from shoal.api.types import (
    InferenceService,
    InvalidManifest,
    Problem,
    parse_document,
    parse_manifest,
)
from shoal.operator.local import files
from shoal.operator.local.lock import ENV_STATE_DIR, SupervisorLock, SupervisorRuns
from shoal.operator.local.records import PodRecord, SupervisorInfo

ROUTER_POD: Final = "router"

__all__ = [
    "ENV_STATE_DIR",
    "ROUTER_POD",
    "ApplyResult",
    "Store",
    "SupervisorRuns",
    "UnknownService",
    "default_root",
    "written_document",
]

ApplyResult = Literal["created", "configured", "unchanged"]


class UnknownService(LookupError):
    """No InferenceService of that name is in the store."""

    def __init__(self, name: str, known: list[str]) -> None:
        there = f"there are: {', '.join(known)}" if known else "there are none"
        super().__init__(f'inferenceservice "{name}" not found; {there}')


def default_root(environ: Mapping[str, str] = os.environ) -> Path:
    """$SHOAL_STATE_DIR, else shoal/ in the XDG state directory."""
    if chosen := environ.get(ENV_STATE_DIR):
        return Path(chosen).expanduser()
    base = environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "shoal"


class Store:
    """The state directory at `root`; made on the first write."""

    def __init__(
        self,
        root: Path,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.root = root
        self._lock = SupervisorLock(root)
        self._clock = clock
        self._sleep = sleep

    # Desired state: what people write.

    def services(self) -> list[InferenceService]:
        """All desired services by name. A document that does not parse raises InvalidManifest."""
        found = map(_read_service, files.documents(self._services, ".yaml"))
        return [service for service in found if service is not None]

    def read_services(self) -> tuple[dict[str, InferenceService], dict[str, str]]:
        """Desired services by name, and by name what is wrong with those that do not parse."""
        good, wrong = {}, {}
        for path in files.documents(self._services, ".yaml"):
            try:
                service = _read_service(path)
            except (InvalidManifest, UnicodeDecodeError) as error:
                wrong[path.stem] = str(error)
                continue
            if service is not None:
                good[path.stem] = service
        return good, wrong

    def get(self, name: str) -> InferenceService | None:
        path = self._services / f"{name}.yaml"
        return _read_service(path) if path.parent == self._services else None

    def apply(self, service: InferenceService | Mapping[str, object]) -> ApplyResult:
        """Makes `service` the desired state of its name.

        `replicas` left out keeps the number in force, so that applying a file again does not
        undo `shoal scale`. Raises InvalidManifest for a document that is wrong, and for a name
        that a service of another namespace has: here a name stands for one service.
        """
        wanted = service if isinstance(service, InferenceService) else parse_document(service)
        with self._writing():
            current = self.get(wanted.metadata.name)
            if current is not None and current.metadata.namespace != wanted.metadata.namespace:
                raise InvalidManifest([_other_namespace(current, wanted)])
            said = current.spec.model_fields_set if current is not None else set()
            if current is not None and "replicas" in said - wanted.spec.model_fields_set:
                spec = wanted.spec.model_copy(update={"replicas": current.spec.replicas})
                wanted = wanted.model_copy(update={"spec": spec})
            return self._write(current, wanted)

    def scale(self, name: str, replicas: int) -> ApplyResult:
        """Sets `spec.replicas`. Raises UnknownService, or InvalidManifest for a wrong number."""
        with self._writing():
            current = self._existing(name)
            document = written_document(current)
            spec = document["spec"] | {"replicas": replicas}
            return self._write(current, parse_document(document | {"spec": spec}))

    def patch(self, name: str, change: Mapping[str, object]) -> None:
        """Merges `change` into the desired document (RFC 7386): None takes a key out. Raises
        UnknownService, or InvalidManifest where what comes out is wrong."""
        with self._writing():
            current = self._existing(name)
            merged = _merged(written_document(current), change)
            self._write(current, parse_document(merged))

    def delete(self, name: str) -> bool:
        """Removes the desired service; the supervisor drains and removes what runs for it."""
        with self._writing():
            if self.get(name) is None:
                return False
            (self._services / f"{name}.yaml").unlink(missing_ok=True)
            return True

    def services_signature(self) -> tuple[object, ...]:
        """Changes whenever a desired document does."""
        return files.signature(self._services, ".yaml")

    # Observed state: what the supervisor writes.

    def status(self, name: str) -> dict[str, object] | None:
        """`status` of the service, fields by their names in YAML; None while nothing is known."""
        return files.read_json(self.root / "status" / f"{name}.json")

    def write_status(self, name: str, status: Mapping[str, object]) -> None:
        files.write_json(self.root / "status" / f"{name}.json", status)

    def pods(self, service: str | None = None) -> list[PodRecord]:
        """Records of pods by name, the router's among them; of one service if asked for."""
        found = []
        for path in files.documents(self.root / "pods", ".json"):
            document = files.read_json(path)
            record = PodRecord.from_document(document) if document else None
            if record is not None and service in (None, record.service):
                found.append(record)
        return found

    def write_pod(self, record: PodRecord) -> None:
        files.write_json(self.root / "pods" / f"{record.name}.json", asdict(record))

    def remove_pod(self, name: str) -> None:
        (self.root / "pods" / f"{name}.json").unlink(missing_ok=True)

    def revisions(self, name: str) -> dict[str, Any]:
        return files.read_json(self.root / "revisions" / f"{name}.json") or {}

    def write_revisions(self, name: str, revisions: Mapping[str, object]) -> None:
        files.write_json(self.root / "revisions" / f"{name}.json", revisions)

    @property
    def routes_dir(self) -> Path:
        """Where the router finds its tables."""
        return self.root / "routes"

    def routes(self, name: str) -> RouteTable | None:
        text = files.read_text(self.routes_dir / f"{name}.json")
        try:
            return RouteTable.model_validate_json(text) if text else None
        except ValueError:
            return None

    def write_routes(self, table: RouteTable) -> None:
        text = table.model_dump_json(indent=2)
        files.write_text(self.routes_dir / f"{table.service}.json", text + "\n")

    def remove_routes(self, name: str) -> None:
        (self.routes_dir / f"{name}.json").unlink(missing_ok=True)

    def known(self) -> set[str]:
        """Names of services that left anything here, deleted ones included."""
        folders = ("status", "routes", "revisions")
        found = {p.stem for f in folders for p in files.documents(self.root / f, ".json")}
        return found | {record.service for record in self.pods() if record.service}

    def forget(self, name: str) -> None:
        """Removes what the supervisor wrote about a service whose pods are gone."""
        for folder in ("routes", "revisions", "status"):
            (self.root / folder / f"{name}.json").unlink(missing_ok=True)

    def clear_observed(self) -> None:
        """Forgets pods and routes: nothing runs any more. Which revision served is kept."""
        for folder in ("pods", "routes"):
            shutil.rmtree(self.root / folder, ignore_errors=True)

    def log_path(self, pod: str) -> Path:
        """Where the standard output and error of a pod go; the router's pod is `router`."""
        return self.root / "logs" / f"{pod}.log"

    # Who serves from here.

    def supervisor(self) -> SupervisorInfo | None:
        """The supervisor that runs, or None where none does."""
        return self._lock.holder()

    @contextmanager
    def hold(self, info: SupervisorInfo) -> Iterator[None]:
        """Holds the directory as its one supervisor. Raises SupervisorRuns where one is there."""
        with self._lock.hold(info):
            yield

    # Waiting, for commands.

    def wait(self, ready: Callable[[], bool], timeout: float, *, interval: float = 0.1) -> bool:
        """Asks `ready` until it says yes; False after `timeout` seconds."""
        return files.wait_until(
            ready, timeout, clock=time.monotonic, sleep=self._sleep, interval=interval
        )

    def wait_gone(self, name: str, timeout: float) -> bool:
        """Until nothing runs for `name` any more and no status is left."""
        return self.wait(lambda: self.status(name) is None and not self.pods(name), timeout)

    def wait_condition(
        self, name: str, condition: str, timeout: float, *, status: str = "True"
    ) -> bool:
        """Until a condition of `name` has a status, seen at the present generation."""

        def reached() -> bool:
            service, observed = self.get(name), self.status(name)
            if service is None or observed is None:
                return False
            current = observed.get("observedGeneration") == service.metadata.generation
            return current and _condition_status(observed, condition) == status

        return self.wait(reached, timeout)

    # Within.

    @property
    def _services(self) -> Path:
        return self.root / "services"

    def _existing(self, name: str) -> InferenceService:
        current = self.get(name)
        if current is None:
            known = [path.stem for path in files.documents(self._services, ".yaml")]
            raise UnknownService(name, known)
        return current

    def _write(self, current: InferenceService | None, wanted: InferenceService) -> ApplyResult:
        """Stores `wanted` with the generation and time of creation that it gets."""
        if current is None:
            generation, created = 1, self._now()
        else:
            generation = (current.metadata.generation or 1) + (current.spec != wanted.spec)
            created = current.metadata.creation_timestamp or self._now()
        stored = {"generation": generation, "creation_timestamp": created}
        wanted = wanted.model_copy(update={"metadata": wanted.metadata.model_copy(update=stored)})
        if current is not None and written_document(wanted) == written_document(current):
            return "unchanged"
        text = yaml.safe_dump(written_document(wanted), sort_keys=False, allow_unicode=True)
        files.write_text(self._services / f"{wanted.metadata.name}.yaml", text)
        return "created" if current is None else "configured"

    def _now(self) -> datetime:
        return datetime.fromtimestamp(int(self._clock()), UTC)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer of desired state at a time; held for one small write, so waiting is short."""
        self._services.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._services / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def written_document(service: InferenceService) -> dict[str, Any]:
    """The service as YAML has it: what was said, without defaults and without status."""
    said = service.model_dump(by_alias=True, exclude_unset=True, mode="json")
    return {
        "apiVersion": service.api_version,
        "kind": service.kind,
        "metadata": said["metadata"],
        "spec": said["spec"],
    }


def _read_service(path: Path) -> InferenceService | None:
    """The service in a file; None where there is no such file (any more)."""
    text = files.read_text(path)
    if text is None:
        return None
    found = parse_manifest(text)
    if len(found) != 1 or found[0].name != path.stem:
        problem = f"must hold the one service {path.stem}, the name of its file"
        raise InvalidManifest([Problem(str(path), problem)])
    return found[0]


def _other_namespace(current: InferenceService, wanted: InferenceService) -> Problem:
    return Problem(
        "metadata.namespace",
        f"{wanted.metadata.namespace}: the service {wanted.name} that is here belongs to namespace "
        f"{current.metadata.namespace}, and on one machine a name stands for one service; "
        f"give this one another name, or first: shoal delete {wanted.name}",
    )


def _condition_status(status: Mapping[str, object], kind: str) -> object:
    conditions = status.get("conditions")
    for condition in conditions if isinstance(conditions, list) else []:
        if condition.get("type") == kind:
            return condition.get("status")
    return None


def _merged(document: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(document)
    for key, value in change.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping):
            below = result.get(key)
            result[key] = _merged(below if isinstance(below, Mapping) else {}, value)
        else:
            result[key] = value
    return result
