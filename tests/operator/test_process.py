"""One pod's process: back-off, probes, logs, ports, and its end."""

import asyncio
import random
import socket
import sys
from contextlib import asynccontextmanager

import psutil
import pytest

from shoal.api.names import ENV_PORT
from shoal.operator.local.backoff import Backoff
from shoal.operator.local.container import Container, Probe
from shoal.operator.local.logfile import LogFile
from shoal.operator.local.ports import FIRST, LAST, NoFreePort, Ports, is_free, reachable
from shoal.operator.local.process import Machine, PodProcess
from tests.operator.local_machine import alive

FAST = Probe("", period=0.01, timeout=1.0, failures=3)
WAITS = "import os, sys; print('here', flush=True); sys.stdin.read()"


def test_backoff_doubles_up_to_a_bound():
    """At once, then 1, 2, 4 ... seconds, never more than the longest."""
    backoff = Backoff(initial=1, longest=10)
    assert [backoff.next_delay(0.1) for _ in range(7)] == [0, 1, 2, 4, 8, 10, 10]
    for _ in range(5000):
        assert backoff.next_delay(0) == 10


def test_a_long_run_makes_up_for_failures():
    """A process that ran long enough is started at once again."""
    backoff = Backoff(forget_after=60)
    for _ in range(5):
        backoff.next_delay(1)
    assert backoff.next_delay(60) == 0
    assert backoff.next_delay(59) == 1


class Doctor:
    """Health checks by script: what each service says, and how often it was asked."""

    def __init__(self, **says):
        self.says = {"": True, "live": True, **says}
        self.asked = 0

    @asynccontextmanager
    async def open(self, address):
        async def check(service, seconds):
            self.asked += 1
            return self.says[service]

        yield check


class Pod:
    """A PodProcess over a Python one-liner, with what it told."""

    def __init__(self, folder, code="", doctor=None, liveness=None, backoff=Backoff, argv=None):
        self.told = []
        self.log = LogFile(folder / "pod.log", 1000)
        container = Container(
            name="pod",
            role="leader",
            argv=argv or (sys.executable, "-c", code),
            environ={"PATH": "/usr/bin:/bin"},
            host="127.0.0.1",
            ports={"grpc": ENV_PORT},
            readiness=FAST,
            fixed_ports={},
            liveness=liveness,
            service="chat",
        )
        machine = Machine(
            Ports(random.Random(1)), health=(doctor or Doctor()).open, backoff=backoff
        )
        self.process = PodProcess(
            container,
            self.log,
            machine,
            changed=lambda: None,
            tell=lambda message, level: self.told.append(message),
        )

    @property
    def record(self):
        return self.process.record

    async def until(self, ready):
        for _ in range(3000):
            if ready():
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"never came: {self.record} {self.told}")


def test_ready_then_sick_then_well(tmp_path):
    """Readiness follows the health check, after as many failures as the probe allows."""

    async def story():
        doctor = Doctor()
        pod = Pod(tmp_path, WAITS, doctor)
        await pod.until(lambda: pod.record.ready)
        doctor.says[""] = False
        await pod.until(lambda: not pod.record.ready)
        assert pod.record.reason == "Unhealthy"
        doctor.says[""] = True
        await pod.until(lambda: pod.record.ready)
        assert pod.record.restarts == 0
        await pod.process.stop(1.0)

    asyncio.run(story())


def test_an_engine_that_does_not_move_is_killed(tmp_path):
    """Liveness counts once the pod has been ready; then the process is started again."""

    async def story():
        doctor = Doctor(live=False)
        doctor.says[""] = False
        pod = Pod(tmp_path, WAITS, doctor, liveness=Probe("live", 0.01, 1.0, 3))
        await pod.until(lambda: doctor.asked > 2)
        assert pod.record.restarts == 0, "not ready yet: loading may take long"
        doctor.says[""] = True
        await pod.until(lambda: pod.record.restarts >= 1)
        assert any("has not moved" in message for message in pod.told)
        await pod.process.stop(1.0)

    asyncio.run(story())


def test_a_command_that_is_not_there_is_a_crash_loop(tmp_path):
    """It is said what could not be started, and tried again with back-off."""

    async def story():
        pod = Pod(tmp_path, argv=("/nonexistent/python",), backoff=lambda: Backoff(initial=0.01))
        await pod.until(lambda: pod.record.restarts >= 2)
        assert pod.record.reason == "CrashLoopBackOff"
        assert "cannot be started" in pod.record.message and "/nonexistent" in pod.record.message
        await pod.process.stop(1.0)

    asyncio.run(story())


