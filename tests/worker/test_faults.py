"""Injected faults: as many, and as slow, as asked for."""

import random

from shoal.worker.config import EngineConfig
from shoal.worker.engine import Engine
from shoal.worker.executor import ModelInfo, SerialExecutor
from shoal.worker.faults import Faults, FaultyExecutor
from shoal.worker.request import EngineRequest, ErrorCode, SamplingParams
from shoal.worker.step import Sampled, StepPlan, StepResult


class Counting(SerialExecutor):
    """A device whose next token is the position it stands at."""

    info = ModelInfo("Counting", 1000, 64, (999,), None, "float32")
    num_blocks = 200
    block_size = 4

    def execute(self, plan: StepPlan) -> StepResult:
        rows = (row for row in plan.rows if row.sample)
        return StepResult(tuple(Sampled(row.slot, row.start + row.count) for row in rows))

    def close(self) -> None: ...


def outcomes(faults: Faults, requests: int, slept: list[float]) -> list[str]:
    """How each of the requests ended: "done", or its error."""
    executor = FaultyExecutor(Counting(), faults, random.Random(5), slept.append)
    engine = Engine(executor, EngineConfig(max_num_seqs=8, block_size=4))
    sampling = SamplingParams(temperature=0.0, max_tokens=3)
    for number in range(requests):
        engine.add(EngineRequest(str(number), (1, 2, 3, 4, 5), 5, sampling))
    ended = {}
    while engine.has_work:
        for delta in engine.step().deltas:
            if delta.finish is not None:
                assert delta.error is None or delta.code is ErrorCode.INTERNAL
                ended[delta.key.request_id] = delta.error or "done"
    assert len(ended) == requests
    return list(ended.values())


def test_a_share_of_the_requests_fails() -> None:
    """About a quarter ends with an error that names the flag; the others are served."""
    found = outcomes(Faults(failure_rate=0.25), 400, [])
    failed = [error for error in found if error != "done"]
    assert 60 < len(failed) < 140
    assert all("--inject-failure-rate" in error for error in failed)


def test_every_step_is_slower_by_the_delay() -> None:
    """One pause a step, and nobody fails for it."""
    slept: list[float] = []
    assert set(outcomes(Faults(step_delay_seconds=0.05), 8, slept)) == {"done"}
    assert len(slept) >= 3 and set(slept) == {0.05}


def test_without_flags_there_are_none() -> None:
    """The default is no fault at all."""
    assert not Faults()
    assert Faults(failure_rate=0.1) and Faults(step_delay_seconds=0.1)
