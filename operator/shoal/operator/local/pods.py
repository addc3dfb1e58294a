"""All pods of this machine: what the kubelet and the pods' part of the API server are to a
cluster. Performs the planner's actions on pods, and writes pods/<name>.json."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from shoal.operator.build import Pod
from shoal.operator.inplace import mark_of, revisions_of
from shoal.operator.local.child import kill_leftover, process_started
from shoal.operator.local.container import Container, worker_container
from shoal.operator.local.logfile import LogFile
from shoal.operator.local.mishaps import Mishaps
from shoal.operator.local.process import Machine, PodProcess
from shoal.operator.local.records import PodPhase, PodRecord
from shoal.operator.local.settings import Level, SupervisorSettings, Update
from shoal.operator.local.store import ROUTER_POD, Store
from shoal.operator.observe import ObservedPod

_KEPT_LOGS = 100  # files; the oldest go first


class Pods:
    """Owner of every process, and of their records in the store."""

    def __init__(
        self,
        store: Store,
        settings: SupervisorSettings,
        machine: Machine,
        *,
        mishaps: Mishaps,
        changed: Callable[[], None],
        on_update: Callable[[Update], None],
    ) -> None:
        self._store = store
        self._settings = settings
        self._machine = machine
        self._mishaps = mishaps
        self._changed = changed
        self._on_update = on_update
        self._processes: dict[str, PodProcess] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}

    @property
    def records(self) -> list[PodRecord]:
        return [process.record for process in self._processes.values()]

    def observed(self, service: str) -> tuple[ObservedPod, ...]:
        """The pods of a service as the planner sees them."""
        return tuple(_observed(record) for record in self.records if record.service == service)

    def create(self, service: str, pod: Pod) -> None:
        self.run(worker_container(pod, service, self._settings))

    def run(self, container: Container) -> None:
        """Keeps a container running under its name, which must be free."""
        name = container.name
        assert name not in self._processes, name
        log = LogFile(self._store.log_path(name), self._settings.log_bytes)
        self._processes[name] = PodProcess(
            container,
            log,
            self._machine,
            changed=lambda: self._write(name),
            tell=lambda message, level: self._tell(container, message, level),
        )
        self._write(name)

    def mark_draining(self, name: str, draining: bool) -> None:
        if process := self._processes.get(name):
            process.mark_draining(draining)

    def mark_served(self, name: str, revision: str, restarts: int) -> None:
        if process := self._processes.get(name):
            process.mark_served(mark_of(revision, restarts))

    def delete(self, name: str, grace: float) -> None:
        """Begins to end a pod; it is gone from the records once its process is."""
        if name in self._processes and name not in self._ending:
            self._ending[name] = asyncio.create_task(self._end(name, grace))

    async def end(self, name: str, grace: float) -> None:
        """Ends a pod and waits until it is gone."""
        self.delete(name, grace)
        if task := self._ending.get(name):
            await asyncio.wait({task})

    async def end_workers(self, grace: float) -> None:
        """Ends all but the router, together."""
        names = [name for name in self._processes if name != ROUTER_POD]
        await asyncio.gather(*(self.end(name, grace) for name in names))

    def kill_all(self) -> None:
        """Ends every process now."""
        for process in self._processes.values():
            process.kill()

    def write_records(self) -> None:
        """Writes what could not be written when it changed, and removes what nobody has."""
        for name in self._processes:
            with self._mishaps.around(_record_of(name)):
                self._store.write_pod(self._processes[name].record)
        for record in self._store.pods():
            if record.name not in self._processes:
                with self._mishaps.around(f"removing the record of {record.name}"):
                    self._store.remove_pod(record.name)

    def bound_logs(self) -> None:
        """Keeps every log, and their number, within limits."""
        for name in self._processes:
            LogFile(self._store.log_path(name), self._settings.log_bytes).rotate()
        running = {f"{name}.log" for name in self._processes}
        folder = self._store.log_path(ROUTER_POD).parent
        old = [path for path in folder.glob("*.log*") if path.name not in running]
        for path in sorted(old, key=_modified)[:-_KEPT_LOGS]:
            path.unlink(missing_ok=True)

    async def _end(self, name: str, grace: float) -> None:
        process = self._processes[name]
        try:
            await process.stop(grace)
        finally:
            del self._processes[name]
            del self._ending[name]
            self._mishaps.forget(_record_of(name))
            with self._mishaps.around(f"removing the record of {name}"):
                self._store.remove_pod(name)
            self._on_update(Update(_kind(process.record.service), name, "stopped"))
            self._changed()

    def _write(self, name: str) -> None:
        if process := self._processes.get(name):
            with self._mishaps.around(_record_of(name)):
                self._store.write_pod(process.record)
        self._changed()

    def _tell(self, container: Container, message: str, level: Level) -> None:
        kind = _kind(container.service)
        self._on_update(Update(kind, container.name, message, level))


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # somebody tidied up meanwhile
        return 0.0


async def end_leftovers(store: Store, within: float) -> list[str]:
    """Ends processes of an earlier supervisor that was killed; returns the pods' names.

    They end by themselves within an instant (their lifeline is cut); this is for those that
    are stuck, and to be sure that their ports are free.
    """
    left = [
        record
        for record in store.pods()
        if record.pid is not None and kill_leftover(record.pid, record.process_started)
    ]
    deadline = asyncio.get_running_loop().time() + within
    while asyncio.get_running_loop().time() < deadline:
        if not any(_there(record) for record in left):
            break
        await asyncio.sleep(0.02)
    return [record.name for record in left]


def _record_of(pod: str) -> str:
    return f"writing the record of {pod}"


def _there(record: PodRecord) -> bool:
    return record.pid is not None and process_started(record.pid) == record.process_started


def _observed(record: PodRecord) -> ObservedPod:
    revision, born = revisions_of(record.revision, record.serves, record.restarts)
    return ObservedPod(
        name=record.name,
        revision=revision,
        replica=record.replica,
        created=record.created,
        address=record.address,
        ready=record.ready,
        drain_started=record.drain_started,
        deleting=record.phase == PodPhase.STOPPING,
        restarts=record.restarts,
        reason=record.reason,
        message=record.message,
        scheduled=record.created,
        launched=record.started,
        born=born,
    )


def _kind(service: str) -> Literal["pod", "router"]:
    return "pod" if service else "router"
