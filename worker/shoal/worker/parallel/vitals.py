"""Which rank of a group is lost, and since when; pure.

    waiting --joined--> starting --said "serving"--> serving
       any of them --left, failed, silent too long--> lost

The first rank that is lost is the group's end: the others cannot go on without it. What they say of
their own end, such as that a peer is gone, is often heard before; so a rank that ends without a
word is looked for a moment before another's word is taken for the reason.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

SERVING: Final = "serving"  # the phase in which a rank computes steps
WAITING: Final = "joining"  # the phase before a rank's first word


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a rank may be silent, in seconds."""

    join: float = 120.0  # until its first word
    # Importing, loading and compiling hold the interpreter for seconds at a time.
    starting: float = 30.0
    serving: float = 2.0
    blame: float = 0.5  # after a rank's own word, for one that ended without


@dataclass(frozen=True, slots=True)
class Loss:
    """The end of a group."""

    rank: int
    host: str
    phase: str
    why: str

    def __str__(self) -> str:
        where = f" on {self.host}" if self.host else ""
        return f"rank {self.rank}{where} is lost while {self.phase}: {self.why}"


@dataclass(frozen=True, slots=True)
class Rank:
    """What is known of one rank."""

    rank: int
    host: str  # "" before it joined
    phase: str
    heard: float  # when it last said something; before its first word, when it was launched


@dataclass(frozen=True, slots=True)
class Vitals:
    """Of all ranks of a group, by number."""

    ranks: Mapping[int, Rank]
    loss: Loss | None = None
    suspect: tuple[Loss, float] | None = None  # what a rank said of its own end, and when

    @staticmethod
    def of(world: int) -> "Vitals":
        """Ranks that are yet to be launched: nobody is late."""
        return Vitals({rank: Rank(rank, "", WAITING, math.inf) for rank in range(world)})

    def launched(self, now: float) -> "Vitals":
        """Ranks that have not joined are waited for from now on."""
        waiting = {r.rank: replace(r, heard=now) for r in self.ranks.values() if r.phase == WAITING}
        return replace(self, ranks={**self.ranks, **waiting})

    @property
    def joined(self) -> bool:
        return all(rank.phase != WAITING for rank in self.ranks.values())

    @property
    def serving(self) -> bool:
        return all(rank.phase == SERVING for rank in self.ranks.values())

    def heard(self, rank: int, now: float, *, host: str | None = None, phase: str) -> "Vitals":
        """`rank` said something: at its first word also where it is."""
        known = self.ranks[rank]
        said = Rank(rank, known.host if host is None else host, phase, now)
        return replace(self, ranks={**self.ranks, rank: said})

    def failed(self, rank: int, why: str, now: float) -> "Vitals":
        """The rank's own word of its end; the first word counts."""
        if self.suspect is not None:
            return self
        return replace(self, suspect=(self._loss(rank, why), now))

    def lost(self, rank: int, why: str) -> "Vitals":
        """The rank ended, as others saw; the first counts. Its own word says more than that."""
        if self.loss is not None:
            return self
        if self.suspect is not None and self.suspect[0].rank == rank:
            return self
        return replace(self, loss=self._loss(rank, why))

    def judged(self, now: float, patience: Patience) -> "Vitals":
        """Loses the rank that has been silent for too long, if any: of several, the one that
        was silent first."""
        if self.loss is not None:
            return self
        if self.suspect is not None:
            loss, since = self.suspect
            return replace(self, loss=loss) if now - since >= patience.blame else self
        for rank in sorted(self.ranks.values(), key=lambda known: known.heard):
            silent = now - rank.heard
            if silent >= (limit := _limit(rank, patience)):
                if rank.phase == WAITING:
                    return self.lost(rank.rank, f"it did not join within {limit:g} s")
                return self.lost(rank.rank, f"nothing was heard of it for {silent:.1f} s")
        return self

    def _loss(self, rank: int, why: str) -> Loss:
        known = self.ranks[rank]
        return Loss(rank, known.host, known.phase, why)


def _limit(rank: Rank, patience: Patience) -> float:
    if rank.phase == WAITING:
        return patience.join
    return patience.serving if rank.phase == SERVING else patience.starting
