"""One service on this machine: look, plan, act. The planner decides, this carries it out."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from shoal.api.types import (
    Condition,
    ConditionStatus,
    ConditionType,
    InferenceService,
    InferenceServiceStatus,
)
from shoal.operator.actions import (
    Action,
    CreatePod,
    DeletePod,
    DrainPod,
    ForgetRevision,
    MarkServed,
    RemoveRoutes,
    ResumePod,
    SaveRevision,
    SwapWeights,
    WriteRoutes,
)
from shoal.operator.coldstart import ColdStarts
from shoal.operator.local.pods import Pods
from shoal.operator.local.settings import Update
from shoal.operator.local.store import Store
from shoal.operator.observe import Claim, Observed, RouterView, ScalingView
from shoal.operator.plan import plan, plan_removal
from shoal.operator.platform import LOCAL
from shoal.operator.revision import Revision
from shoal.operator.scaler import Scalers
from shoal.operator.swapper import Swapper
from shoal.operator.trials import Trials
from shoal.operator.webhooks import Webhooks

# The conditions that are announced, each with the status that means trouble.
_TROUBLE = {
    ConditionType.READY: ConditionStatus.FALSE,
    ConditionType.PROGRESSING: ConditionStatus.FALSE,
    ConditionType.DEGRADED: ConditionStatus.TRUE,
}


_LOOK_ANYWAY_SECONDS = 10.0


class Reconciler:
    """Brings the machine nearer to what is wanted, one plan at a time."""

    def __init__(self, store: Store, pods: Pods, url: str, swapper: Swapper) -> None:
        self._store = store
        self._pods = pods
        self._url = url
        self._swapper = swapper
        self._resting: dict[str, tuple[object, float]] = {}
        self._scalers = Scalers()
        self._trials = Trials(LOCAL, Webhooks(time.monotonic))
        self._starts = ColdStarts()

    def reconcile(
        self,
        service: InferenceService,
        claims: tuple[Claim, ...],
        views: Mapping[str, RouterView] | None,
        now: float,
    ) -> tuple[bool, list[Update]]:
        """Whether anything was done, and the news of the service's conditions.

        `views` is what the router said last, None where it does not answer.
        """
        name = service.name
        scaling = self._scaling(service, views, now)
        observed = None
        trial = None
        if service.spec.rollout.canary is not None:
            observed = replace(self._observe(name, claims, views), scaling=scaling)
            trial = self._trials.look(name, service, observed, now)
        pods, swaps = self._pods.observed(name), self._swapper.views(name)
        inputs = (service, claims, self._routers(name, views), pods, scaling, trial, swaps)
        if self._rests(name, inputs, now):
            return False, []
        if observed is None:
            observed = replace(self._observe(name, claims, views), scaling=scaling)
        start = self._starts.look(name, observed, now)
        observed = replace(observed, trial=trial, cold_start=start)
        decided = plan(service, observed, now, LOCAL)
        for action in decided.actions:
            self._perform(name, action)
        document = decided.status.model_dump(by_alias=True, mode="json", exclude_none=True)
        self._store.write_status(name, document)
        waits = any(pod.retiring for pod in observed.pods)
        if not decided.actions and not waits and decided.status == observed.status:
            soon = min(_LOOK_ANYWAY_SECONDS, decided.again or _LOOK_ANYWAY_SECONDS)
            self._resting[name] = (inputs, now + soon)
        return bool(decided.actions), _news(name, observed.status, decided.status)

    def due(self, now: float) -> bool:
        """Whether time alone is a reason to look at a service again."""
        return any(now >= until for _, until in self._resting.values())

    def remove(self, name: str, views: Mapping[str, RouterView] | None, now: float) -> bool:
        """Drains and ends what runs for a service that nobody wants; whether it is all gone."""
        observed = self._observe(name, (), views)
        actions = plan_removal(observed, now)
        for action in actions:
            self._perform(name, action)
        if actions or observed.pods:
            return False
        self._store.forget(name)
        self._scalers.forget(name)
        self._trials.forget(name)
        self._starts.forget(name)
        return True

    def _rests(self, name: str, inputs: object, now: float) -> bool:
        """Whether the last plan for the same inputs found nothing to do, a short while ago.

        The plan is a function of what was observed, so at rest it need not be asked again; from
        time to time it is, in case somebody changed a file of ours.
        """
        before, until = self._resting.pop(name, (None, 0.0))
        if before != inputs or now >= until:
            return False
        self._resting[name] = (before, until)
        return True

    def _scaling(
        self, service: InferenceService, views: Mapping[str, RouterView] | None, now: float
    ) -> ScalingView | None:
        """What the autoscaler wants, without a look at the disk once it has begun."""
        name = service.name
        if service.spec.autoscaling is None:
            self._scalers.forget(name)
            return None
        known = self._scalers.wanted(name) is not None
        observed = Observed(
            pods=self._pods.observed(name),
            routers=self._routers(name, views),
            status=_read_status(None if known else self._store.status(name)),
        )
        return self._scalers.look(name, service, observed, now)

    def _routers(self, name: str, views: Mapping[str, RouterView] | None) -> tuple[RouterView, ...]:
        # A router that answers but does not know the service acts on no table of it.
        return () if views is None else (views.get(name, RouterView(0)),)

    def _observe(
        self, name: str, claims: tuple[Claim, ...], views: Mapping[str, RouterView] | None
    ) -> Observed:
        pods = self._pods.observed(name)
        self._swapper.keep(name, [pod.name for pod in pods])
        return Observed(
            pods=pods,
            swaps=self._swapper.views(name),
            routers=self._routers(name, views),
            table=self._store.routes(name),
            revisions=tuple(self._revisions(name).values()),
            status=_read_status(self._store.status(name)),
            claims=claims,
            url=f"{self._url}/v1",
        )

    def _perform(self, service: str, action: Action) -> None:
        match action:
            case CreatePod(pod):
                self._pods.create(service, pod)
            case DrainPod(name):
                self._pods.mark_draining(name, True)
            case ResumePod(name):
                self._pods.mark_draining(name, False)
            case SwapWeights():
                self._swapper.begin(service, action)
            case MarkServed(name, revision, restarts):
                self._pods.mark_served(name, revision, restarts)
            case DeletePod(name, grace):
                self._pods.delete(name, grace)
            case WriteRoutes(table):
                self._store.write_routes(table)
            case RemoveRoutes():
                self._store.remove_routes(service)
            case SaveRevision(kept):
                self._write(service, {**self._revisions(service), kept.name: kept})
            case ForgetRevision(name):
                others = self._revisions(service)
                others.pop(name, None)
                self._write(service, others)

    def _revisions(self, service: str) -> dict[str, Revision]:
        found = {}
        for name, document in self._store.revisions(service).items():
            try:
                found[name] = Revision.from_document(document)
            except (ValueError, KeyError, TypeError):
                continue  # of a release whose fields differ: its pods cannot be made again
        return found

    def _write(self, service: str, revisions: Mapping[str, Revision]) -> None:
        documents = {name: revision.to_document() for name, revision in revisions.items()}
        self._store.write_revisions(service, documents)


def _read_status(document: dict[str, Any] | None) -> InferenceServiceStatus:
    try:
        return InferenceServiceStatus.model_validate(document or {})
    except ValidationError:
        return InferenceServiceStatus()


def _news(name: str, before: InferenceServiceStatus, after: InferenceServiceStatus) -> list[Update]:
    """A line for each condition that people care about and that changed its mind."""
    news = []
    for kind, trouble in _TROUBLE.items():
        old, new = before.condition(kind), after.condition(kind)
        if new is None or _same(old, new):
            continue
        wrong = new.status is trouble
        if old is None and wrong is (kind is not ConditionType.DEGRADED):
            continue  # a new service is not ready yet, and not degraded: no news
        said = f"{new.reason}: {new.message}" if new.message else new.reason
        line = f"{kind}={new.status} ({said})"
        news.append(Update("service", name, line, "warning" if wrong else "info"))
    return news


def _same(old: Condition | None, new: Condition) -> bool:
    """Whether nothing is worth a line: while a service is not ready its reason may change often."""
    if old is None or old.status is not new.status:
        return False
    return old.reason == new.reason or new.type is ConditionType.READY
