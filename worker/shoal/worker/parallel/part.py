"""What a rank knows of its part of the model before it loads it."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from shoal.kernels.quant import GROUP
from shoal.worker.config import EngineConfig
from shoal.worker.executor import ModelInfo
from shoal.worker.host import available_memory, resident_memory, usable_cores
from shoal.worker.memory import MemoryPlan, plan_memory
from shoal.worker.model.loader import Quantize, open_checkpoint
from shoal.worker.model.native import unfit
from shoal.worker.model.precision import Precision, choose_precision
from shoal.worker.model.reader import check
from shoal.worker.model.spec import DecoderSpec
from shoal.worker.parallel.invitation import Invitation, Order, model_path
from shoal.worker.parallel.layout import Place, Share
from shoal.worker.parallel.shard import ShardedSource, part_of, share_of
from shoal.worker.runner import BACKENDS, longest_sequence, quantizer
from shoal.worker.sources import resolve

log = logging.getLogger(__name__)

# Of each file, for its digest: its beginning, and so many windows from end to end.
_HEAD_BYTES: Final = 1 << 16
_WINDOWS: Final = 32
_WINDOW_BYTES: Final = 1 << 14
# Of inner columns, where a step program or a matrix product works on whole vectors.
_INNER_UNITS: Final = (16, 1)


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's."""

    whole: DecoderSpec
    spec: DecoderSpec  # what the rank computes, as if it were a model
    share: Share
    source: ShardedSource
    precision: Precision
    quantize: Quantize | None
    config: EngineConfig
    memory: MemoryPlan
    max_model_len: int
    native: bool  # step programs can compute the parts of all ranks
    digest: str  # the same on all nodes that have the same files

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            architecture=self.whole.architecture,
            vocab_size=self.whole.vocab_size,
            max_model_len=self.max_model_len,
            eos_token_ids=self.whole.eos_token_ids,
            bos_token_id=self.whole.bos_token_id,
            dtype=self.precision.name,
        )


def open_part(
    invitation: Invitation,
    rank: int,
    neighbours: int,
    progress: Callable[[str, float | None], None],
) -> Part:
    """Finds the model, fetching it where this node has it not, and plans the rank's memory.
    `neighbours`: ranks of this node, with which cores and memory are shared. Sets torch's threads,
    for the process. Raises ValueError, SourceError or OSError for what cannot be served."""
    order = invitation.order
    config = order.config
    torch.set_num_threads(config.threads or max(1, usable_cores() // neighbours))
    path = model_path(order) or _fetched(order, progress)
    precision = choose_precision(config.dtype)
    checkpoint = open_checkpoint(path, whole=False)
    check(checkpoint.spec, checkpoint.source)
    place = Place.of(rank, invitation.tensor, invitation.pipeline)
    units = (GROUP,) if config.quantization == "int8" else _INNER_UNITS
    own = share_of(checkpoint.spec, place, units)
    spec = part_of(checkpoint.spec, own)
    max_model_len = longest_sequence(spec, config)
    quantize = quantizer(spec, config)
    native = _runs_native(checkpoint.spec, invitation, precision, units)
    limit = config.memory_limit_bytes
    memory = plan_memory(
        spec,
        precision,
        config if limit is None else replace(config, memory_limit_bytes=limit // neighbours),
        max_model_len,
        available_memory() // neighbours,
        resident_memory(),
        native=native,
    )
    log.info("rank %d of %d: memory: %s", rank, invitation.world, memory.describe())
    names = list(checkpoint.source.shapes)
    reads = Reads(len(names) // invitation.pipeline or 1, progress)
    return Part(
        whole=checkpoint.spec,
        spec=spec,
        share=own,
        source=ShardedSource(checkpoint.source, checkpoint.spec, own, reads),
        precision=precision,
        quantize=quantize,
        config=config,
        memory=memory,
        max_model_len=max_model_len,
        native=native,
        digest=digest_of(path),
    )


def _runs_native(
    spec: DecoderSpec, invitation: Invitation, precision: Precision, units: tuple[int, ...]
) -> bool:
    """Whether step programs compute, on all ranks or on none: lanes exchange what their backend
    gives. ValueError where they must and cannot."""
    config = invitation.order.config
    if config.backend not in BACKENDS:
        raise ValueError(f"backend is {config.backend!r}, expected " + ", ".join(BACKENDS))
    if config.backend == "torch":
        return False
    for rank in range(invitation.world):
        place = Place.of(rank, invitation.tensor, invitation.pipeline)
        own = part_of(spec, share_of(spec, place, units))
        if (why := unfit(own, precision, config.block_size)) is not None:
            if config.backend == "native":
                raise ValueError(f"backend is native, but {why} (rank {rank})")
            log.info("backend: torch (%s, rank %d)", why, rank)
            return False
    return True


class Reads:
    """Tells how much of a rank's tensors is read."""

    def __init__(self, expected: int, progress: Callable[[str, float | None], None]) -> None:
        self._expected = expected
        self._progress = progress
        self._count = 0

    def __call__(self, name: str) -> None:
        self._count += 1
        self._progress("weights", min(1.0, self._count / self._expected))


def digest_of(path: Path) -> str:
    """Of a model's files: names, sizes, beginnings (tables and configuration stand there) and 32
    windows spread over each, so that files of one shape with other weights differ. Weights that
    differ between the windows only are not noticed: reading all would take as long as loading."""
    found = hashlib.sha256()
    files: Sequence[Path] = [path]
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in (".safetensors", ".json"))
    for file in files:
        found.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            found.update(content.read(_HEAD_BYTES))
            for offset in _windows(file.stat().st_size):
                content.seek(offset)
                found.update(content.read(_WINDOW_BYTES))
    return found.hexdigest()[:16]


def _windows(size: int) -> list[int]:
    """Where the windows of a file of `size` bytes begin: the last one ends with the file."""
    last = max(0, size - _WINDOW_BYTES)
    return sorted({last * number // (_WINDOWS - 1) for number in range(_WINDOWS)})


def _fetched(order: Order, progress: Callable[[str, float | None], None]) -> Path:
    cache = None if order.cache_dir is None else Path(order.cache_dir)
    return resolve(order.uri, order.model_revision, cache, progress).path