def test_restarts_wait_longer_each_time(tmp_path):
    """The waits are those of the back-off, and the last words of the process are kept."""

    async def story():
        asked = []

        class Watched(Backoff):
            def next_delay(self, ran):
                asked.append(ran)
                super().next_delay(ran)
                return 0.02 if len(asked) < 3 else 1000.0

        pod = Pod(tmp_path, "print('no such model'); raise SystemExit(4)", backoff=Watched)
        await pod.until(lambda: pod.record.restarts == 3)
        assert pod.record.reason == "CrashLoopBackOff"
        assert pod.record.message == "ended with code 4: no such model"
        assert pod.told[-1] == "ended with code 4: no such model; starts again in 1000 s"
        assert pod.log.path.read_text().count("no such model") == 3
        await asyncio.wait_for(pod.process.stop(1.0), 5)

    asyncio.run(story())


def test_stop_goes_from_asking_to_force(tmp_path):
    """SIGTERM first; a process that ignores it is killed after the grace, with its children."""
    code = (
        "import signal, subprocess, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "print(child.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )

    async def story():
        pod = Pod(tmp_path, code)
        await pod.until(lambda: pod.log.last_line())
        child = int(pod.log.last_line())
        assert alive(child)
        pid = pod.record.pid
        await pod.process.stop(0.2)
        assert not alive(pid)
        await pod.until(lambda: not alive(child))
        assert any("killed" in message for message in pod.told)

    asyncio.run(story())


def test_a_crash_takes_the_process_group_along(tmp_path):
    """What a worker started does not outlive it, whatever way it ends."""
    code = (
        "import os, subprocess\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "print(child.pid, flush=True)\n"
        "os._exit(1)\n"
    )

    async def story():
        pod = Pod(tmp_path, code)
        await pod.until(lambda: pod.record.restarts)
        child = int(pod.log.path.read_text().split()[0])
        await pod.until(lambda: not alive(child))
        await pod.process.stop(1.0)

    asyncio.run(story())


def test_children_hold_no_lifeline_of_others(tmp_path):
    """A pod's standard input ends with the supervisor's end alone: nobody else has it open."""

    async def story():
        pods = [Pod(tmp_path / str(n), WAITS) for n in range(3)]
        for pod in pods:
            await pod.until(lambda pod=pod: pod.log.last_line() == "here")
        pipes = [psutil.Process(pod.record.pid).num_fds() for pod in pods]
        assert len(set(pipes)) == 1, "a later child inherited what an earlier one has"
        for pod in pods:
            await pod.process.stop(1.0)

    asyncio.run(story())


def test_a_log_is_cut_while_a_process_writes(tmp_path):
    """The writer goes on at the start of the file, and the older part stands beside it."""
    log = LogFile(tmp_path / "pod.log", 100)
    with log.open() as writer:
        writer.write(b"x" * 101 + b"\n")
        assert log.rotate()
        writer.write(b"after\n")
    assert log.path.read_bytes() == b"after\n"
    assert log.older.read_bytes() == b"x" * 101 + b"\n"
    assert not log.rotate()


def test_the_last_line_is_the_processs_own(tmp_path):
    """Our notes and empty lines do not count; broken UTF-8 does not hurt."""
    log = LogFile(tmp_path / "pod.log", 100)
    assert log.last_line() == ""
    with log.open() as writer:
        writer.write(b"first\ncaf\xe9\n\n")
    log.note("ended with code 1")
    assert log.last_line() == "caf\ufffd"


def test_a_new_pod_sets_its_namesakes_log_aside(tmp_path):
    """What `shoal logs` shows is the present pod's."""
    log = LogFile(tmp_path / "pod.log", 100)
    log.note("old")
    log.begin()
    assert not log.path.exists()
    assert "old" in log.older.read_text()


def test_ports_are_free_and_given_once():
    """No port twice, none that somebody listens on; one that was given back may come again."""
    ports = Ports(random.Random(0))
    given = [ports.take() for _ in range(50)]
    assert len(set(given)) == 50
    assert all(FIRST <= port < LAST and is_free("127.0.0.1", port) for port in given)
    assert ports.take(given[0]) != given[0]
    ports.give_back([given[0]])
    assert ports.take(given[0]) == given[0]
    with socket.create_server(("127.0.0.1", given[1])):
        assert not is_free("127.0.0.1", given[1])
        ports.give_back([given[1]])
        assert ports.take(given[1]) != given[1]


def test_no_free_port_is_said(monkeypatch):
    """A machine without a free port gets a sentence, not an endless search."""
    monkeypatch.setattr("shoal.operator.local.ports.is_free", lambda host, port: False)
    with pytest.raises(NoFreePort, match="no free TCP port"):
        Ports(random.Random(0)).take()


@pytest.mark.parametrize(
    "host, expected",
    [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("10.0.0.1", "10.0.0.1")],
)
def test_reachable(host, expected):
    """A server that listens everywhere is reached on the loopback address."""
    assert reachable(host) == expected
