"""The local applier with real processes: fake workers, a fake router, the real supervisor."""

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import psutil
import pytest

from shoal.operator.local import files
from shoal.operator.local.pods import end_leftovers
from shoal.operator.local.records import PodRecord
from shoal.operator.local.settings import PortTaken
from shoal.operator.local.store import SupervisorRuns
from shoal.operator.local.supervisor import supervise
from tests.operator.local_machine import PATIENCE, alive


def workers(machine, service="chat"):
    return {record.name: record for record in machine.store.pods(service)}


def ready_workers(machine, service="chat"):
    return {name: r for name, r in workers(machine, service).items() if r.ready}


def test_serves_scales_and_removes(machine, local_service):
    """Apply, scale up and down, delete: each reaches its state, and nothing is left."""

    async def story():
        machine.store.apply(local_service())
        async with machine.running():
            await machine.until_condition("chat", "Ready")
            info = machine.store.supervisor()
            assert info is not None and info.pid == os.getpid()
            assert machine.store.status("chat")["url"] == f"{info.url}/v1"
            machine.store.scale("chat", 2)
            await machine.until_condition("chat", "Ready")
            assert len(ready_workers(machine)) == 2
            machine.store.scale("chat", 1)
            await machine.until(lambda: len(workers(machine)) == 1, "one worker")
            machine.store.delete("chat")
            await machine.until(lambda: not machine.store.known(), "all gone")
            assert not workers(machine)

    asyncio.run(story())


def test_a_rolling_update_never_leaves_nobody(machine, local_service):
    """A new revision takes over while at every look one replica takes requests."""

    async def story():
        machine.store.apply(local_service())
        async with machine.running():
            await machine.until_condition("chat", "Ready")
            (old,) = workers(machine)
            machine.store.apply(local_service(engine={"maxNumSeqs": 8}))

            def replaced():
                assert machine.store.status("chat")["routableReplicas"] >= 1
                return ready_workers(machine) and old not in workers(machine)

            await machine.until(replaced, "the new revision alone")
            condition = await machine.until_condition("chat", "Progressing")
            assert condition["reason"] in ("Complete", "RollingOut"), condition

    asyncio.run(story())


def test_a_broken_revision_is_held_off_and_said(machine, local_service):
    """It loops with back-off, its last words are in the record, the old one serves on."""

    async def story():
        machine.store.apply(local_service())
        async with machine.running():
            await machine.until_condition("chat", "Ready")
            (serving,) = workers(machine)
            machine.store.apply(local_service(model="broken"))
            condition = await machine.until_condition("chat", "Progressing", "False")
            assert "cannot serve: there is no such model" in condition["message"]
            failing = [r for n, r in workers(machine).items() if n != serving]
            assert [r.reason for r in failing] == ["CrashLoopBackOff"]
            assert failing[0].restarts >= 2
            assert workers(machine)[serving].ready
            assert (await machine.until_condition("chat", "Ready"))["reason"] == "Serving"
            machine.store.apply(local_service())
            await machine.until(lambda: list(workers(machine)) == [serving], "the old one alone")

    asyncio.run(story())


def test_a_killed_worker_comes_back(machine, local_service):
    """SIGKILL of a worker: the same pod runs again, and the restart is counted."""

    async def story():
        machine.store.apply(local_service())
        async with machine.running():
            await machine.until_condition("chat", "Ready")
            ((name, before),) = workers(machine).items()
            os.kill(before.pid, signal.SIGKILL)
            await machine.until(
                lambda: workers(machine)[name].restarts and workers(machine)[name].ready, "back"
            )
            assert workers(machine)[name].pid != before.pid
            assert any("killed by SIGKILL" in u.message for u in machine.updates)

    asyncio.run(story())


