"""Where the time goes between a replica's creation and its first request. Pure.

    schedule   from the pod's creation until it has a node
    image      until the engine's process began: images, volumes, a model that is downloaded first
    weights    until weights are in memory, as the engine says: interpreter, imports, reading
    warm-up    its first steps, as the engine says
    route      until every router sends requests to it: probes, connections, tokenizers

A process of one machine has no schedule and no image. Kubernetes tells times in whole seconds.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Final

from shoal.api.status import ColdStartPhase, ColdStartStatus
from shoal.operator.groups import groups_of
from shoal.operator.observe import Observed, ObservedPod

PHASES: Final = ("schedule", "image", "weights", "warm-up", "route")
_WARM_UP: Final = "warm-up"


class ColdStarts:
    """Which replicas have been admitted already, by service, in one process."""

    def __init__(self, tell: Callable[[ColdStartStatus], None] = lambda start: None) -> None:
        """`tell` hears of each replica that is admitted for the first time."""
        self._tell = tell
        self._known: dict[str, frozenset[str]] = {}
        self._last: dict[str, ColdStartStatus] = {}

    def look(self, key: str, observed: Observed, now: float) -> ColdStartStatus | None:
        """The last start of the service that this process saw. `now` in Unix seconds.

        What a process finds admitted at its first look began at some other time, and a container
        that was started again says nothing about a start.
        """
        replicas = [group.as_replica() for group in groups_of(observed.pods)]
        admitted = {pod.name: pod for pod in replicas if observed.admitted(pod)}
        there = frozenset(pod.name for pod in replicas)
        known = self._known.get(key)
        if known is None:
            known = frozenset(admitted)
        self._known[key] = (known & there) | admitted.keys()
        for name in sorted(admitted.keys() - known):
            start = cold_start(admitted[name], _startup(observed, name), now)
            if start is not None:
                self._last[key] = start
                self._tell(start)
        return self._last.get(key)

    def forget(self, key: str) -> None:
        """The service is gone."""
        self._known.pop(key, None)
        self._last.pop(key, None)

    def clear(self) -> None:
        """Somebody else looks from here on."""
        self._known.clear()
        self._last.clear()


def cold_start(
    pod: ObservedPod, startup: tuple[float, float] | None, admitted: float
) -> ColdStartStatus | None:
    """The phases of one replica's start; None where its parts are not known."""
    if startup is None or pod.launched is None or pod.restarts:
        return None
    began = pod.created
    scheduled = max(began, pod.scheduled if pod.scheduled is not None else began)
    launched = max(scheduled, pod.launched)
    weights, warm_up = startup
    route = max(0.0, admitted - launched - weights - warm_up)
    seconds = (scheduled - began, launched - scheduled, weights, warm_up, route)
    return ColdStartStatus(
        pod=pod.name,
        time=datetime.fromtimestamp(int(admitted), UTC),
        seconds=round(max(0.0, admitted - began), 2),
        phases=tuple(
            ColdStartPhase(phase=phase, seconds=round(took, 2))
            for phase, took in zip(PHASES, seconds, strict=True)
        ),
    )


def startup_parts(phases: Mapping[str, float]) -> tuple[float, float] | None:
    """(until weights are in memory, warm-up) of an engine's own phases; None where it told none."""
    if not phases:
        return None
    warm_up = phases.get(_WARM_UP, 0.0)
    return sum(phases.values()) - warm_up, warm_up


def _startup(observed: Observed, name: str) -> tuple[float, float] | None:
    views = (router.endpoints.get(name) for router in observed.routers)
    return next((view.startup for view in views if view is not None and view.startup), None)
