"""A process that must not outlive its supervisor.

The supervisor holds the write end of a pipe that is the child's standard input. Whatever way
the supervisor ends, SIGKILL included, the kernel closes that end and the child sees the end of
its input. This works on every Unix and needs no polling. A child that leads a process group,
as those of a supervisor do, takes the group with it: what it started has no lifeline.
"""

import os
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress

from shoal.api.names import ENV_LIFELINE


def watch_lifeline(environ: Mapping[str, str] = os.environ) -> None:
    """End this process at once when standard input ends, if the environment asks for it."""
    if environ.get(ENV_LIFELINE) != "stdin":
        return

    def wait() -> None:
        while os.read(0, 4096):
            pass
        with suppress(OSError, ValueError):  # standard error may be gone with the supervisor
            print("the supervisor is gone, ending", file=sys.stderr, flush=True)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(3)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
