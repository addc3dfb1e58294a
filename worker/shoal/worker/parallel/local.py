"""Ranks as processes of this machine, without any cluster."""

import os
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

from shoal.api.names import ENV_LIFELINE

_STOP_SECONDS: Final = 1.0
_PROGRAM: Final = (sys.executable, "-m", "shoal.worker.parallel")


class LocalLauncher:
    """Implements `shoal.worker.parallel.driver.Launcher`. Ranks hold this process's lifeline: they
    end when it does, in whatever way."""

    host = "127.0.0.1"

    def __init__(
        self,
        world: int,
        log_format: str = "text",
        environ: Mapping[str, str] = os.environ,
        nodes: Sequence[str] | None = None,
    ) -> None:
        """`nodes`: addresses of this machine that the ranks take for several; none: they know
        that they can share memory."""
        self._world = world
        self._nodes = tuple(nodes or ["localhost"] * world)
        self._log_format = log_format
        self._environ = {**environ, ENV_LIFELINE: "stdin"}
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def pids(self) -> list[int]:
        """By rank."""
        return [process.pid for process in self._processes]

    def start(self, invitation: bytes) -> None:
        line = b64encode(invitation) + b"\n"
        for rank in range(self._world):
            process = subprocess.Popen(
                [*_PROGRAM, str(rank), self._nodes[rank], self._log_format],
                stdin=subprocess.PIPE,
                env=self._environ,
                start_new_session=True,  # a terminal's Ctrl-C is the driver's to answer
            )
            self._processes.append(process)
            assert process.stdin is not None
            # One that ended already shows in `failure`.
            with suppress(OSError):
                process.stdin.write(line)
                process.stdin.flush()

    def failure(self) -> str | None:
        for rank, process in enumerate(self._processes):
            if (code := process.poll()) is not None:
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                return f"rank {rank} on this machine ended with {how}"
        return None

    def stop(self) -> None:
        """Those that were told to end do so; the others end with their lifeline."""
        self._wait(_STOP_SECONDS)
        for process in self._processes:
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.close()
        self._wait(_STOP_SECONDS)
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
