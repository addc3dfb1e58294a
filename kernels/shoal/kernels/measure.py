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
    """Implements `Clock` with events around a replay of the launch's graph.

    A graph, as decode steps use them: the time is the device's, not that of the host that
    prepares one kernel after the other. Between replays it reads a buffer twice as large as the
    second-level cache, so that a launch finds nothing of the one before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.zeros(max(2 * cache, 64 << 20) // 4, device=device)
        self._most = torch.zeros((), device=device)

    def measure(self, launch: Launch, seconds: float = 0.05) -> Times:
        """Raises RuntimeError for a launch that waits for the device: it cannot be recorded."""
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch's own
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2):
                launch()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        found: list[float] = []
        begun = time.perf_counter()
        while not found or time.perf_counter() - begun < seconds:
            found += self._some(graph, 5)
        return Times.of(found)

    def _some(self, graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
        events = [(_event(), _event()) for _ in range(count)]
        for before, after in events:
            torch.amax(self._buffer, dim=0, out=self._most)
            before.record()
            graph.replay()
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
