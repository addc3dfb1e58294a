"""One look at one service: observe, plan, act, tell. The planner decides, this carries it out.

Killed at any line, the next look goes on from what is there: each write is whole in itself, and
a plan is a function of what was observed.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from shoal.api.types import InferenceService, InferenceServiceStatus
from shoal.operator.children import desired_children, needs_group_token
from shoal.operator.coldstart import ColdStarts
from shoal.operator.kube.applier import Applier
from shoal.operator.kube.book import Entry, ServiceBook
from shoal.operator.kube.carry import carry_out
from shoal.operator.kube.events import EventPoster
from shoal.operator.kube.kinds import INFERENCE_SERVICES, POD_MONITORS, PODS, Kind
from shoal.operator.kube.news import news, pod_news
from shoal.operator.kube.observing import observe, read_status
from shoal.operator.kube.outcome import Next, Outcome, leads_on, next_look, waits_for_routers
from shoal.operator.kube.patience import patience
from shoal.operator.kube.progress import FetchProgress
from shoal.operator.kube.routers import RouterFleet
from shoal.operator.kube.verdicts import incomplete_status, unreadable_status
from shoal.operator.kube.world import Key, World, uid_of
from shoal.operator.observe import Observed
from shoal.operator.plan import Plan, plan
from shoal.operator.platform import Platform
from shoal.operator.scaler import Scalers
from shoal.operator.swapper import Swapper
from shoal.operator.trials import Trials

log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What holds for every service."""

    platform: Platform
    url: str | None  # of the OpenAI API
    knows: Callable[[Kind], bool]  # whether the cluster knows an optional kind
    wall: Callable[[], float]
    crowd: Callable[[], bool]  # whether many services have something to be done
    scaler_address: str = ""  # where KEDA finds the operator


