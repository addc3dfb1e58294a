"""Events of the API server about services, posted beside the work and never in its way.

An event's name follows from what it says, so that two operators, or one that was started anew,
do not say it twice: where it exists it is left alone for a while, and then its count goes up.
"""

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any, Final

from shoal.api.names import API_VERSION, KIND, MANAGER
from shoal.operator.kube.client import Api
from shoal.operator.kube.errors import ApiError, NotLeading
from shoal.operator.kube.kinds import EVENTS
from shoal.operator.kube.news import Notice
from shoal.operator.kube.world import Key

log: Final = logging.getLogger(__name__)

_QUIET_SECONDS: Final = 300.0  # before the same words count again
_REMEMBERED: Final = 4096
_WAITING: Final = 1000
_PAUSE_SECONDS: Final = 0.05  # between two posts: 20 a second are enough for people
_LONGEST: Final = 1000  # characters of a message


@dataclass(slots=True)
class _Said:
    at: float
    count: int


class EventPoster:
    """A queue of notices; the oldest are dropped where people could not read them anyway."""

    def __init__(self, api: Api, identity: str, wall: Callable[[], float]) -> None:
        self._api = api
        self._identity = identity
        self._wall = wall
        self._waiting: deque[tuple[Key, str, Notice]] = deque(maxlen=_WAITING)
        self._said: OrderedDict[str, _Said] = OrderedDict()
        self._more = asyncio.Event()

    def say(self, service: Key, uid: str, notice: Notice) -> None:
        """Posts soon, unless the same was said a short while ago."""
        said = self._said.get(_name(service, uid, notice))
        if said is None or self._wall() - said.at >= _QUIET_SECONDS:
            self._remember(_name(service, uid, notice), said)
            self._waiting.append((service, uid, notice))
            self._more.set()

    async def run(self) -> None:
        while True:
            while self._waiting:
                service, uid, notice = self._waiting.popleft()
                try:
                    await self._post(service, uid, notice)
                except ApiError as error:
                    log.warning("event %s of %s was not posted: %s", notice.reason, service, error)
                except NotLeading:
                    self._waiting.clear()
                await asyncio.sleep(_PAUSE_SECONDS)
            self._more.clear()
            await self._more.wait()

    def _remember(self, name: str, said: _Said | None) -> None:
        self._said[name] = _Said(self._wall(), said.count + 1 if said is not None else 1)
        self._said.move_to_end(name)
        while len(self._said) > _REMEMBERED:
            self._said.popitem(last=False)

    async def _post(self, service: Key, uid: str, notice: Notice) -> None:
        name = _name(service, uid, notice)
        now = datetime.fromtimestamp(int(self._wall()), UTC).isoformat().replace("+00:00", "Z")
        said = self._said.get(name)
        if said is not None and said.count > 1:
            patch = {"count": said.count, "lastTimestamp": now}
            try:
                await self._api.merge(EVENTS, service.namespace, name, patch)
                return
            except ApiError as error:
                if not error.not_found:
                    raise
        try:
            await self._api.create(EVENTS, self._document(service, uid, notice, name, now))
        except ApiError as error:
            if not error.exists:
                raise

    def _document(
        self, service: Key, uid: str, notice: Notice, name: str, now: str
    ) -> dict[str, Any]:
        return {
            "apiVersion": EVENTS.api_version,
            "kind": EVENTS.kind,
            "metadata": {"name": name, "namespace": service.namespace},
            "involvedObject": {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "namespace": service.namespace,
                "name": service.name,
                "uid": uid,
            },
            "type": "Warning" if notice.warning else "Normal",
            "reason": notice.reason,
            "message": notice.message[:_LONGEST],
            "count": 1,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "source": {"component": MANAGER},
            "reportingComponent": f"serving.shoal.dev/{MANAGER}",
            "reportingInstance": self._identity,
        }


def _name(service: Key, uid: str, notice: Notice) -> str:
    text = "\0".join((uid, notice.reason, notice.message))
    return f"{service.name}.{blake2b(text.encode(), digest_size=8).hexdigest()}"
