"""How long to wait before a process that ended is started again."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Backoff:
    """The first restart is at once, then the wait doubles; a process that ran long enough
    starts afresh. As the kubelet does it, with times for one machine. Seconds throughout."""

    initial: float = 1.0
    longest: float = 60.0
    forget_after: float = 60.0  # a run this long makes up for all failures before
    failures: int = field(default=0, init=False)  # in a row

    def next_delay(self, ran: float) -> float:
        """The wait before the next start, after a run of `ran` seconds."""
        if ran >= self.forget_after:
            self.failures = 0
        self.failures += 1
        if self.failures == 1:
            return 0.0
        # The exponent is bounded long before a float overflows.
        return min(self.longest, self.initial * 2.0 ** min(self.failures - 2, 32))
