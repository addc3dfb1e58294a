"""Outlier ejection: a replica that keeps failing rests for a while, each time longer.

After `THRESHOLD` failures in a row it is ejected; when the time is over one more failure ejects
it again for twice as long, one success clears its record. Ejected replicas are used only where
nothing else is left (see `pick.eligible`).
"""

THRESHOLD = 3
FIRST_SECONDS = 1.0
LONGEST_SECONDS = 60.0


class Outlier:
    """The record of one replica. Times are seconds of one monotonic clock."""

    __slots__ = ("_ejections", "_failures", "_until")

    def __init__(self) -> None:
        self._failures = 0
        self._ejections = 0
        self._until = 0.0

    def failed(self, now: float) -> None:
        self._failures += 1
        if self._failures >= THRESHOLD and now >= self._until:
            self._until = now + min(LONGEST_SECONDS, FIRST_SECONDS * 2**self._ejections)
            self._ejections += 1

    def succeeded(self) -> None:
        """What was under way when the replica was ejected may still succeed: that counts too."""
        self._failures = self._ejections = 0
        self._until = 0.0

    def ejected(self, now: float) -> bool:
        return now < self._until
