"""One child process and everything that it starts.

The child leads a session of its own, so that Ctrl-C in the terminal reaches the supervisor
alone and one signal reaches all that the child started. Its standard input is the lifeline
(see `shoal.api.lifeline`): when the supervisor ends in whatever way, the child ends too.
"""

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress

import psutil

from shoal.api.names import ENV_LIFELINE
from shoal.operator.local.logfile import LogFile


class Child:
    """A started process. `exited` gets its exit status: negative for a signal."""

    def __init__(self, process: "subprocess.Popen[bytes]", lifeline: int) -> None:
        self._process = process
        self._lifeline = lifeline
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = self._loop.create_future()
        self.pid = process.pid
        self.started = process_started(process.pid)
        threading.Thread(target=self._wait, name=f"wait-{self.pid}", daemon=True).start()

    def terminate(self) -> None:
        """Asks the process to end in order; what it started is its own to end."""
        if not self.exited.done():
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Ends the process and all that it started, now."""
        if not self.exited.done():
            _kill_group(self.pid)

    def _wait(self) -> None:
        # Seen to have ended but not reaped, the process keeps its id: the group that is killed
        # is its own, with what it started and left behind.
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        _kill_group(self.pid)
        status = self._process.wait()
        with suppress(RuntimeError):  # the loop is closed: nobody asks any more
            self._loop.call_soon_threadsafe(self._ended, status)

    def _ended(self, status: int) -> None:
        os.close(self._lifeline)
        self.exited.set_result(status)


def start_child(argv: Sequence[str], environ: Mapping[str, str], log: LogFile) -> Child:
    """Starts a process that writes to `log`. Raises OSError where it cannot be started."""
    reader, lifeline = os.pipe()
    try:
        with log.open() as output:
            process = subprocess.Popen(
                list(argv),
                env={**environ, ENV_LIFELINE: "stdin"},
                stdin=reader,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except BaseException:
        os.close(lifeline)
        raise
    finally:
        os.close(reader)
    return Child(process, lifeline)


def process_started(pid: int) -> float | None:
    """When the kernel says that the process started; None where no such process runs.

    A pid with this time names a process for good; a pid alone may come to name another.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process.create_time()
    except psutil.Error:
        return None


def kill_leftover(pid: int, started: float | None) -> bool:
    """Ends the group of a process that an earlier supervisor left; whether it was still there."""
    there = process_started(pid)
    if there is None or started is None or abs(there - started) > 0.1:
        return False
    _kill_group(pid)
    return True


def describe_exit(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"ended with code {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = " (out of memory?)" if -status == signal.SIGKILL else ""
    return f"killed by {name}{hint}"


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
