"""Host processes of the cluster: each has a log and a record, and outlives whoever started it."""

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import psutil

from e2e.cluster.command import ENVIRON
from e2e.cluster.layout import ClusterError, Layout

STOP_SECONDS: Final = 10.0
CLOCK_TOLERANCE: Final = 1.0  # seconds by which psutil's start times may differ


@dataclass(frozen=True, slots=True)
class Record:
    """A started process. The start time tells it from a later one of the same id."""

    pid: int
    started: float  # Unix seconds
    argv: tuple[str, ...]
    environ: Mapping[str, str]


def identify(pid: int) -> float | None:
    """When the process started; None where it is gone, or dead and not yet reaped."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process.create_time()
    except psutil.NoSuchProcess:
        return None


def same(pid: int, started: float) -> bool:
    now = identify(pid)
    return now is not None and abs(now - started) < CLOCK_TOLERANCE


class Processes:
    """Starts and stops by name."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def names(self) -> list[str]:
        return sorted(path.stem for path in self._layout.records.glob("*.json"))

    def start(self, name: str, *argv: str | Path, environ: Mapping[str, str] | None = None) -> None:
        """Raises ClusterError where it cannot be started."""
        self._start(name, tuple(str(one) for one in argv), environ or {})

    def restart(self, name: str) -> None:
        """Starts a stopped process again, with the command line it had. Raises ClusterError."""
        record = self._read(name)
        if record is None:
            raise ClusterError(f"{name} was never started")
        if not same(record.pid, record.started):
            self._start(name, record.argv, record.environ)

    def alive(self, name: str) -> bool:
        record = self._read(name)
        return record is not None and same(record.pid, record.started)

    def pid(self, name: str) -> int:
        record = self._read(name)
        assert record is not None, name
        return record.pid

    def stop(self, names: Sequence[str], number: int = signal.SIGTERM) -> None:
        """Signals all, waits, and kills who does not end; the records stay."""
        records = [record for name in names if (record := self._read(name))]
        alive = [psutil.Process(one.pid) for one in records if same(one.pid, one.started)]
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        for process in _wait(alive):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _wait(alive)

    def forget(self, names: Sequence[str]) -> None:
        for name in names:
            self._path(name).unlink(missing_ok=True)

    def log(self, name: str) -> Path:
        return self._layout.logs / f"{name}.log"

    def _start(self, name: str, argv: tuple[str, ...], environ: Mapping[str, str]) -> None:
        self._layout.logs.mkdir(parents=True, exist_ok=True)
        self._layout.records.mkdir(parents=True, exist_ok=True)
        try:
            with self.log(name).open("ab") as log:
                process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**ENVIRON, **environ},
                    start_new_session=True,  # Ctrl-C is the harness's to handle
                )
        except OSError as error:
            raise ClusterError(f"{name} does not start: {argv[0]}: {error.strerror}") from error
        record = Record(process.pid, identify(process.pid) or 0.0, argv, environ)
        self._path(name).write_text(json.dumps(asdict(record)))

    def _read(self, name: str) -> Record | None:
        try:
            found = json.loads(self._path(name).read_text())
        except FileNotFoundError:
            return None
        return Record(found["pid"], found["started"], tuple(found["argv"]), found["environ"])

    def _path(self, name: str) -> Path:
        return self._layout.records / f"{name}.json"


def _wait(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Who is still there. A zombie is down, whoever is to reap it."""
    end = time.monotonic() + STOP_SECONDS
    left = list(processes)
    while left and time.monotonic() < end:
        left = [one for one in left if identify(one.pid) is not None]
        time.sleep(0.05)
    return left
