"""Commands of the host, with their errors as sentences."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar

from e2e.cluster.layout import ClusterError

T = TypeVar("T")
Say = Callable[[str], None]

# Debian keeps ip, nft and runc where only root's login shell looks.
PATH: Final = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
ENVIRON: Final[Mapping[str, str]] = {**os.environ, "PATH": PATH}


def run(
    *argv: str | Path,
    stdin: str | None = None,
    seconds: float = 60,
    cwd: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> str:
    """Standard output of a command that must succeed. Raises ClusterError."""
    command = [str(one) for one in argv]
    try:
        done = subprocess.run(
            command,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=seconds,
            cwd=cwd,
            env={**ENVIRON, **(environ or {})},
        )
    except FileNotFoundError as error:
        raise ClusterError(f"{command[0]}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"not within {seconds:g} s: {' '.join(command)[:300]}") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise ClusterError(f"{' '.join(command)[:300]}: exit status {done.returncode}\n{said}")
    return done.stdout


def attempt(*argv: str | Path, seconds: float = 60) -> bool:
    """Whether a command that may fail succeeded."""
    try:
        run(*argv, seconds=seconds)
    except ClusterError:
        return False
    return True


def wait_for(what: str, seconds: float, check: Callable[[], T], every: float = 0.1) -> T:
    """The first truthy result. Raises ClusterError after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        if result := check():
            return result
        if time.monotonic() > end:
            raise ClusterError(f"gave up after {seconds:g} s waiting for {what}")
        time.sleep(every)


def attached(*argv: str | Path) -> list[str]:
    """The command line of a process that must not outlive the thread that starts it: the kernel
    kills it then (where it can: Linux)."""
    ends = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv", path=PATH) else ()
    return [*ends, *(str(one) for one in argv)]


def stopwatch(write: Callable[[str], None] = print) -> Say:
    """Prints each line with the seconds since now."""
    started = time.monotonic()

    def say(line: str) -> None:
        write(f"{time.monotonic() - started:6.1f} s  {line}")

    return say
