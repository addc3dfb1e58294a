"""RollingUpdate: which replicas to make, drain and keep, as a pure function of those there are.

The algorithm is Kubernetes' Deployment controller's (pkg/controller/deployment/rolling.go) with
three differences. "Available" means routable: ready and admitted by the routers, so an old
replica goes only after its successor takes requests. Replicas that drain still occupy their
machine, so they count towards the surge limit. And where the serving revision loses replicas
while its successor is not up, it is repaired first.

    limit = replicas + surge        nothing is made beyond it
    floor = replicas - unavailable  nothing routable is drained below it
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bounds:
    replicas: int
    surge: int
    unavailable: int

    @property
    def floor(self) -> int:
        return max(0, self.replicas - self.unavailable)

    @property
    def limit(self) -> int:
        # With neither surge nor unavailability nothing could ever move.
        return self.replicas + (self.surge or int(not self.unavailable))


@dataclass(frozen=True, slots=True)
class Member:
    """One replica as the algorithm sees it."""

    name: str
    target: bool  # of the revision that is wanted
    active: bool  # of the revision that served last at full strength
    ready: bool
    routable: bool
    draining: bool  # on its way out, may still be called back
    deleting: bool  # on its way out for good
    in_flight: int
    created: float
    warm: int = 0  # blocks of prefixes in its cache


@dataclass(frozen=True, slots=True)
class Moves:
    """What to do next; all empty when there is nothing to do."""

    create: int = 0  # of the target revision
    repair: int = 0  # of the active revision
    drain: tuple[str, ...] = ()
    resume: tuple[str, ...] = ()


def next_moves(members: Sequence[Member], bounds: Bounds, *, can_repair: bool) -> Moves:
    """One round. Applying any part of it and asking again is safe, in any order."""
    staying = [m for m in members if not m.draining and not m.deleting]
    new = [m for m in staying if m.target]
    old = [m for m in staying if not m.target]
    room = max(0, bounds.limit - len(members))

    leaving = [m for m in members if m.target and m.draining and not m.deleting]
    missing = max(0, bounds.replicas - len(new))
    resume = _first(leaving, missing, lambda m: (not m.ready, -m.in_flight, m.created))
    missing -= len(resume)

    serving = len(old) + sum(m.routable for m in new)
    repair = min(room, max(0, bounds.floor - serving)) if can_repair else 0
    create = min(room - repair, missing)

    excess = _first(new, len(new) - bounds.replicas, _cheapest)
    kept = [m for m in new if m not in excess]
    drain = excess + _retire_old(kept, old, bounds)
    return Moves(create, repair, _names(drain), _names(resume))


def _retire_old(new: list[Member], old: list[Member], bounds: Bounds) -> list[Member]:
    """Old replicas that can go: those that serve nobody first, then routable ones down to the
    floor. New replicas that are not routable yet are reckoned as missing."""
    spare = len(old) + sum(m.routable for m in new) - bounds.floor
    if spare <= 0:
        return []
    idle = _first([m for m in old if not m.routable], spare, _least_hopeful)
    routable = sum(m.routable for m in new + old) - bounds.floor
    return idle + _first([m for m in old if m.routable], routable, _cheapest)


def _cheapest(member: Member) -> tuple[bool, bool, int, int, float]:
    """Whose loss costs least: who serves nobody, then fewest requests to end, then fewest prefixes
    to compute again elsewhere, then the newest."""
    return member.routable, member.ready, member.in_flight, member.warm, -member.created


def _least_hopeful(member: Member) -> tuple[bool, bool, float]:
    """Of those that serve nobody: never the revision that served, if another is left."""
    return member.active, member.ready, -member.created


def _first(
    members: list[Member], count: int, key: Callable[[Member], tuple[bool | int | float, ...]]
) -> list[Member]:
    return sorted(members, key=key)[: max(0, count)]


def _names(members: list[Member]) -> tuple[str, ...]:
    return tuple(m.name for m in members)