def test_a_killed_router_comes_back_on_its_ports(machine, local_service):
    """The router keeps its address over a restart, and workers are not touched."""

    async def story():
        machine.store.apply(local_service())
        async with machine.running():
            await machine.until_condition("chat", "Ready")
            before = {r.name: r for r in machine.store.pods()}
            os.kill(before["router"].pid, signal.SIGKILL)
            await machine.until(
                lambda: any(r.restarts and r.ready for r in machine.store.pods("")), "router back"
            )
            after = {r.name: r for r in machine.store.pods()}
            assert after["router"].ports == before["router"].ports
            await machine.until_condition("chat", "Ready")
            assert {n: r.pid for n, r in workers(machine).items()} == {
                n: r.pid for n, r in before.items() if n != "router"
            }

    asyncio.run(story())


def test_drain_waits_for_requests_up_to_its_deadline(machine, local_service):
    """A busy worker stays, marked, until its requests end or drainSeconds have passed."""

    async def story():
        machine.store.apply(local_service(replicas=2, rollout={"drainSeconds": 2}))
        async with machine.running():
            await machine.until_condition("chat", "Ready")
            for name in workers(machine):
                (machine.store.routes_dir / f"{name}.busy").touch()
            machine.store.scale("chat", 1)
            (name,) = await machine.until(
                lambda: [n for n, r in workers(machine).items() if r.drain_started], "a drain"
            )
            started = workers(machine)[name].drain_started
            await machine.until(lambda: name not in workers(machine), "the end of the drain")
            assert time.time() - started >= 2

    asyncio.run(story())


def test_services_do_not_disturb_each_other(machine, local_service):
    """One is refused, one wants a taken id, one file is broken: the first serves, each is told."""

    async def story():
        machine.store.apply(local_service())
        async with machine.running():
            await machine.until_condition("chat", "Ready")
            machine.store.apply(local_service("wide", engine={"quantization": "fp8"}))
            machine.store.apply(local_service("twin", model_id="chat"))
            refused = await machine.until_condition("wide", "Ready", "False")
            assert refused["message"] == "not supported yet: spec.engine.quantization=fp8"
            taken = await machine.until_condition("twin", "Ready", "False")
            assert "chat" in taken["message"] and taken["reason"] == "ModelIdTaken"
            (machine.store.root / "services" / "chat.yaml").write_text("kind: [")
            await machine.until(
                lambda: [u for u in machine.updates if "left as it was" in u.message], "the news"
            )
            assert list(workers(machine)) and not workers(machine, "wide")
            assert machine.store.status("chat")["routableReplicas"] == 1

    asyncio.run(story())


def test_one_supervisor_a_directory(machine):
    """A second one is told who is there, by pid."""

    async def story():
        async with machine.running():
            await machine.until(lambda: machine.store.supervisor(), "the first")
            with pytest.raises(SupervisorRuns, match=str(os.getpid())):
                await supervise(machine.store, machine.settings, on_update=print)
        assert machine.store.supervisor() is None

    asyncio.run(story())


