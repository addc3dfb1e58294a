"""The backend of an architecture that is not of the registry: see `shoal.worker.model.foreign`."""

import logging
from collections.abc import Callable
from pathlib import Path

from shoal.worker.config import EngineConfig
from shoal.worker.host import available_memory, resident_memory
from shoal.worker.memory import MemoryPlan, plan_memory
from shoal.worker.model.foreign import ForeignBackend, load_foreign
from shoal.worker.model.precision import Precision
from shoal.worker.model.spec import DecoderSpec
from shoal.worker.model.weights import UnknownArchitecture, UnsupportedModel

log = logging.getLogger(__name__)


def create_foreign_backend(
    path: Path,
    config: EngineConfig,
    precision: Precision,
    unknown: UnknownArchitecture,
    longest: Callable[[DecoderSpec, EngineConfig], int],
    clock: Callable[[], float],
) -> tuple[ForeignBackend, MemoryPlan]:
    """The backend and its memory, for sequences as `longest` allows them.

    `unknown`: why the model is none of the registry; raised again, with what transformers says
    of the model, where that cannot compute it either. ValueError for a setting it does not have.
    """
    if config.quantization not in ("auto", "none"):
        raise ValueError(f"quantization is {config.quantization}, but {unknown}")
    if config.backend == "native":
        raise ValueError(f"backend is native, but {unknown}")
    available, resident = available_memory(), resident_memory()
    try:
        model, _ = load_foreign(path, precision, clock)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{unknown}; {error}") from error
    spec = model.spec
    max_model_len = longest(spec, config)
    memory = plan_memory(
        spec, precision, config, max_model_len, available, resident, weights=model.nbytes
    )
    log.info("memory: %s", memory.describe())
    log.info(
        "backend: torch, %s by transformers' own module over paged attention, "
        "slower than a known architecture",
        spec.architecture,
    )
    return ForeignBackend(model, memory.num_blocks, config.block_size), memory
