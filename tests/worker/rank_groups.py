"""Groups of ranks for tests: threads of this process that stand for processes, and an engine
over them."""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal.worker.config import EngineConfig
from shoal.worker.engine import Engine
from shoal.worker.executor import Executor
from shoal.worker.parallel.driver import GroupExecutor
from shoal.worker.parallel.invitation import Invitation, Order
from shoal.worker.parallel.rank import run_rank
from shoal.worker.request import EngineRequest, FinishReason, SamplingParams

Tokens = tuple[int, ...]
BLOCK = 4


class ThreadLauncher:
    """Runs the ranks' program on threads."""

    host = "127.0.0.1"

    def __init__(self, world: int) -> None:
        self.world = world
        self.errors: dict[int, BaseException] = {}
        self.ended: list[int] = []
        self.threads: list[threading.Thread] = []

    def start(self, invitation: bytes) -> None:
        for rank in range(self.world):
            thread = threading.Thread(target=self._run, args=(invitation, rank), daemon=True)
            self.threads.append(thread)
            thread.start()

    def failure(self) -> str | None:
        for rank, error in dict(self.errors).items():
            return f"rank {rank}: {error}"
        return None

    def stop(self) -> None:
        deadline = time.monotonic() + 10
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self, invitation: bytes, rank: int) -> None:
        try:
            run_rank(Invitation.unpack(invitation), rank, "localhost", end=lambda code: None)
        except Exception as error:
            self.errors[rank] = error
        self.ended.append(rank)


def settings(**changes: Any) -> EngineConfig:
    """Of an engine over a tiny model."""
    values = {
        "max_num_seqs": 6,
        "block_size": BLOCK,
        "kv_cache_blocks": 200,
        "dtype": "float32",
        "threads": 1,
        **changes,
    }
    return EngineConfig(**values)


@contextmanager
def group(
    path: Path, tensor: int, pipeline: int, config: EngineConfig, depth: int | None = None
) -> Iterator[GroupExecutor]:
    """An executor over threads, all of which end with it, in peace."""
    launcher = ThreadLauncher(tensor * pipeline)
    order = Order(str(path), str(path), None, None, config)
    executor = GroupExecutor(
        order, tensor, pipeline, launcher, lambda phase, seconds: None, depth=depth
    )
    try:
        yield executor
    finally:
        executor.close()
    assert sorted(launcher.ended) == list(range(launcher.world)), "a rank goes on"
    assert launcher.errors == {}


def generate(
    executor: Executor, config: EngineConfig, prompts: Iterable[Sequence[int]], max_tokens: int
) -> list[Tokens]:
    """Greedy continuations, all prompts at once."""
    engine = Engine(executor, config)
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    found: dict[str, Tokens] = {}
    for number, prompt in enumerate(prompts):
        found[str(number)] = ()
        engine.add(EngineRequest(str(number), tuple(prompt), len(prompt), sampling))
    ends = set()
    while engine.has_work:
        for delta in engine.step().deltas:
            found[delta.key.request_id] += delta.token_ids
            ends.add(delta.finish)
    assert ends == {None, FinishReason.LENGTH}
    assert engine.load().blocks_used == 0
    return list(found.values())
