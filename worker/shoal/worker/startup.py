"""From a model's name to an engine that can step, with a name and a time for every phase."""

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.api.v1 import engine_pb2
from shoal.worker.config import EngineConfig, ParallelConfig
from shoal.worker.engine import Engine
from shoal.worker.executor import Executor
from shoal.worker.faults import Faults, FaultyExecutor
from shoal.worker.logs import event
from shoal.worker.sources import Progress, default_cache_dir, resolve
from shoal.worker.swap import Swapper, Text

if TYPE_CHECKING:
    from shoal.worker.gpu.executor import GpuExecutor
    from shoal.worker.parallel.driver import GroupExecutor
    from shoal.worker.runner import InProcessExecutor

log = logging.getLogger(__name__)

_PROGRESS_SECONDS = 0.5  # between two lines about one phase


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """Which model to serve, and as what."""

    uri: str
    model_revision: str | None = None  # package version, or the Hub's branch, tag or commit
    revision: str = ""  # of the service; the salt of every block hash
    cache_dir: Path | None = None
    packed_cache: bool = False  # keep packed weights in the cache directory


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine about to serve, and what routers are told of it."""

    engine: Engine
    executor: Executor
    model: engine_pb2.Model
    swapper: Swapper | None  # None: these weights stay


class Phases:
    """Logs each phase of the start-up, and hands its seconds on (to metrics)."""

    def __init__(
        self,
        record: Callable[[str, float], None] = lambda phase, seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._record = record
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @property
    def seconds(self) -> Mapping[str, float]:
        """What was over so far, in order."""
        return dict(self._seconds)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = self._clock()
        yield
        self.over(name, self._clock() - started)

    def over(self, name: str, seconds: float) -> None:
        """A phase that something else timed."""
        event(log, "startup phase", phase=name, seconds=round(seconds, 3))
        self._seconds[name] = seconds
        self._record(name, seconds)

    def progress(self, name: str) -> Progress:
        """A callback for a source; logs what it says, at most every half second."""
        said = ""
        last = float("-inf")

        def show(what: str, share: float | None) -> None:
            nonlocal said, last
            now = self._clock()
            if what == said and now - last < _PROGRESS_SECONDS and share != 1.0:
                return
            said, last = what, now
            fields: dict[str, str | float] = {"phase": name, "what": what}
            if share is not None:
                fields["fraction"] = round(share, 3)
            event(log, "startup progress", **fields)

        return show


def load(
    choice: ModelChoice,
    config: EngineConfig,
    phases: Phases,
    swapped: Callable[[float], None] = lambda pause_seconds: None,
    parallel: ParallelConfig | None = None,
    log_format: str = "text",
    faults: Faults = Faults(),  # noqa: B008  # frozen
) -> Loaded:
    """Fetches and loads the model. `swapped` hears of every later swap of weights; `log_format` is
    that of ranks. Raises SourceError, OSError, DeviceLost, or ValueError for a model or settings
    that cannot be served."""
    parallel = parallel or ParallelConfig()
    with phases.phase("resolve"):
        files = resolve(
            choice.uri, choice.model_revision, choice.cache_dir, phases.progress("resolve")
        )
    with phases.phase("import"):
        if parallel.in_process:
            import shoal.worker.in_process  # noqa: F401  # brings torch, which takes its time
        from shoal.worker.tokenizer import default_sampling, load_tokenizer
    with phases.phase("tokenizer"):
        tokenizer = load_tokenizer(files.path)
        sampling = default_sampling(files.path)
    executor = _executor(files.path, choice, config, parallel, phases, log_format)
    device: Executor = executor
    if faults:
        log.warning("faults are injected: %s", faults)
        device = FaultyExecutor(executor, faults, random.Random())
    engine = Engine(device, config, revision=choice.revision, warm_up_rate=executor.warm_up_rate)
    info = executor.info
    model = engine_pb2.Model(
        name=choice.uri,
        revision=choice.revision,
        architecture=info.architecture,
        max_model_len=engine.max_model_len,
        block_size=executor.block_size,
        num_blocks=executor.num_blocks,
        max_num_seqs=engine.max_num_seqs,
        vocab_size=info.vocab_size,
        eos_token_ids=info.eos_token_ids,
        bos_token_id=info.bos_token_id,
        tokenizer=tokenizer,
        dtype=info.dtype,
        default_sampling=sampling,
        hash_seed=choice.revision,
        startup=[
            engine_pb2.StartupPhase(name=name, seconds=seconds)
            for name, seconds in phases.seconds.items()
        ],
    )
    swapper = None
    if (standby := executor.standby) is not None:
        swapper = Swapper(
            engine,
            standby,
            lambda uri, revision: resolve(uri, revision, choice.cache_dir),
            lambda path: Text(load_tokenizer(path), default_sampling(path)),
            swapped,
        )
    return Loaded(engine, executor, model, swapper)


def _executor(
    path: Path,
    choice: ModelChoice,
    config: EngineConfig,
    parallel: ParallelConfig,
    phases: Phases,
    log_format: str,
) -> "InProcessExecutor | GpuExecutor | GroupExecutor":
    if parallel.in_process:
        from shoal.worker.in_process import create_in_process

        folder = (choice.cache_dir or default_cache_dir()) / "packed"
        packed = folder if choice.packed_cache else None
        return create_in_process(path, config, phases.over, packed=packed)
    from shoal.worker.parallel.create import create_group

    return create_group(
        path,
        config,
        parallel,
        phases.over,
        uri=choice.uri,
        model_revision=choice.model_revision,
        cache_dir=choice.cache_dir,
        log_format=log_format,
    )
