"""Blue and green: a full second set, one switch, the first set kept for a while. Pure.

    the new revision has fewer routable replicas than wanted   requests stay where they are
    as many as wanted                                          all go there: it is active
    for keepSeconds                                            the old replicas stay, idle

The way back within that time finds its replicas there, so it is the switch alone. A third revision
takes the kept ones' place. Which revision is active, which is kept and since when is in the status;
whoever is killed before it is written decides the same again, with a later clock. A spec that is
paused or refused holds both sets as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from shoal.api.types import BlueGreenStatus
from shoal.operator.rollout import Bounds

WHOLE = 100


@dataclass(frozen=True, slots=True)
class Sets:
    """What is to be brought about now."""

    replicas: Mapping[str, int]  # by revision
    weights: Mapping[str, int]  # by revision, in sum 100
    switched: bool = False  # the wanted revision is the active one from now on
    kept: str | None = None  # revision that serves nobody and stays for the way back
    again: float | None = None  # seconds after which the kept ones may go
    room: Bounds = field(default=Bounds(0, 0, 0))


def held_sets(
    active: str,
    bounds: Bounds,
    existing: Mapping[str, int],
    weights: Mapping[str, int],
    status: BlueGreenStatus | None,
) -> Sets:
    """No revision may begin: who serves is repaired and scaled, the others stay as they are.

    `weights` are those of the table in force.
    """
    serving = next((name for name, weight in weights.items() if weight == WHOLE), active)
    replicas = {name: min(count, bounds.replicas) for name, count in existing.items()}
    replicas[serving] = bounds.replicas
    back = status.kept if status is not None and existing.get(status.kept) else None
    return Sets(
        replicas,
        {name: WHOLE if name == serving else 0 for name in replicas},
        switched=serving != active,
        kept=active if serving != active else back,
        room=Bounds(bounds.replicas, max(bounds.surge, sum(replicas.values())), bounds.unavailable),
    )


def next_sets(
    wanted: str,
    active: str,
    bounds: Bounds,
    existing: Mapping[str, int],
    routable: Mapping[str, int],
    status: BlueGreenStatus | None,
    keep_seconds: float,
    now: float,
) -> Sets:
    """`existing` and `routable` count the replicas that stay, by revision; `now` is Unix time."""
    replicas = bounds.replicas
    room = Bounds(replicas, max(bounds.surge, replicas), bounds.unavailable)
    if wanted != active:
        switched = routable.get(wanted, 0) >= replicas
        weights = {wanted: WHOLE, active: 0} if switched else {wanted: 0, active: WHOLE}
        kept = active if switched else None
        return Sets({wanted: replicas, active: replicas}, weights, switched, kept, room=room)
    alone = Sets({active: replicas}, MappingProxyType({active: WHOLE}), room=room)
    if status is None or status.kept == active or not existing.get(status.kept, 0):
        return alone
    left = status.switch_time.timestamp() + keep_seconds - now
    if left <= 0:
        return alone
    return Sets(
        {active: replicas, status.kept: min(replicas, existing[status.kept])},
        {active: WHOLE, status.kept: 0},
        kept=status.kept,
        again=left,
        room=room,
    )
