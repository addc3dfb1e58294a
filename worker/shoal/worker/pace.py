"""Work beside an engine that serves: in the gaps, and little of it at a time."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

SHARE = 0.08  # of one core, at most: a quarter made p95 of the time between tokens 1.7-fold
_LOWEST_PRIORITY = 19
_PIECE_SECONDS = 0.002  # shorter work does not ask for a pause of its own


class Abandoned(Exception):
    """Nobody wants the result any more."""


class Pace:
    """Called by a working thread after each piece: sleeps, so that the thread computes for no
    more than `share` of the time."""

    def __init__(
        self,
        stop: threading.Event,
        share: float = SHARE,
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        """`stop`: set by whoever abandons the work; `clock`: seconds that the calling thread has
        computed. Made and called in one thread."""
        self._stop = stop
        self._rest = (1.0 - share) / share  # seconds of sleep for a second of work
        self._clock = clock
        self._worked_until = clock()

    def __call__(self) -> None:
        """Raises Abandoned once the work is not wanted any more."""
        worked = self._clock() - self._worked_until
        if worked < _PIECE_SECONDS and not self._stop.is_set():
            return
        if self._stop.wait(worked * self._rest):
            raise Abandoned
        self._worked_until = self._clock()


@contextmanager
def stepped_back() -> Iterator[None]:
    """This thread has the lowest priority from now on, for as long as it lives, and torch's work
    in it no helpers: the engine's threads run first wherever they want to."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread, and of those that ask for the first time
    try:
        yield
    finally:
        torch.set_num_threads(threads)
