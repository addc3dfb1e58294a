"""The seam to a device: its clock of work (streams, events, graphs) and its memory.

Work is queued in order on one stream; a host that wants to know of it waits for an event, and for
nothing else. Tensors are torch's, and copies between host and device are `copy_` without waiting:
what this seam adds is what tells a GPU from the interpreter of a kernel's tests, and what a test
wants to count.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Run = Callable[[], object]


class Event(Protocol):
    """A place in the device's queue."""

    def wait(self) -> None:
        """Returns once the device has come past it. The one way in which a step waits."""
        ...


class Graph(Protocol):
    """Recorded work, over the tensors that it was recorded with."""

    def replay(self) -> None:
        """Queues it again."""
        ...


class Device(Protocol):
    """Used by one thread."""

    @property
    def home(self) -> torch.device:
        """Where its tensors lie."""
        ...

    @property
    def name(self) -> str:
        """The product's, for logs and tables of tuned configurations."""
        ...

    def pinned(self, size: int, dtype: torch.dtype) -> Tensor:
        """[size] in host memory that the device can read by itself."""
        ...

    def upload(self, values: npt.NDArray[np.int64] | npt.NDArray[np.float32]) -> Tensor:
        """A copy on the device, queued. `values` may be changed at once."""
        ...

    def download(self, values: Tensor) -> Tensor:
        """A copy in host memory, queued: to be read behind an event."""
        ...

    def record(self) -> Event:
        """Behind all that is queued."""
        ...

    def capture(self, run: Run) -> Graph:
        """Runs `run` once, and records what it queues. Whatever changes from one replay to the
        next must come from tensors. Waits for the device."""
        ...

    def settle(self) -> None:
        """Waits for all that is queued. Not for steps."""
        ...

    def free_memory(self) -> int:
        """Bytes that can still be allocated."""
        ...

    def appetite(self, run: Run) -> int:
        """Bytes that `run` has beyond what is allocated already, at its peak. Runs it."""
        ...


class CudaDevice:
    """A CUDA device (or a ROCm one, which torch names the same; that was never tried)."""

    def __init__(self, index: int = 0) -> None:
        """Raises RuntimeError where torch cannot use the device."""
        self.home = torch.device("cuda", index)
        torch.cuda.set_device(self.home)
        self.name = torch.cuda.get_device_name(self.home)
        # Graphs never run at the same time, so that they share what they work in.
        self._pool = torch.cuda.graph_pool_handle()

    def pinned(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=True)

    def upload(self, values: npt.NDArray[np.int64] | npt.NDArray[np.float32]) -> Tensor:
        # The allocator of pinned memory does not hand a block out again before copies of it
        # that are queued are over.
        return torch.from_numpy(values).pin_memory().to(self.home, non_blocking=True)

    def download(self, values: Tensor) -> Tensor:
        out = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return out.copy_(values, non_blocking=True)

    def record(self) -> "CudaEvent":
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
        event.record()
        return CudaEvent(event)

    def capture(self, run: Run) -> Graph:
        # The first run compiles what has to be, and lets libraries allocate: neither may happen
        # while work is recorded.
        run()
        torch.cuda.synchronize(self.home)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        return graph

    def settle(self) -> None:
        torch.cuda.synchronize(self.home)

    def free_memory(self) -> int:
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.home)[0])

    def appetite(self, run: Run) -> int:
        torch.cuda.synchronize(self.home)
        torch.cuda.reset_peak_memory_stats(self.home)
        before = torch.cuda.memory_allocated(self.home)
        run()
        torch.cuda.synchronize(self.home)
        return int(torch.cuda.max_memory_allocated(self.home)) - before


class CudaEvent:
    """Implements `Event`."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


class HostDevice:
    """The CPU in the role of a device, for kernels in Triton's interpreter: all work is over when
    it is queued, and a graph is the function that was recorded.

    Counts what a test asks about. No size of a step is measured here: the interpreter would take
    minutes for the largest one.
    """

    def __init__(self, free_memory: int) -> None:
        """`free_memory`: what the KV cache may be planned with, in bytes."""
        self.home = torch.device("cpu")
        self.name = "interpreter"
        self.waits = 0  # of the host, for an event or for everything
        self.captures = 0
        self.replays = 0
        self._free = free_memory

    def pinned(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype)

    def upload(self, values: npt.NDArray[np.int64] | npt.NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(values.copy())

    def download(self, values: Tensor) -> Tensor:
        return values.clone()

    def record(self) -> "HostEvent":
        return HostEvent(self)

    def capture(self, run: Run) -> "HostGraph":
        self.captures += 1
        run()
        return HostGraph(self, run)

    def settle(self) -> None:
        self.waits += 1

    def free_memory(self) -> int:
        return self._free

    def appetite(self, run: Run) -> int:
        return 0


class HostEvent:
    """Implements `Event`."""

    def __init__(self, device: HostDevice) -> None:
        self._device = device

    def wait(self) -> None:
        self._device.waits += 1


class HostGraph:
    """Implements `Graph`."""

    def __init__(self, device: HostDevice, run: Run) -> None:
        self._device = device
        self._run = run

    def replay(self) -> None:
        self._device.replays += 1
        self._run()
