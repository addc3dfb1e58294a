"""Carries out one action of a plan, or brings one child about; never a write that changes nothing.

Objects are created where they are not there, and changed by server-side apply where they differ.
Answers go into the world at once, so that the next plan sees what this one did. An object that
somebody else made under a name of ours is left alone, and one that an earlier service of the same
name left behind is waited for: its owner is gone and the cluster collects it.
"""

import logging
import secrets
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, NoReturn

from shoal.api.names import ANNOTATION_DRAIN_STARTED, ANNOTATION_SERVES, LABEL_MANAGED_BY, MANAGER
from shoal.api.types import InferenceService
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
from shoal.operator.children import (
    controller_revision,
    group_token_secret,
    routes_config_map,
)
from shoal.operator.inplace import mark_of
from shoal.operator.kube.client import Api
from shoal.operator.kube.errors import ApiError
from shoal.operator.kube.feed import Feed
from shoal.operator.kube.kinds import (
    AUTOSCALERS,
    CONFIG_MAPS,
    CONTROLLER_REVISIONS,
    DISRUPTION_BUDGETS,
    INFERENCE_SERVICES,
    POD_MONITORS,
    PODS,
    SCALED_OBJECTS,
    SECRETS,
    SERVICES,
    Kind,
    kind_of,
)
from shoal.operator.kube.subset import is_subset
from shoal.operator.kube.world import Key, World, controller_uid, uid_of
from shoal.operator.metadata import (
    controller_revision_name,
    group_token_name,
    metadata,
    routes_name,
)
from shoal.operator.podstate import drain_started

log: Final = logging.getLogger(__name__)

_LONGEST_WORDS: Final = 500  # characters of the API server's words in a condition
_COLLECTION_SECONDS: Final = 1.0  # the cluster takes a moment to collect what lost its owner

# Nobody misses these for a moment.
_REPLACEABLE: Final = (SERVICES, DISRUPTION_BUDGETS, POD_MONITORS, AUTOSCALERS, SCALED_OBJECTS)
# What a service may have today and not tomorrow.
_PRUNED: Final = (DISRUPTION_BUDGETS, AUTOSCALERS, SCALED_OBJECTS)

Json = Mapping[str, Any]


class Refused(Exception):
    """The API server will not have it, or a name is taken; the sentence says what to change."""


class NotYet(Exception):
    """Something has to end first; look again in `seconds`."""

    def __init__(self, why: str, seconds: float = _COLLECTION_SECONDS) -> None:
        super().__init__(why)
        self.seconds = seconds


