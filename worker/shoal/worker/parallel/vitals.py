"""Which rank of a group is lost, and since when; pure.

    waiting --joined--> starting --said "serving"--> serving
       any of them --left, failed, silent too long--> lost

The first rank that is lost is the group's end: the others cannot go on without it, and their own
errors, which follow at once, are of no interest any more.
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

    def lost(self, rank: int, why: str) -> "Vitals":
        """The rank's own word of its end, or that of whoever runs it; the first word counts."""
        if self.loss is not None:
            return self
        known = self.ranks[rank]
        return replace(self, loss=Loss(rank, known.host, known.phase, why))

    def judged(self, now: float, patience: Patience) -> "Vitals":
        """Loses the rank that has been silent for too long, if any: of several, the one that
        was silent first."""
        if self.loss is not None:
            return self
        for rank in sorted(self.ranks.values(), key=lambda known: known.heard):
            silent = now - rank.heard
            if silent >= (limit := _limit(rank, patience)):
                if rank.phase == WAITING:
                    return self.lost(rank.rank, f"it did not join within {limit:g} s")
                return self.lost(rank.rank, f"nothing was heard of it for {silent:.1f} s")
        return self


def _limit(rank: Rank, patience: Patience) -> float:
    if rank.phase == WAITING:
        return patience.join
    return patience.serving if rank.phase == SERVING else patience.starting
