"""An executor over ranks, as the settings say."""

from collections.abc import Callable
from pathlib import Path

from shoal.worker.config import EngineConfig, ParallelConfig
from shoal.worker.executor import DeviceLost
from shoal.worker.gpu.choose import check_cpu
from shoal.worker.parallel.driver import GroupExecutor, Launcher
from shoal.worker.parallel.invitation import Order
from shoal.worker.parallel.local import LocalLauncher


def create_group(
    path: Path,
    config: EngineConfig,
    parallel: ParallelConfig,
    progress: Callable[[str, float], None],
    *,
    uri: str | None = None,
    model_revision: str | None = None,
    cache_dir: Path | None = None,
    log_format: str = "text",
) -> GroupExecutor:
    """Starts the ranks and returns once they serve. `path` is the model here, `uri` and the rest
    where other nodes get it from. Raises ValueError for what they cannot serve, DeviceLost where
    they cannot be started."""
    if config.device == "cuda" or config.backend == "triton":
        raise ValueError(
            f"device is {config.device} and backend {config.backend}, but a model that is divided "
            f"over ranks ({parallel.tensor} x {parallel.pipeline}) is computed on CPUs: choose "
            "tensor 1 and pipeline 1, or device cpu"
        )
    check_cpu(config)
    cache = None if cache_dir is None else str(cache_dir)
    order = Order(str(path), uri or str(path), model_revision, cache, config)
    launcher = _launcher(parallel, log_format)
    return GroupExecutor(order, parallel.tensor, parallel.pipeline, launcher, progress)


def _launcher(parallel: ParallelConfig, log_format: str) -> Launcher:
    if parallel.executor != "ray":
        return LocalLauncher(parallel.ranks, log_format)
    try:
        from shoal.worker.cluster.launcher import RayLauncher
    except ModuleNotFoundError as error:
        raise DeviceLost(f"executor is ray, but {error.name} is not installed") from error
    return RayLauncher(parallel.tensor, parallel.pipeline, parallel.ray_address)