def test_a_taken_port_is_named_with_its_flag(machine):
    """Nothing is started, and the message says what to do."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings = replace(machine.settings, http_port=port)
        with pytest.raises(PortTaken, match=rf"port {port} .* --port"):
            asyncio.run(supervise(machine.store, settings, on_update=print))
    assert machine.store.pods() == []


SUPERVISOR = """
import asyncio, os, sys
from pathlib import Path
from shoal.operator.local.supervisor import supervise
from tests.operator.local_machine import LocalMachine
machine = LocalMachine(Path(sys.argv[1]))
update = lambda u: print(u.kind, u.name, u.message, flush=True)
sys.exit(asyncio.run(supervise(machine.store, machine.settings, on_update=update)))
"""


def start_supervisor(tmp_path):
    return subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(tmp_path)],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


async def children_of(machine, count):
    """The pids of all pods and of what they started, once `count` pods run."""
    records = await machine.until(
        lambda: (
            (r := [r for r in machine.store.pods() if r.pid and r.ready]) and len(r) == count and r
        ),
        f"{count} pods",
    )
    pids = [r.pid for r in records]
    return pids + [c.pid for pid in pids for c in psutil.Process(pid).children(recursive=True)]


def test_sigkill_of_the_supervisor_leaves_no_process(machine, local_service, tmp_path):
    """Workers, the router and what they started end by themselves; the next run starts clean."""

    async def story():
        machine.store.apply(local_service(model="parent"))
        with start_supervisor(tmp_path) as first:
            pids = await children_of(machine, 2)
            assert len(pids) == 3, "router, worker, and the worker's child"
            first.kill()
            first.wait()
            await machine.until(lambda: not any(map(alive, pids)), "the end of all")
        assert machine.store.supervisor() is None
        async with machine.running():
            await machine.until_condition("chat", "Ready")

    asyncio.run(story())


def test_a_leftover_that_ignores_its_lifeline_is_ended(machine):
    """A stuck process is known by pid and start time and ended; a pid used again is not."""
    stuck = subprocess.Popen(["sleep", "600"], start_new_session=True)
    other = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        born = psutil.Process(stuck.pid).create_time()
        record = PodRecord(name="stuck", service="chat", role="leader", phase="Running")
        machine.store.write_pod(replace(record, pid=stuck.pid, process_started=born))
        machine.store.write_pod(
            replace(record, name="reused", pid=other.pid, process_started=born - 5)
        )
        assert asyncio.run(end_leftovers(machine.store, 5.0)) == ["stuck"]
        assert not alive(stuck.pid)
        assert alive(other.pid)
    finally:
        for process in (stuck, other):
            process.kill()
            process.wait()


def test_sigterm_ends_in_order_and_a_second_signal_at_once(machine, local_service, tmp_path):
    """The first signal waits for a stubborn worker; the second does not."""

    async def story():
        machine.store.apply(local_service(model="stubborn"))
        with start_supervisor(tmp_path) as process:
            pids = await children_of(machine, 2)
            process.terminate()
            await machine.until(
                lambda: all(r.phase == "Stopping" for r in machine.store.pods()), "stopping"
            )
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert await asyncio.to_thread(process.wait, PATIENCE) == 130
            assert not any(map(alive, pids))

    asyncio.run(story())


def test_a_full_disk_ends_nothing(machine, local_service, monkeypatch):
    """While no file can be written pods are still restarted; it is told once and caught up."""
    machine.settings = replace(machine.settings, house_seconds=0.1)
    write_text, full = files.write_text, []

    def write(path, text):
        if full and files.read_text(path) != text:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{path}-{time.monotonic()}")
        return write_text(path, text)

    monkeypatch.setattr(files, "write_text", write)

    async def story():
        machine.store.apply(local_service())
        async with machine.running():
            await machine.until_condition("chat", "Ready")
            ((name, before),) = workers(machine).items()
            full.append(True)
            os.kill(before.pid, signal.SIGKILL)
            ready = [u for u in machine.updates if "ready after" in u.message]
            await machine.until(
                lambda: sum("ready after" in u.message for u in machine.updates) > len(ready),
                "the next process of the pod",
            )
            assert workers(machine)[name].pid == before.pid, "nothing could be written"
            await asyncio.sleep(0.5)
            record = [u for u in machine.updates if f"record of {name}" in u.message]
            assert len(record) == 1 and "No space left" in record[0].message
            full.clear()
            await machine.until(
                lambda: (r := workers(machine)[name]).ready and r.restarts == 1, "the record"
            )
            machine.store.scale("chat", 2)
            await machine.until_condition("chat", "Ready")

    asyncio.run(story())


def test_what_runs_meanwhile_has_the_store_alone(machine, local_service):
    """It is entered by nobody who may not serve, and left when the run ends."""
    entered = []

    @contextmanager
    def meanwhile():
        entered.append(machine.store.supervisor())
        yield

    async def story():
        async with machine.running():
            await machine.until(lambda: machine.store.supervisor(), "the first")
            with pytest.raises(SupervisorRuns):
                await supervise(
                    machine.store, machine.settings, on_update=print, meanwhile=meanwhile()
                )
        assert entered == []

    asyncio.run(story())
