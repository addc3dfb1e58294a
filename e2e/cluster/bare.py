"""What the API server costs alone: a service's objects, made by a loop that decides nothing.

The same requests for the same objects as an operator's, for as many services, in the order in which
they depend on each other. What an operator takes longer than that is its own.
"""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import orjson

from e2e.cluster import kwok, services
from e2e.cluster.direct import DirectApi
from e2e.cluster.kube import Object
from shoal.api.names import API_VERSION, KIND
from shoal.api.types import parse_document
from shoal.operator.actions import CreatePod, SaveRevision, WriteRoutes
from shoal.operator.children import controller_revision, desired_children, routes_config_map
from shoal.operator.observe import Observed, ObservedPod
from shoal.operator.plan import plan

_NAME: Final = "bare-name"
_UID: Final = "bare-uid"
_ADDRESS: Final = "10.244.0.1:9000"
_SERVICES: Final = "/apis/serving.shoal.dev/v1alpha1/namespaces/{}/inferenceservices"
_CORE: Final = "/api/v1/namespaces/{}/"
_REVISIONS: Final = "/apis/apps/v1/namespaces/{}/controllerrevisions"


@dataclass(frozen=True, slots=True)
class _Texts:
    """A service's objects as JSON, with a name and a uid to be replaced."""

    record: bytes
    pod: bytes
    names: bytes
    routes: bytes  # once the pod is there
    status: bytes

    def of(self, field: str, name: str, uid: str) -> Object:
        text: bytes = getattr(self, field)
        found: Object = orjson.loads(
            text.replace(_NAME.encode(), name.encode()).replace(_UID.encode(), uid.encode())
        )
        return found


async def make_all(api: DirectApi, namespace: str, count: int, at_once: int) -> float:
    """Seconds from the first service's creation to the last one's status."""
    texts = _texts(namespace)
    started_pods: dict[str, asyncio.Event] = {}
    room, began = asyncio.Semaphore(at_once), time.monotonic()

    async def begin(name: str) -> str:
        async with room:
            made = await api.create(_SERVICES.format(namespace), _service(name))
            uid = str(made["metadata"]["uid"])
            await api.create(_REVISIONS.format(namespace), texts.of("record", name, uid))
            pod = texts.of("pod", name, uid)
            started_pods[pod["metadata"]["name"]] = asyncio.Event()
            await api.create(_CORE.format(namespace) + "pods", pod)
        await started_pods[pod["metadata"]["name"]].wait()
        return uid

    async def end(name: str, uid: str) -> None:
        async with room:
            core = _CORE.format(namespace)
            await api.create(core + "configmaps", texts.of("routes", name, uid))
            await api.create(core + "services", texts.of("names", name, uid))
            status = texts.of("status", name, uid)
            await api.apply(f"{_SERVICES.format(namespace)}/{name}/status", status)

    async def follow() -> None:
        async for _, pod in api.watch(_CORE.format(namespace) + "pods", resourceVersion="0"):
            name = pod["metadata"]["name"]
            if pod.get("status", {}).get("podIP") and name in started_pods:
                started_pods[name].set()

    async def one(name: str) -> None:
        await end(name, await begin(name))

    following = asyncio.create_task(follow())
    try:
        await asyncio.gather(*(one(f"b{index:04}") for index in range(count)))
        return time.monotonic() - began
    finally:
        following.cancel()


def _service(name: str) -> Object:
    return services.fake_service(name, kwok.placement())


def _texts(namespace: str) -> _Texts:
    """By the planner's first and last plan for such a service."""
    document = _service(_NAME)
    document["metadata"] |= {"namespace": namespace, "uid": _UID, "generation": 1}
    service = parse_document(document)
    first = plan(service, Observed(), time.time())
    found = {type(action): action for action in first.actions}
    record, pod = found[SaveRevision], found[CreatePod]
    assert isinstance(record, SaveRevision)
    assert isinstance(pod, CreatePod)
    running = ObservedPod(
        pod.pod.name, pod.pod.revision, 0, time.time(), address=_ADDRESS, ready=True
    )
    observed = Observed(pods=(running,), revisions=(record.revision,))
    last = plan(service, observed, time.time())
    served = next(action for action in last.actions if isinstance(action, WriteRoutes))
    status = last.status.model_dump(by_alias=True, mode="json", exclude_none=True)
    return _Texts(
        *_dumped(
            controller_revision(service, record.revision),
            pod.pod.manifest,
            desired_children(service, observed, monitors=False)[0],
            routes_config_map(service, served.table),
            {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "metadata": {"name": _NAME, "namespace": namespace},
                "status": status,
            },
        )
    )


def _dumped(*documents: Any) -> Iterator[bytes]:
    return map(orjson.dumps, documents)
