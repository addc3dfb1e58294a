"""Which revisions' weights are in memory, and under which number plans name them. Pure.

Two sets at most: the active one, and the previous one. Requests that began on the previous set,
and those that still ask for its revision, go on beside the others; it is also the way back.
"""

from dataclasses import dataclass


class RevisionGone(Exception):
    """The revision that a request names is not in memory here (any more): another replica, or a
    later try, may serve it."""


@dataclass(frozen=True, slots=True)
class WeightSet:
    """One revision's weights."""

    number: int  # in plans; 0 is what the engine was started with
    revision: str  # the salt of every block hash computed on it


class WeightSets:
    """Owned by the engine."""

    def __init__(self, revision: str) -> None:
        self.active = WeightSet(0, revision)
        self.previous: WeightSet | None = None

    @property
    def revisions(self) -> tuple[str, ...]:
        """What requests may name, the active one first."""
        return tuple(found.revision for found in (self.active, self.previous) if found is not None)

    def find(self, revision: str) -> WeightSet:
        """The set of a revision; "" is the active one. Raises RevisionGone."""
        if not revision or revision == self.active.revision:
            return self.active
        if self.previous is None or revision != self.previous.revision:
            served = " and ".join(found or "none" for found in self.revisions)
            raise RevisionGone(f"revision {revision} was asked for, {served} is served")
        return self.previous

    def activate(self, weights: WeightSet) -> None:
        """The active set becomes the previous one. Whatever else was previous has been retired."""
        assert self.previous in (None, weights), "a third set of weights"
        assert weights != self.active, "active already"
        self.previous, self.active = self.active, weights

    def retire(self) -> None:
        """The previous set takes no more requests."""
        self.previous = None
