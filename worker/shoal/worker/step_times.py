"""How long steps take: averages for the routers, and how long the next one may take."""

from dataclasses import dataclass
from typing import ClassVar

# Of what a step is predicted to take: room for a longer context than the average, for prompt
# logprobs, and for neighbours on the same cores.
PATIENCE = 10.0


@dataclass(slots=True)
class StepTimes:
    """Exponential moving averages of steps. The rate of prefill is a ratio of two averages, so
    that a step with one prompt token weighs as little as it computes."""

    warm_up_rate: float = 0.0  # prompt tokens a second before the first request; 0: not known
    step_seconds: float = 0.0  # 0 before the first step
    _prefill_tokens: float = 0.0
    _prefill_seconds: float = 0.0

    _WEIGHT: ClassVar[float] = 0.1

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second, over steps that prefilled; 0 before the first."""
        return self._prefill_tokens / self._prefill_seconds if self._prefill_seconds else 0.0

    def add(self, seconds: float, prefill_tokens: int) -> None:
        """Takes note of a step that ended well."""
        weight = self._WEIGHT if self.step_seconds else 1.0
        self.step_seconds += weight * (seconds - self.step_seconds)
        if prefill_tokens:
            weight = self._WEIGHT if self._prefill_seconds else 1.0
            self._prefill_tokens += weight * (prefill_tokens - self._prefill_tokens)
            self._prefill_seconds += weight * (seconds - self._prefill_seconds)

    def allowance(self, num_tokens: int) -> float:
        """Seconds that a step of `num_tokens` tokens, of whatever kind, takes even on a bad day.
        0 where nothing is known to judge it by."""
        rate = self.prefill_rate or self.warm_up_rate
        computing = num_tokens / rate if rate else 0.0
        return PATIENCE * (self.step_seconds + computing)
