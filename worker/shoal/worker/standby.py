"""Other weights beside those in use: loaded, checked, kept and let go.

    examine -> make_room -> read -> load -> probe ...         verify -> probe         (the way back)

`read`, `load` and `verify` work in a thread that the caller made for it, beside the engine's;
`probe` and `discard` come between two steps, in the engine's.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from shoal.kernels.flat import FlatBatch
from shoal.worker.host import available_memory, resident_memory
from shoal.worker.memory import MemoryPlan
from shoal.worker.model.backend import Backend
from shoal.worker.model.fingerprint import fingerprint
from shoal.worker.model.loader import open_checkpoint
from shoal.worker.model.paced import BrokenWeights, PacedSource, sha256_of
from shoal.worker.model.reader import Checkpoint
from shoal.worker.model.spec import DecoderSpec
from shoal.worker.model.weight_map import expected_shapes
from shoal.worker.model.weights import WeightError
from shoal.worker.pace import SHARE, Abandoned, Pace, stepped_back
from shoal.worker.swap import SwapError, abandoned

log = logging.getLogger(__name__)

_PROBE_STEP = 31  # between the ids of the known prompt: coprime to most vocabularies
_MIB = 1 << 20


class Host(Protocol):
    """The executor whose weights they are."""

    block_size: int

    def backend(self, number: int) -> Backend: ...

    def adopt(self, number: int, backend: Backend) -> None: ...

    def drop(self, number: int) -> None: ...


@dataclass(slots=True)
class _Set:
    """What is known of weights in memory."""

    path: Path
    sha256: str = ""  # "": not known
    checksums: dict[str, int] = field(default_factory=dict)  # CRC-32 by tensor
    answer: torch.Tensor | None = None  # the known prompt's logits, [1, vocab]


class Standby:
    """Knows every set of weights of an executor, and makes and frees all but the first."""

    def __init__(
        self,
        host: Host,
        path: Path,
        memory: MemoryPlan,
        limit: int | None,
        available: Callable[[], int] = available_memory,
        resident: Callable[[], int] = resident_memory,
    ) -> None:
        """`path`: of the weights in use, set 0; `limit`: bytes that this process may have."""
        self._host = host
        self._memory = memory
        self._limit = limit
        self._available = available
        self._resident = resident
        self._sets = {0: _Set(path)}

    def examine(self, path: Path) -> None:
        """FAILED_PRECONDITION for weights that cannot take the place of those in use. Reads
        tables, no weights."""
        with _statuses():
            difference = _difference(self._some.spec, open_checkpoint(path))
            if difference is not None:
                raise WeightError(f"{path}: {difference}; weights are swapped within a model only")

    @property
    def numbers(self) -> frozenset[int]:
        """Of the sets in memory."""
        return frozenset(self._sets)

    def make_room(self, freed: int) -> None:
        """RESOURCE_EXHAUSTED where another set does not fit. `freed`: so many of those that are
        there are discarded before."""
        memory = self._memory
        planned = memory.total + (len(self._sets) - 1) * memory.weights
        if self._limit is not None:
            room = self._limit - planned
            source = f"resources.memory is {self._limit // _MIB} MiB"
        else:
            available = self._available()
            # What the plan has not touched yet, most of all KV blocks, is not there to be had.
            room = available - max(0, planned - self._resident())
            source = f"{available // _MIB} MiB are available"
        room += freed * memory.weights
        if room < memory.weights:
            raise SwapError(
                "RESOURCE_EXHAUSTED",
                f"a second set of weights needs {memory.weights // _MIB} MiB, but {source} and "
                f"what is planned takes {planned // _MIB} MiB ({memory.kv_cache // _MIB} of it the "
                f"KV cache), which leaves {max(0, room) // _MIB} MiB: lower "
                "engine.kvCacheMemoryFraction or raise resources.memory",
            )

    def read(self, path: Path, sha256: str, stop: threading.Event) -> str:
        """The SHA-256 of the weights of `path`. DATA_LOSS where it is not `sha256`, if given;
        CANCELLED once `stop` is set."""
        with _statuses(), stepped_back():
            found = sha256_of(path, Pace(stop))
            if sha256 and sha256 != found:
                raise BrokenWeights(f"{path}: its SHA-256 is {found}, expected {sha256}")
        return found

    def load(
        self,
        number: int,
        path: Path,
        sha256: str,
        stop: threading.Event,
        progress: Callable[[float], None],
    ) -> None:
        """Reads and packs the weights of `path`, of that SHA-256, as set `number`.

        DATA_LOSS where a tensor holds values that are not finite; FAILED_PRECONDITION for weights
        that cannot be used; CANCELLED once `stop` is set.
        """
        with _statuses(), stepped_back(), torch.inference_mode():
            pace = Pace(stop)
            checkpoint = open_checkpoint(path)
            source = PacedSource(checkpoint.source, pace, progress)
            backend = self._some.sibling(replace(checkpoint, source=source))
            checksums = fingerprint(backend.weights(), pace)
        self._sets[number] = _Set(path, sha256, checksums)
        self._host.adopt(number, backend)

    def verify(self, number: int, stop: threading.Event, *, hurry: bool) -> str:
        """DATA_LOSS if a tensor of the set is not what was loaded; returns the weights' SHA-256,
        or "" where the file is gone. The first call for set 0 takes note of it. With `hurry` the
        work takes all the time that nobody else wants."""
        known = self._sets[number]
        with _statuses(), stepped_back(), torch.inference_mode():
            pace = Pace(stop, 1.0 if hurry else SHARE)
            if not known.sha256:
                with suppress(OSError):
                    known.sha256 = sha256_of(known.path, pace)
            checksums = fingerprint(self._host.backend(number).weights(), pace)
            for name, expected in known.checksums.items():
                if (found := checksums[name]) != expected:
                    raise BrokenWeights(
                        f"{known.path}: tensor {name} has the checksum {found:08x} in memory, "
                        f"expected {expected:08x}"
                    )
        known.checksums = checksums
        return known.sha256

    def probe(self, number: int) -> None:
        """Runs the known prompt. DATA_LOSS if its logits are not finite, not what they were, or
        not those of another set of the same files."""
        known = self._sets[number]
        with _statuses(), torch.inference_mode():
            answer = _answer(self._host.backend(number), self._host.block_size)
            if not bool(answer.isfinite().all()):
                raise BrokenWeights(f"{known.path}: the known prompt's logits are not finite")
            for other in self._sets.values():
                same = other is known or (known.sha256 and other.sha256 == known.sha256)
                if same and other.answer is not None and not torch.equal(other.answer, answer):
                    raise BrokenWeights(
                        f"{known.path}: the known prompt's logits are not those that these "
                        "weights gave before"
                    )
        known.answer = answer

    def discard(self, number: int) -> None:
        """Frees a set that no slot runs on. Unknown ones are fine."""
        if self._sets.pop(number, None) is not None:
            self._host.drop(number)

    @property
    def _some(self) -> Backend:
        """A backend of this executor: all are of one spec."""
        return self._host.backend(next(iter(self._sets)))


@contextmanager
def _statuses() -> Iterator[None]:
    """What goes wrong with weights, in the words and statuses of a swap."""
    try:
        yield
    except Abandoned:
        raise abandoned() from None
    except BrokenWeights as error:
        raise SwapError("DATA_LOSS", str(error)) from error
    except WeightError as error:
        raise SwapError("FAILED_PRECONDITION", str(error)) from error
    except MemoryError as error:
        words = str(error) or "there is no memory for a second set of weights"
        raise SwapError("RESOURCE_EXHAUSTED", words) from error


def _difference(served: DecoderSpec, checkpoint: Checkpoint) -> str | None:
    """What keeps a checkpoint from taking the place of a served one; None: nothing."""
    for name, shape in expected_shapes(served).items():
        found = checkpoint.source.shapes.get(name)
        if found is not None and found != shape:
            return f"tensor {name} is {list(found)}, expected {list(shape)}"
    for entry in fields(served):
        expected, found = getattr(served, entry.name), getattr(checkpoint.spec, entry.name)
        if expected != found:
            return f"{entry.name} is {found!s:.200}, expected {expected!s:.200}"
    return None


def _answer(backend: Backend, block_size: int) -> torch.Tensor:
    """The logits after a known prompt of one block, computed in the null block: [1, vocab]."""
    backend.clear([0])
    ids = np.arange(1, block_size + 1, dtype=np.int64) * _PROBE_STEP % backend.spec.vocab_size
    none, count = np.zeros(1, np.int64), np.array([block_size])
    batch = FlatBatch.of(ids, none, count, np.zeros((1, 1), np.int64))
    return backend.logits(backend.forward(batch, np.array([block_size - 1])))
