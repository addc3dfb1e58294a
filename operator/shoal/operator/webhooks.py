"""Asks somebody else about a canary: one bounded HTTP call at a time, beside the looks.

A look takes the last answer and begins the next question, so that no plan ever waits for one.
"""

import asyncio
import json
import logging
import urllib.request
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Final

from shoal.api.rollout import CanaryAnalysis
from shoal.operator.analysis import Opinion

log: Final = logging.getLogger(__name__)

_LONGEST_ANSWER: Final = 64 * 1024  # bytes
_LONGEST_MESSAGE: Final = 500  # characters

Post = Callable[[str, Mapping[str, Any], float], Awaitable[Opinion | None]]


@dataclass(slots=True)
class _Asked:
    revision: str
    began: float
    task: "asyncio.Task[None]"
    opinion: Opinion | None = None
    came: float = 0.0


class Webhooks:
    """The questions of one process; used in one event loop."""

    def __init__(self, clock: Callable[[], float], post: Post | None = None) -> None:
        self._clock = clock
        self._post = post or post_question
        self._asked: dict[str, _Asked] = {}

    def opinion(
        self, key: str, spec: CanaryAnalysis, question: Mapping[str, Any]
    ) -> Opinion | None:
        """What was said lately of the revision that `question` names; None: nothing yet, or
        nothing any more. Asks again where it is time to."""
        hook, now = spec.webhook, self._clock()
        if hook is None:
            return None
        asked = self._asked.get(key)
        if asked is not None and asked.revision != question["revision"]:
            self.forget(key)
            asked = None
        due = asked is None or (asked.task.done() and now >= asked.began + spec.interval_seconds)
        if due:
            before = asked
            task = asyncio.create_task(self._ask(key, hook.url, hook.timeout_seconds, question))
            asked = self._asked[key] = _Asked(str(question["revision"]), now, task)
            if before is not None:
                asked.opinion, asked.came = before.opinion, before.came
        assert asked is not None
        fresh = now <= asked.came + 2 * spec.interval_seconds + hook.timeout_seconds
        return asked.opinion if fresh else None

    def forget(self, key: str) -> None:
        """Nothing of the service is on trial any more."""
        if (asked := self._asked.pop(key, None)) is not None:
            asked.task.cancel()

    def clear(self) -> None:
        """Somebody else asks from here on."""
        for key in list(self._asked):
            self.forget(key)

    async def _ask(self, key: str, url: str, seconds: float, question: Mapping[str, Any]) -> None:
        said = await self._post(url, question, seconds)
        asked = self._asked.get(key)
        if said is not None and asked is not None:
            asked.opinion, asked.came = said, self._clock()


async def post_question(url: str, question: Mapping[str, Any], seconds: float) -> Opinion | None:
    """One POST; None where the answer is none. Never raises for what the other side does."""
    try:
        async with asyncio.timeout(seconds + 1):
            return await asyncio.to_thread(_post, url, question, seconds)
    except (TimeoutError, OSError, ValueError, HTTPException) as error:
        log.warning("the canary's webhook %s gave no answer: %s", url, error)
        return None


def _post(url: str, question: Mapping[str, Any], seconds: float) -> Opinion | None:
    request = urllib.request.Request(
        url,
        data=json.dumps(question).encode(),
        headers={"Content-Type": "application/json", "User-Agent": "shoal-operator"},
        method="POST",
    )
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        if answer.status != 200:
            raise ValueError(f"status {answer.status}")
        document = json.loads(answer.read(_LONGEST_ANSWER))
    match document:
        case {"healthy": bool(healthy), **rest}:
            message = rest.get("message")
            said = message[:_LONGEST_MESSAGE] if isinstance(message, str) else ""
            return Opinion(healthy, said)
    raise ValueError('the answer has no "healthy": true or false')
