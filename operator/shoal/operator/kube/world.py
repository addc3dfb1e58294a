"""What the operator knows of the cluster: live objects by kind and by service, in memory.

Watches feed it, answers to the operator's own writes too (so that it reads what it wrote), and a
list now and then takes out what a watch lost. All three may come late and in any order; the
resource version decides (ordered numbers within a cluster, KEP-5504), and the version of a
deletion is kept until the next list, so that a late answer does not raise the dead.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import orjson

from shoal.api.names import LABEL_SERVICE
from shoal.operator.kube.kinds import INFERENCE_SERVICES, LISTED, OPTIONAL, Kind

_DROPPED_ANNOTATION: Final = "kubectl.kubernetes.io/last-applied-configuration"

Json = dict[str, Any]


class Key(NamedTuple):
    """A namespaced object of some kind."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class _Kept(NamedTuple):
    """One object. Text takes a quarter of the memory of what it stands for, and is read only
    when its service is looked at."""

    version: int
    service: str | None  # whose it is, by label
    text: bytes


class Objects:
    """Live objects of one kind."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self._objects: dict[Key, _Kept] = {}
        self._by_service: dict[str, set[Key]] = {}
        self._dead: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._objects)

    def __iter__(self) -> Iterator[Json]:
        return (orjson.loads(kept.text) for kept in self._objects.values())

    def get(self, namespace: str, name: str) -> Json | None:
        kept = self._objects.get(Key(namespace, name))
        return None if kept is None else orjson.loads(kept.text)

    def of(self, service: str) -> list[Json]:
        """Those that belong to the service `namespace/name`, by label, in the order of names."""
        keys = sorted(self._by_service.get(service, ()))
        return [orjson.loads(self._objects[key].text) for key in keys]

    def put(self, live: Mapping[str, Any]) -> str | None:
        """A newer state of an object; returns its service, None where it is no news."""
        key, version = _key(live), version_of(live)
        known = self._objects.get(key)
        if known is not None and known.version >= version:
            return None
        if self._dead.get(key, -1) >= version:
            return None
        self._remove(key)
        service = self.service_of(live)
        self._objects[key] = _Kept(version, service, _text(live))
        if service is not None:
            self._by_service.setdefault(service, set()).add(key)
        return service

    def drop(self, gone: Mapping[str, Any]) -> str | None:
        """An object's end, as of its resource version; returns its service, None where no news."""
        return self.drop_key(_key(gone), version_of(gone))

    def drop_key(self, key: Key, version: int) -> str | None:
        """As `drop`, by name."""
        self._dead[key] = max(version, self._dead.get(key, -1))
        known = self._objects.get(key)
        if known is None or known.version > version:
            return None
        self._remove(key)
        return known.service

    def missing_from(
        self, listed: Mapping[Key, int], version: int, namespace: str | None
    ) -> list[Key]:
        """Objects that a list of `version`, of one namespace or of all, does not have."""
        return [
            key
            for key, kept in self._objects.items()
            if key not in listed and kept.version <= version and namespace in (None, key.namespace)
        ]

    def outdated_by(self, listed: Mapping[Key, int]) -> list[Key]:
        """Keys of which a list holds something newer."""
        found = []
        for key, version in listed.items():
            known = self._objects.get(key)
            newest = known.version if known is not None else self._dead.get(key, -1)
            if newest < version:
                found.append(key)
        return found

    def forget_deaths(self, version: int) -> None:
        """After a list of `version` older deletions need not be remembered."""
        self._dead = {key: died for key, died in self._dead.items() if died > version}

    def service_of(self, live: Mapping[str, Any]) -> str | None:
        meta = live["metadata"]
        if self.kind is INFERENCE_SERVICES:
            return f"{meta['namespace']}/{meta['name']}"
        name = (meta.get("labels") or {}).get(LABEL_SERVICE)
        return None if name is None else f"{meta['namespace']}/{name}"

    def _remove(self, key: Key) -> None:
        before = self._objects.pop(key, None)
        if before is None or before.service is None:
            return
        mine = self._by_service[before.service]
        mine.discard(key)
        if not mine:
            del self._by_service[before.service]


class World:
    """Everything that is kept in memory."""

    def __init__(self) -> None:
        self._kinds: Mapping[Kind, Objects] = MappingProxyType(
            {kind: Objects(kind) for kind in (*LISTED, *OPTIONAL)}
        )
        self._nodes: dict[str, bool] = {}

    def __getitem__(self, kind: Kind) -> Objects:
        return self._kinds[kind]

    def keeps(self, kind: Kind) -> bool:
        """Whether objects of this kind are remembered."""
        return kind in self._kinds

    @property
    def nodes(self) -> Mapping[str, bool]:
        """By name, whether a node answers; those never seen are not named."""
        return self._nodes

    def put_node(self, node: Mapping[str, Any]) -> bool:
        """A node's state; whether its readiness is news."""
        name, ready = node["metadata"]["name"], _node_ready(node)
        news = self._nodes.get(name, True) is not ready  # an unknown one counts as answering
        self._nodes[name] = ready
        return news

    def drop_node(self, name: str) -> bool:
        """A node is gone; pods that say they run there do not."""
        news = self._nodes.get(name, True)
        self._nodes[name] = False
        return news


def version_of(live: Mapping[str, Any]) -> int:
    return version_number(live["metadata"].get("resourceVersion") or "")


def version_number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def uid_of(live: Mapping[str, Any]) -> str:
    uid: str = live["metadata"]["uid"]
    return uid


def controller_uid(live: Mapping[str, Any]) -> str | None:
    """The uid of the object that owns this one; None for an orphan."""
    owners = live["metadata"].get("ownerReferences") or ()
    return next((owner["uid"] for owner in owners if owner.get("controller")), None)


def _key(live: Mapping[str, Any]) -> Key:
    return Key(live["metadata"]["namespace"], live["metadata"]["name"])


def _text(live: Mapping[str, Any]) -> bytes:
    """The object as JSON, without what nobody reads."""
    meta = {key: value for key, value in live["metadata"].items() if key != "managedFields"}
    if _DROPPED_ANNOTATION in (meta.get("annotations") or {}):
        meta["annotations"] = {
            key: value for key, value in meta["annotations"].items() if key != _DROPPED_ANNOTATION
        }
    # orjson's own result keeps a buffer of several times its size; the copy does not.
    return bytes(memoryview(orjson.dumps({**live, "metadata": meta})))


def _node_ready(node: Mapping[str, Any]) -> bool:
    conditions = (node.get("status") or {}).get("conditions") or ()
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
