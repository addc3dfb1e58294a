"""One pod as a process: started, probed, started again when it ends, and stopped in order.

    start -> (readiness, then liveness) -> ended -> back-off -> start ... -> stop

What happens is told by a callback; `record` says where things stand. All of it runs in one
event loop and is used by one owner, `shoal.operator.local.pods`.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from shoal.operator.local.backoff import Backoff
from shoal.operator.local.child import Child, describe_exit, start_child
from shoal.operator.local.container import Container, Probe
from shoal.operator.local.health import Check, OpenHealth, open_health
from shoal.operator.local.logfile import LogFile
from shoal.operator.local.ports import Ports, reachable
from shoal.operator.local.records import PodPhase, PodRecord
from shoal.operator.local.settings import Level
from shoal.operator.status import CRASH_LOOP

STARTING: Final = "Starting"
RESTARTED: Final = "Restarted"
UNHEALTHY: Final = "Unhealthy"
_STARTUP_PERIOD: Final = 0.2  # seconds between probes of a pod that is not ready
_KILL_SECONDS: Final = 5.0  # for a killed process to be reaped

# What happened to the pod, for people.
Tell = Callable[[str, Level], None]


@dataclass(frozen=True, slots=True)
class Machine:
    """What processes need of their surroundings."""

    ports: Ports
    health: OpenHealth = open_health
    clock: Callable[[], float] = time.time
    backoff: Callable[[], Backoff] = Backoff


class PodProcess:
    """Keeps one container running until `stop`."""

    def __init__(
        self,
        container: Container,
        log: LogFile,
        machine: Machine,
        *,
        changed: Callable[[], None],
        tell: Tell,
    ) -> None:
        self._container = container
        self._log = log
        self._machine = machine
        self._changed = changed
        self._tell = tell
        self._backoff = machine.backoff()
        self._child: Child | None = None
        self._ports: dict[str, int] = {}
        self._stopping = asyncio.Event()
        self.record = PodRecord(
            name=container.name,
            service=container.service,
            role=container.role,
            phase=PodPhase.WAITING,
            revision=container.revision,
            replica=container.replica,
            reason=STARTING,
            created=machine.clock(),
        )
        log.begin()
        self._task = asyncio.create_task(self._run(), name=f"pod {container.name}")

    def mark_draining(self, draining: bool) -> None:
        """Sets or clears the time from which the drain counts."""
        self._set(drain_started=self._machine.clock() if draining else None)

    def mark_served(self, mark: str) -> None:
        """Keeps the mark of a swap of the process' weights."""
        self._set(serves=mark)

    async def stop(self, grace: float) -> None:
        """Ends the process, by force after `grace` seconds; returns once it is gone."""
        self._stopping.set()
        self._set(phase=PodPhase.STOPPING, ready=False)
        if (child := self._child) is not None:
            child.terminate()
            if not await _within(child.exited, grace):
                self._tell(f"did not end within {grace:g} s, killed", "warning")
                child.kill()
                await _within(child.exited, _KILL_SECONDS)
        await asyncio.wait({self._task})
        self._machine.ports.give_back(self._ports.values())

    def kill(self) -> None:
        """Ends the process now, and for good."""
        self._stopping.set()
        if self._child is not None:
            self._child.kill()

    async def _run(self) -> None:
        while not self._stopping.is_set():
            started = self._machine.clock()
            said = ""
            try:
                child = self._start()
            except OSError as error:
                ended = f"cannot be started: {error}"
            else:
                status = await self._watch(child, self._started(child))
                ended = describe_exit(status)
                # Only a process that gave up by itself had a last word on why.
                said = self._log.last_line() if status > 0 else ""
            if self._stopping.is_set():
                return
            await self._wait_to_restart(ended, said, self._machine.clock() - started)

    def _start(self) -> Child:
        """Raises OSError where there is no port, or no such program."""
        container, machine = self._container, self._machine
        machine.ports.give_back(self._ports.values())
        self._ports = {
            name: container.fixed_ports.get(name) or machine.ports.take(self._ports.get(name))
            for name in container.ports
        }
        said = {variable: str(self._ports[name]) for name, variable in container.ports.items()}
        self._child = start_child(container.argv, {**container.environ, **said}, self._log)
        return self._child

    def _started(self, child: Child) -> str:
        """Tells of a process that runs; returns the address where it will listen."""
        again = self.record.restarts > 0
        address = f"{reachable(self._container.host)}:{self._ports['grpc']}"
        self._tell(f"started{' again' if again else ''} as process {child.pid}", "info")
        self._set(
            phase=PodPhase.RUNNING,
            pid=child.pid,
            process_started=child.started,
            started=self._machine.clock(),
            ports=dict(self._ports),
            address=address,
        )
        return address

    async def _watch(self, child: Child, address: str) -> int:
        """Probes until the process ends; returns its exit status."""
        probing = asyncio.create_task(self._probe(child, address))
        try:
            status = await asyncio.shield(child.exited)
        finally:
            probing.cancel()
            with suppress(asyncio.CancelledError):
                await probing
        self._child = None
        self._set(ready=False, pid=None, process_started=None, started=None)
        return status

    async def _probe(self, child: Child, address: str) -> None:
        container = self._container
        async with self._machine.health(address) as check:
            await _until(check, container.readiness)
            self._become_ready()
            live = asyncio.create_task(self._watch_liveness(child, check))
            try:
                await self._watch_readiness(check, container.readiness)
            finally:
                live.cancel()

    async def _watch_readiness(self, check: Check, probe: Probe) -> None:
        failures = 0
        while True:
            await asyncio.sleep(probe.period)
            good = await check(probe.service, probe.timeout)
            failures = 0 if good else failures + 1
            if good and not self.record.ready:
                self._become_ready()
            elif failures == probe.failures and self.record.ready:
                self._tell("no longer ready: its health check fails", "warning")
                self._set(ready=False, reason=UNHEALTHY, message="its health check fails")

    async def _watch_liveness(self, child: Child, check: Check) -> None:
        probe = self._container.liveness
        if probe is None:
            return
        failures = 0
        while failures < probe.failures:
            await asyncio.sleep(probe.period)
            failures = 0 if await check(probe.service, probe.timeout) else failures + 1
        waited = probe.failures * probe.period
        self._tell(f"killed: its engine has not moved for {waited:g} s", "error")
        self._log.note(f"killed: not live for {waited:g} s")
        child.kill()

    async def _wait_to_restart(self, ended: str, said: str, ran: float) -> None:
        delay = self._backoff.next_delay(ran)
        soon = f"starts again in {delay:g} s" if delay else "starts again"
        message = f"{ended}: {said}" if said else ended
        self._tell(f"{message}; {soon}", "error")
        self._log.note(f"{ended}; {soon}")
        self._set(
            phase=PodPhase.WAITING,
            reason=CRASH_LOOP if self._backoff.failures > 1 else RESTARTED,
            message=message,
            restarts=self.record.restarts + 1,
        )
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), delay or 0.01)

    def _become_ready(self) -> None:
        since = self.record.started or self._machine.clock()
        self._tell(f"ready after {self._machine.clock() - since:.1f} s", "info")
        self._set(ready=True, reason="", message="")

    def _set(self, **changes: object) -> None:
        self.record = replace(self.record, **changes)  # type: ignore[arg-type]  # fields of it
        self._changed()


async def _until(check: Check, probe: Probe) -> None:
    """Returns once the probe says yes. Start-up has no deadline: loading takes what it takes."""
    while True:
        if await check(probe.service, probe.timeout):
            return
        await asyncio.sleep(_STARTUP_PERIOD)


async def _within(exited: "asyncio.Future[int]", seconds: float) -> bool:
    done, _ = await asyncio.wait({exited}, timeout=seconds)
    return bool(done)
