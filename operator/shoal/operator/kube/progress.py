"""How far downloads are: the last log line of the containers that fetch models."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from shoal.operator.kube.client import Api
from shoal.operator.kube.errors import ApiError
from shoal.operator.kube.world import Key, uid_of
from shoal.operator.podstate import fetching

log: Final = logging.getLogger(__name__)

_EVERY_SECONDS: Final = 5.0


class FetchProgress:
    """Reads the logs of pods that download right now, and of no others."""

    def __init__(self, api: Api, changed: Callable[[str], None]) -> None:
        """`changed(service)` hears of each service whose download said something new."""
        self._api = api
        self._changed = changed
        self._followed: dict[str, dict[str, tuple[Key, str]]] = {}  # service -> pod uid -> where
        self._lines: dict[str, str] = {}
        self._more = asyncio.Event()

    @property
    def lines(self) -> Mapping[str, str]:
        """By pod uid, what was said last."""
        return self._lines

    def follow(self, service: str, pods: Iterable[Mapping[str, Any]]) -> None:
        """The pods of a service as they are now: those that download are read from here on."""
        found = {}
        for pod in pods:
            if (container := fetching(pod)) is not None:
                meta = pod["metadata"]
                found[uid_of(pod)] = (Key(meta["namespace"], meta["name"]), container)
        for uid in self._followed.pop(service, {}).keys() - found.keys():
            self._lines.pop(uid, None)
        if found:
            self._followed[service] = found
            self._more.set()

    async def run(self) -> None:
        while True:
            for service, pods in list(self._followed.items()):
                for uid, (pod, container) in pods.items():
                    await self._read(service, uid, pod, container)
            if not self._followed:
                self._more.clear()
                await self._more.wait()
            await asyncio.sleep(_EVERY_SECONDS)

    async def _read(self, service: str, uid: str, pod: Key, container: str) -> None:
        try:
            line = await self._api.log_tail(pod.namespace, pod.name, container)
        except ApiError as error:
            log.debug("the log of %s cannot be read: %s", pod, error)
            return
        still = uid in self._followed.get(service, {})
        if still and line and self._lines.get(uid) != line:
            self._lines[uid] = line
            self._changed(service)
