"""A machine for tests of the local applier: fake workers, a fake router, short intervals."""

import asyncio
import os
import stat
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import psutil

from shoal.api.types import InferenceService, parse_document
from shoal.operator.local.settings import SupervisorSettings, Update
from shoal.operator.local.store import Store
from shoal.operator.local.supervisor import supervise

FAKES = Path(__file__).parent / "fakes"
PATIENCE = 60.0  # seconds; only a failing test waits so long


def service_of(
    name: str = "chat", model: str = "good", *, model_id: str | None = None, **spec: object
) -> InferenceService:
    """A service whose worker is the fake that `model` names."""
    return parse_document(
        {
            "apiVersion": "serving.shoal.dev/v1alpha1",
            "kind": "InferenceService",
            "metadata": {"name": name},
            "spec": {
                "model": {"uri": f"py://{model}", "name": model_id or name},
                "rollout": {"drainSeconds": 30},
                **spec,
            },
        }
    )


class LocalMachine:
    """A state directory and the settings that run fakes in the place of worker and router."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "state")
        self.sickness = folder / "sick"
        # The interpreter of pods: whatever module it is asked for, it runs the fake worker.
        python = folder / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKES / "worker.py"} "$@"\n')
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        self.settings = SupervisorSettings(
            http_port=0,
            grpc_port=0,
            poll_seconds=0.05,
            load_seconds=0.1,
            stop_seconds=5.0,
            python=str(python),
            router_command=(sys.executable, str(FAKES / "router.py")),
            environ={**os.environ, "FAKE_SICKNESS": str(self.sickness)},
        )
        self.updates: list[Update] = []

    @asynccontextmanager
    async def running(self):
        """A supervisor in this loop; afterwards it has ended in order and left nothing."""
        stop = asyncio.Event()
        task = asyncio.create_task(
            supervise(self.store, self.settings, on_update=self.updates.append, stop=stop)
        )
        seen: set[int] = set()
        watching = asyncio.create_task(self._collect_pids(seen))
        try:
            yield task
        finally:
            stop.set()
            code = await asyncio.wait_for(task, PATIENCE)
            watching.cancel()
        assert code == 0
        assert not [pid for pid in seen if alive(pid)], "a process was left"
        assert self.store.pods() == []

    async def until(self, ready, what: str):
        """Waits until `ready()` is true, and returns what it returned."""
        deadline = time.monotonic() + PATIENCE
        while not (found := ready()):
            assert time.monotonic() < deadline, f"never came: {what}\n{self.told()}"
            await asyncio.sleep(0.02)
        return found

    async def until_condition(self, name: str, kind: str, status: str = "True"):
        return await self.until(
            lambda: self._condition(name, kind, status), f"{name} {kind}={status}"
        )

    def _condition(self, name, kind, status):
        service, observed = self.store.get(name), self.store.status(name)
        if service is None or observed is None:
            return None
        if observed["observedGeneration"] != service.metadata.generation:
            return None
        return next(
            (c for c in observed["conditions"] if (c["type"], c["status"]) == (kind, status)), None
        )

    def told(self) -> str:
        return "\n".join(f"{u.level} {u.kind} {u.name}: {u.message}" for u in self.updates)

    async def _collect_pids(self, seen: set[int]) -> None:
        while True:
            seen.update(record.pid for record in self.store.pods() if record.pid is not None)
            await asyncio.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether the process runs; one that is dead and not yet buried does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
