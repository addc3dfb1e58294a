"""Replicas of two revisions side by side: which to make, drain and keep during a canary. Pure.

Each revision has a number of its own (canary.Course.replicas); the bounds are those of a rolling
update: never more than `bounds.limit` replicas exist, and none that serves is drained while fewer
than `bounds.floor` would be left of both revisions together. Replicas of other revisions go first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shoal.operator.rollout import Bounds


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica as this decision sees it."""

    name: str
    revision: str
    ready: bool
    serving: bool  # routable, and its revision has a weight
    draining: bool = False  # on its way out, may still be called back
    deleting: bool = False  # on its way out for good
    in_flight: int = 0
    created: float = 0.0
    warm: int = 0  # blocks of prefixes in its cache


@dataclass(frozen=True, slots=True)
class CanaryMoves:
    """What to do next; empty where there is nothing to do."""

    create: tuple[str, ...] = ()  # revisions of replicas to make, in order
    drain: tuple[str, ...] = ()  # names
    resume: tuple[str, ...] = ()


def canary_moves(
    replicas: Sequence[Replica], wanted: Mapping[str, int], stable: str, bounds: Bounds
) -> CanaryMoves:
    """One round. Applying any part of it and asking again is safe, in any order."""
    staying = [r for r in replicas if not r.draining and not r.deleting]
    room = max(0, bounds.limit - len(replicas))
    create: list[str] = []
    resume: list[str] = []
    # The stable revision is repaired before the new one grows.
    for revision in sorted(wanted, key=lambda name: name != stable):
        missing = max(0, wanted[revision] - sum(r.revision == revision for r in staying))
        leaving = [r for r in replicas if r.revision == revision and r.draining and not r.deleting]
        leaving.sort(key=lambda r: (not r.ready, -r.in_flight, r.created))
        resume += [replica.name for replica in leaving[:missing]]
        missing -= len(leaving[:missing])
        create += [revision] * min(room - len(create), missing)

    spare = sum(replica.serving for replica in staying) - bounds.floor
    drain: list[str] = []
    for replica in _excess(staying, wanted, stable):
        if replica.serving:
            if spare <= 0:
                continue
            spare -= 1
        drain.append(replica.name)
    return CanaryMoves(tuple(create), tuple(drain), tuple(resume))


def _excess(staying: Sequence[Replica], wanted: Mapping[str, int], stable: str) -> list[Replica]:
    """Who is too many, cheapest first: other revisions, then the new one, then the stable one;
    within each who serves nobody, then who has fewest requests, then the newest."""
    surplus = {
        revision: sum(r.revision == revision for r in staying) - wanted.get(revision, 0)
        for revision in {replica.revision for replica in staying}
    }
    ordered = sorted(
        staying,
        key=lambda r: (
            r.revision in wanted,
            r.revision == stable,
            r.serving,
            r.ready,
            r.in_flight,
            r.warm,
            -r.created,
        ),
    )
    excess = []
    for replica in ordered:
        if surplus[replica.revision] > 0:
            surplus[replica.revision] -= 1
            excess.append(replica)
    return excess
