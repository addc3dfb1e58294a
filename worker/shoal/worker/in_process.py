"""The executor of one process: on the GPU that the settings and the machine give it, else on its
CPU."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from shoal.worker.config import EngineConfig
from shoal.worker.gpu.choose import check_cpu, chosen_device
from shoal.worker.model.weights import UnknownArchitecture
from shoal.worker.runner import InProcessExecutor, create_executor, longest_sequence

if TYPE_CHECKING:
    from shoal.worker.gpu.executor import GpuExecutor

log = logging.getLogger(__name__)


def create_in_process(
    path: Path,
    config: EngineConfig,
    progress: Callable[[str, float], None],
    clock: Callable[[], float] = time.perf_counter,
    packed: Path | None = None,
) -> "InProcessExecutor | GpuExecutor":
    """As `create_executor`, on the device that `config.device` and `config.backend` choose. An
    architecture that is not of the registry goes to the CPU where both are `auto`."""
    kind = chosen_device(config, torch.cuda.is_available())
    if kind is None:
        check_cpu(config)
        return create_executor(path, config, progress, clock, packed)
    # Triton's own default, which some of its versions warn about where it is not said.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    from shoal.worker.gpu.create import create_gpu_executor

    try:
        return create_gpu_executor(path, config, kind, longest_sequence, progress, clock)
    except UnknownArchitecture as unknown:
        if config.device != "auto" or config.backend != "auto":
            raise
        check_cpu(config)
        log.warning("the GPU is left out: %s", unknown)
        return create_executor(path, config, progress, clock, packed)
