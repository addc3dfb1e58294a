"""From a model's name to an engine that can step, with a name and a time for every phase."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shoal.api.v1 import engine_pb2
from shoal.worker.config import EngineConfig
from shoal.worker.engine import Engine
from shoal.worker.executor import Executor
from shoal.worker.logs import event
from shoal.worker.sources import Progress, resolve

log = logging.getLogger(__name__)

_PROGRESS_SECONDS = 0.5  # between two lines about one phase


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """Which model to serve, and as what."""

    uri: str
    model_revision: str | None = None  # package version, or the Hub's branch, tag or commit
    revision: str = ""  # of the service; the salt of every block hash
    cache_dir: Path | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine about to serve, and what routers are told of it."""

    engine: Engine
    executor: Executor
    model: engine_pb2.Model


class Phases:
    """Logs each phase of the start-up, and hands its seconds on (to metrics)."""

    def __init__(
        self,
        record: Callable[[str, float], None] = lambda phase, seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._record = record
        self._clock = clock

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = self._clock()
        yield
        self.over(name, self._clock() - started)

    def over(self, name: str, seconds: float) -> None:
        """A phase that something else timed."""
        event(log, "startup phase", phase=name, seconds=round(seconds, 3))
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


def load(choice: ModelChoice, config: EngineConfig, phases: Phases) -> Loaded:
    """Fetches and loads the model. Raises SourceError, OSError, or ValueError for a model or
    settings that cannot be served."""
    with phases.phase("resolve"):
        files = resolve(
            choice.uri, choice.model_revision, choice.cache_dir, phases.progress("resolve")
        )
    with phases.phase("import"):
        from shoal.worker.runner import create_executor
        from shoal.worker.tokenizer import default_sampling, load_tokenizer
    with phases.phase("tokenizer"):
        tokenizer = load_tokenizer(files.path)
        sampling = default_sampling(files.path)
    executor = create_executor(files.path, config, phases.over)
    engine = Engine(executor, config, revision=choice.revision, warm_up_rate=executor.warm_up_rate)
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
    )
    return Loaded(engine, executor, model)