class Applier:
    """Writes for services. ApiError passes through where trying again may help."""

    def __init__(
        self,
        api: Api,
        world: World,
        feed: Feed,
        wall: Callable[[], float],
        swap: Callable[[str, SwapWeights], None],
    ) -> None:
        """`swap` begins to swap the weights of a replica of the service `namespace/name`."""
        self._swap = swap
        self._api = api
        self._world = world
        self._feed = feed
        self._wall = wall

    async def ensure(self, document: Json) -> bool:
        """Brings an object about; whether a write was needed."""
        kind, meta = kind_of(document), document["metadata"]
        live: Json | None = self._world[kind].get(meta["namespace"], meta["name"])
        if live is not None and controller_uid(live) != controller_uid(document):
            # Of an earlier service, or an orphan; it may have gone without our noticing.
            await self._refresh(kind, live)
            live = self._world[kind].get(meta["namespace"], meta["name"])
        if live is None:
            live = await self._create(kind, document)
            if is_subset(document, live):
                return True
        self._check_owner(kind, document, live)
        if is_subset(document, live):
            return False
        try:
            self._feed.wrote(kind, await self._api.apply(kind, document))
        except ApiError as error:
            if error.status == 422 and kind in _REPLACEABLE:
                # A field that cannot change, or two that exclude each other.
                await self._delete(kind, meta["namespace"], meta["name"])
                raise NotYet(f"{kind.kind} {meta['name']} is made anew", 0.1) from None
            _raise_refused(kind, meta["name"], error)
        return True

    async def prune(self, service: InferenceService, children: Collection[Json]) -> None:
        """Deletes budgets and autoscalers of the service that are not among its children now."""
        kept = {(child["kind"], child["metadata"]["name"]) for child in children}
        for kind in _PRUNED:
            for live in self._world[kind].of(f"{service.metadata.namespace}/{service.name}"):
                meta = live["metadata"]
                ours = controller_uid(live) == service.metadata.uid
                if ours and (kind.kind, meta["name"]) not in kept:
                    await self._delete(kind, meta["namespace"], meta["name"])

    async def adopt(self, service: InferenceService) -> bool:
        """Takes in pods and records whose owner was deleted without them; whether there were any.

        That is what `kubectl delete --cascade=orphan` leaves, for a service of the same name.
        """
        found = False
        for kind in (PODS, CONTROLLER_REVISIONS):
            orphans = [
                live
                for live in self._world[kind].of(f"{service.metadata.namespace}/{service.name}")
                if controller_uid(live) is None and not live["metadata"].get("deletionTimestamp")
            ]
            for live in orphans:
                found = True
                owners = metadata(service, live["metadata"]["name"], {})["ownerReferences"]
                await self._merge(kind, live, {"ownerReferences": owners})
        return found

    async def perform(self, service: InferenceService, action: Action) -> None:
        """Carries out one action. Doing it twice is as doing it once."""
        namespace = service.metadata.namespace
        match action:
            case CreatePod(pod):
                await self._create(PODS, pod.manifest)
            case DrainPod(name):
                await self._mark(service, name, self._wall())
            case ResumePod(name):
                await self._mark(service, name, None)
            case SwapWeights():
                self._swap(str(Key(namespace, service.name)), action)
            case MarkServed(name, revision, restarts):
                await self._mark_served(service, name, mark_of(revision, restarts))
            case DeletePod(name, grace):
                await self._delete(PODS, namespace, name, round(grace))
            case WriteRoutes(table):
                await self.ensure(routes_config_map(service, table))
            case RemoveRoutes():
                await self._delete(CONFIG_MAPS, namespace, routes_name(service.name))
            case SaveRevision(revision):
                document = controller_revision(service, revision)
                await self._create(CONTROLLER_REVISIONS, document)
            case ForgetRevision(name):
                record = controller_revision_name(service.name, name)
                await self._delete(CONTROLLER_REVISIONS, namespace, record)

    async def write_status(self, service_live: Json, status: Json) -> None:
        meta = service_live["metadata"]
        document = {
            "apiVersion": INFERENCE_SERVICES.api_version,
            "kind": INFERENCE_SERVICES.kind,
            "metadata": {"name": meta["name"], "namespace": meta["namespace"]},
            "status": status,
        }
        answer = await self._api.apply(INFERENCE_SERVICES, document, "status")
        self._feed.wrote(INFERENCE_SERVICES, answer)

    async def ensure_group_token(self, service: InferenceService) -> None:
        """The secret that pods of a group share; to be called before they are made."""
        name, namespace = group_token_name(service.name), service.metadata.namespace
        document = group_token_secret(service, secrets.token_hex(32))
        live = await self._look(SECRETS, namespace, name)
        if live is None:
            try:
                await self._api.create(SECRETS, document)
            except ApiError as error:
                if error.exists:
                    raise NotYet(f"secret {name} has just been made") from None
                _raise_refused(SECRETS, name, error)
        else:
            self._check_owner(SECRETS, document, live)

    async def _create(self, kind: Kind, document: Json) -> Json:
        """Makes an object; where the name is taken, what is there if it is ours."""
        meta = document["metadata"]
        try:
            live: Json | None = await self._api.create(kind, document)
        except ApiError as error:
            if not error.exists:
                _raise_refused(kind, meta["name"], error)
            live = await self._look(kind, meta["namespace"], meta["name"])
            if live is None:
                raise NotYet(f"{kind.kind} {meta['name']} has just ended") from None
            self._check_owner(kind, document, live)
        assert live is not None, "it was made or found"
        self._feed.wrote(kind, live)
        return live

    async def _mark(self, service: InferenceService, name: str, started: float | None) -> None:
        """Sets the drain mark or takes it off; one that stands keeps its time."""
        live = self._world[PODS].get(service.metadata.namespace, name)
        if live is None or (drain_started(live) is None) is (started is None):
            return
        value = None if started is None else f"{started:.3f}"
        # Of just the version that is known: a mark that is news stands, too.
        version = live["metadata"].get("resourceVersion")
        changes = {"resourceVersion": version, "annotations": {ANNOTATION_DRAIN_STARTED: value}}
        await self._merge(PODS, live, changes)

    async def _mark_served(self, service: InferenceService, name: str, mark: str) -> None:
        live = self._world[PODS].get(service.metadata.namespace, name)
        if live is not None:
            await self._merge(PODS, live, {"annotations": {ANNOTATION_SERVES: mark}})

    async def _merge(self, kind: Kind, live: Json, changes: Json) -> None:
        """Patches the metadata of just this object; one that is gone needs nothing any more."""
        meta = live["metadata"]
        patch = {"metadata": {"uid": uid_of(live), **changes}}
        try:
            answer = await self._api.merge(kind, meta["namespace"], meta["name"], patch)
        except ApiError as error:
            if not error.not_found and not error.conflict:
                _raise_refused(kind, live["metadata"]["name"], error)
            await self._refresh(kind, live)
            return
        self._feed.wrote(kind, answer)

    async def _delete(
        self, kind: Kind, namespace: str, name: str, grace: int | None = None
    ) -> None:
        live = self._world[kind].get(namespace, name)
        if live is None:
            return
        try:
            answer = await self._api.delete(kind, namespace, name, uid_of(live), grace)
        except ApiError as error:
            if not error.not_found and not error.conflict:
                _raise_refused(kind, live["metadata"]["name"], error)
            await self._refresh(kind, live)
            return
        if answer.get("kind") == kind.kind and answer["metadata"].get("deletionTimestamp"):
            self._feed.wrote(kind, answer)  # it ends in its own time
        else:
            self._feed.ended(kind, live)

    async def _refresh(self, kind: Kind, live: Json) -> None:
        """Reads an object that is not what the world holds."""
        meta = live["metadata"]
        now = await self._look(kind, meta["namespace"], meta["name"])
        if now is not None and uid_of(now) == uid_of(live):
            self._feed.wrote(kind, now)
        else:
            self._feed.ended(kind, live)
            if now is not None:
                self._feed.wrote(kind, now)

    async def _look(self, kind: Kind, namespace: str, name: str) -> Json | None:
        try:
            return await self._api.get(kind, namespace, name)
        except ApiError as error:
            if error.not_found:
                return None
            raise

    def _check_owner(self, kind: Kind, document: Json, live: Json) -> None:
        """That the object is ours, or an orphan that carries our label."""
        name, owner = live["metadata"]["name"], controller_uid(live)
        if owner == controller_uid(document):
            return
        labels = live["metadata"].get("labels") or {}
        if labels.get(LABEL_MANAGED_BY) != MANAGER:
            raise Refused(
                f"there is a {kind.kind} {name} that Shoal did not make; "
                f"rename or delete it, or give the InferenceService another name"
            )
        if owner is not None:
            raise NotYet(f"{kind.kind} {name} belongs to an earlier service of that name")


def _raise_refused(kind: Kind, name: str, error: ApiError) -> NoReturn:
    if kind is SCALED_OBJECTS and error.not_found and not error.message.startswith("namespaces"):
        raise Refused(
            f"the cluster knows no {kind.kind} ({kind.api_version}); install KEDA, "
            "or choose another spec.autoscaling.driver"
        ) from None
    if error.refused:
        said = error.message[:_LONGEST_WORDS]
        raise Refused(f"the API server refuses {kind.kind} {name}: {said}") from None
    raise error