class Reconciler:
    """Brings the cluster nearer to what is wanted, one service at a time."""

    def __init__(
        self,
        world: World,
        book: ServiceBook,
        applier: Applier,
        fleet: RouterFleet,
        progress: FetchProgress,
        events: EventPoster,
        scalers: Scalers,
        trials: Trials,
        starts: ColdStarts,
        swapper: Swapper,
        around: Surroundings,
    ) -> None:
        self._world = world
        self._book = book
        self._applier = applier
        self._fleet = fleet
        self._progress = progress
        self._events = events
        self._around = around
        self._rejected: dict[str, tuple[int, str]] = {}  # by service: generation, sentence
        self._scalers = scalers
        self._trials = trials
        self._starts = starts
        self._swapper = swapper

    async def reconcile(self, key: str) -> Next:
        """Looks at the service `namespace/name` once. ApiError where the API server did not do
        its part."""
        where = Key(*key.split("/", 1))
        live = self._world[INFERENCE_SERVICES].get(*where)
        entry = self._book.get(key)
        if live is None or entry is None:
            # Owner references take everything along; what is being deleted is not mended.
            self._fleet.under_way(key, False)
            self._fleet.scales(key, False)
            self._scalers.forget(key)
            self._trials.forget(key)
            self._swapper.keep(key, ())
            self._starts.forget(key)
            self._progress.follow(key, ())
            self._rejected.pop(key, None)
            return Next()
        if entry.service is None:
            await self._tell_unreadable(where, entry)
            return Next()
        return await self._act(where, key, entry.service)

    async def _act(self, where: Key, key: str, service: InferenceService) -> Next:
        observed = self._observe(where, key, service)
        decided = self._plan(service, observed)
        self._fleet.under_way(key, waits_for_routers(observed, decided))
        self._fleet.scales(key, observed.scaling is not None or observed.trial is not None)
        platform, around = self._around.platform, self._around
        wait = patience(service, observed, decided, around.wall(), crowd=around.crowd())
        if wait is not None and not decided.actions:
            return Next(after=wait)
        outcome = await carry_out(
            self._applier,
            service,
            decided.actions,
            desired_children(
                service,
                observed,
                monitors=self._around.knows(POD_MONITORS),
                pods=platform.pods,
                drivers=platform.drivers,
                scaler_address=self._around.scaler_address,
            ),
            group_token=platform.multi_node and needs_group_token(service, observed, platform.pods),
        )
        news = self._note_rejection(key, service, outcome)
        if wait is not None and outcome == Outcome(acted=True):
            return Next(after=wait)
        if outcome.error is None and (news or leads_on(observed, decided, outcome)):
            # What was done is seen already, and there may be more to do. The look that finds
            # nothing more tells how it stands.
            return Next(acted=True)
        await self._tell(where, service, observed, self._status(observed, decided, outcome))
        if outcome.error is not None:
            raise outcome.error
        return next_look(observed, decided, outcome)

    def _status(
        self, observed: Observed, decided: Plan, outcome: Outcome
    ) -> InferenceServiceStatus:
        if outcome.missing is None:
            return decided.status
        return incomplete_status(
            observed.status, decided.status, outcome.missing, self._around.wall()
        )

    def _observe(self, where: Key, key: str, service: InferenceService) -> Observed:
        live = self._world[INFERENCE_SERVICES].get(*where)
        assert live is not None, "nothing was awaited since it was found"
        self._progress.follow(key, self._world[PODS].of(key))
        generation, sentence = self._rejected.get(key, (None, None))
        observed = observe(
            self._world,
            key,
            live,
            routers=self._fleet.views(key),
            silent_routers=self._fleet.silent(),
            claims=self._book.claims(key),
            url=self._around.url,
            progress=self._progress.lines,
        )
        same = generation == service.metadata.generation
        self._swapper.keep(key, [pod.name for pod in observed.pods])
        swaps = self._swapper.views(key)
        observed = replace(observed, rejected=sentence if same else None, swaps=swaps)
        now = self._around.wall()
        observed = replace(observed, scaling=self._scalers.look(key, service, observed, now))
        observed = replace(observed, cold_start=self._starts.look(key, observed, now))
        return replace(observed, trial=self._trials.look(key, service, observed, now))

    def _plan(self, service: InferenceService, observed: Observed) -> Plan:
        return plan(service, observed, self._around.wall(), self._around.platform)

    def _note_rejection(self, key: str, service: InferenceService, outcome: Outcome) -> bool:
        """Remembers what was refused, for the next plans; whether that is news for the status."""
        before = self._rejected.get(key)
        if outcome.rejected is not None:
            now = service.metadata.generation or 0, outcome.rejected
            self._rejected[key] = now
            if before != now:
                log.warning("%s: %s", key, outcome.rejected)
            return before != now
        if outcome.error is None and outcome.again is None:
            return self._rejected.pop(key, None) is not None
        return False

    async def _tell(
        self,
        where: Key,
        service: InferenceService,
        observed: Observed,
        status: InferenceServiceStatus,
    ) -> None:
        """Writes the status where it differs, and posts what changed."""
        uid = service.metadata.uid or ""
        for notice in pod_news(observed.pods):
            self._events.say(where, uid, notice)
        if status == observed.status:
            return
        await self._write(where, uid, status)
        for notice in news(observed.status, status):
            self._events.say(where, uid, notice)

    async def _tell_unreadable(self, where: Key, entry: Entry) -> None:
        live = self._world[INFERENCE_SERVICES].get(*where)
        if live is None:
            return
        before = read_status(live)
        status = unreadable_status(before, entry.problem, entry.generation, self._around.wall())
        if status != before:
            await self._write(where, entry.uid, status)
            for notice in news(before, status):
                self._events.say(where, entry.uid, notice)

    async def _write(self, where: Key, uid: str, status: InferenceServiceStatus) -> None:
        live = self._world[INFERENCE_SERVICES].get(*where)
        if live is None or uid_of(live) != uid:
            return  # gone meanwhile, or another of the same name
        document = status.model_dump(by_alias=True, mode="json", exclude_none=True)
        await self._applier.write_status(live, document)
