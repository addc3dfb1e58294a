"""How long a launch takes on a device, its caches cold."""

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

Launch = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of single launches."""

    median: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Times":
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


class Clock(Protocol):
    """Times launches on one device."""

    @property
    def device(self) -> torch.device: ...

    def measure(self, launch: Launch, seconds: float = 0.05) -> Times:
        """Launches again and again for about so long, after one launch that compiles."""
        ...


class CudaClock:
    """Implements `Clock` with events on the current stream.

    Between launches it reads a buffer twice as large as the second-level cache, so that a
    launch finds nothing of the one before; the device is busy with that while the host prepares
    the launch, so that the host's own time is not measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.zeros(max(2 * cache, 64 << 20) // 4, device=device)
        self._most = torch.zeros((), device=device)

    def measure(self, launch: Launch, seconds: float = 0.05) -> Times:
        launch()
        torch.cuda.synchronize(self.device)
        found: list[float] = []
        begun = time.perf_counter()
        while not found or time.perf_counter() - begun < seconds:
            found += self._some(launch, 5)
        return Times.of(found)

    def _some(self, launch: Launch, count: int) -> list[float]:
        events = [(_event(), _event()) for _ in range(count)]
        for before, after in events:
            torch.amax(self._buffer, dim=0, out=self._most)
            before.record()
            launch()
            after.record()
        torch.cuda.synchronize(self.device)
        return [before.elapsed_time(after) / 1e3 for before, after in events]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's own


class HostClock:
    """Implements `Clock` where the device is the CPU: each launch by the wall, once."""

    device = torch.device("cpu")

    def measure(self, launch: Launch, seconds: float = 0.05) -> Times:
        begun = time.perf_counter()
        launch()
        return Times.of([time.perf_counter() - begun])


def clock_of(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else HostClock()


def software() -> str:
    """Versions of all that decides how fast a kernel is, for tables of results."""
    import triton

    parts = [f"torch {torch.__version__}", f"triton {triton.__version__}"]
    if torch.version.cuda is not None:
        parts.append(f"CUDA {torch.version.cuda}")
    if torch.cuda.is_available() and torch.version.hip is None:
        parts.insert(0, f"driver {_driver()}")
    return ", ".join(parts)


def _driver() -> str:
    """The kernel driver's version, as it says itself."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    found = re.search(r"Kernel Module[^0-9\n]*([0-9.]+)", text)
    return "unknown" if found is None else found[1]
