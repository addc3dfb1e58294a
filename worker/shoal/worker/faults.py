"""Faults on purpose, for tests of what watches an engine. None unless a flag asks for them.

A canary analysis is proven by a revision that is slow, and by one that fails: this makes either
of any model. Nobody serves people with these flags; the log warns at the start.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from shoal.worker.executor import Executor
from shoal.worker.step import Sampled, StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong."""

    step_delay_seconds: float = 0.0  # added to every step
    failure_rate: float = 0.0  # share of the requests' samples that fail at their first token

    def __bool__(self) -> bool:
        return self.step_delay_seconds > 0 or self.failure_rate > 0

    def __str__(self) -> str:
        return (
            f"every step takes {1e3 * self.step_delay_seconds:g} ms longer, and"
            f" {100 * self.failure_rate:g} % of the samples fail"
        )


class FaultyExecutor:
    """Another executor, with faults."""

    def __init__(
        self,
        executor: Executor,
        faults: Faults,
        rng: random.Random,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.info = executor.info
        self.num_blocks = executor.num_blocks
        self.block_size = executor.block_size
        self._executor = executor
        self._faults = faults
        self._rng = rng
        self._sleep = sleep
        self._failing: set[int] = set()  # slots whose next token does not come

    @property
    def depth(self) -> int:
        return self._executor.depth

    @property
    def relays(self) -> bool:
        return self._executor.relays

    @property
    def lost(self) -> str | None:
        return self._executor.lost

    def submit(self, plan: StepPlan) -> None:
        for init in plan.init:
            self._failing.discard(init.slot)
            first = len(init.token_ids) == init.prompt_len
            if first and self._rng.random() < self._faults.failure_rate:
                self._failing.add(init.slot)
        self._executor.submit(plan)

    def collect(self) -> StepResult:
        result = self._executor.collect()
        self._sleep(self._faults.step_delay_seconds)
        if not self._failing:
            return result
        return StepResult(tuple(map(self._spoiled, result.sampled)), result.prompt_logprobs)

    def close(self) -> None:
        self._executor.close()

    def _spoiled(self, sampled: Sampled) -> Sampled:
        if sampled.slot not in self._failing:
            return sampled
        self._failing.discard(sampled.slot)
        return sampled._replace(error="a failure was injected (--inject-failure-rate)")
