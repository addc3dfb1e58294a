"""A command that serves, as a process of its own that ends with its parent."""

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from shoal.api.names import ENV_LIFELINE

STOP_SECONDS = 60.0


class ServingProcess:
    """Runs while entered. In a session of its own, so a Ctrl-C at the terminal reaches only the
    parent, which then stops it in order; should the parent die, the lifeline ends it."""

    def __init__(
        self, command: Sequence[str], log: Path, stop_seconds: float = STOP_SECONDS
    ) -> None:
        self.log = log
        self._command = command
        self._stop_seconds = stop_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "ServingProcess":
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, ENV_LIFELINE: "stdin"},
                start_new_session=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return None if self._process is None else self._process.poll()

    def stop(self) -> int:
        """Ends it as Ctrl-C does, by force after `stop_seconds`. Returns its exit code."""
        assert self._process is not None, "stop belongs inside the with block"
        process = self._process
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(self._stop_seconds)
            except subprocess.TimeoutExpired:
                process.kill()  # its pods hold lifelines and end by themselves
        if process.stdin is not None:
            with suppress(BrokenPipeError):
                process.stdin.close()
        return process.wait()
