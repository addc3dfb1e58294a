"""One streamed chat answer over HTTP, timed: what the demo asks."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx


class ChatFailed(Exception):
    """The request got no whole answer; the message says what came instead."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, and when. Times are in seconds from the sending of the request."""

    text: str
    tokens: int  # generated, as the server counts them
    first: float  # time to first token
    total: float

    @property
    def tokens_per_second(self) -> float:
        """The pace after the first token; 0 where there was only one."""
        return (self.tokens - 1) / (self.total - self.first) if self.total > self.first else 0.0


def stream_chat(
    client: httpx.Client,
    model: str,
    prompt: str,
    max_tokens: int,
    on_text: Callable[[str], None],
    clock: Callable[[], float] = time.perf_counter,
) -> Answer:
    """Asks `model` and hands on the answer's text as it arrives. Raises ChatFailed."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    parts: list[str] = []
    first: float | None = None
    tokens: int | None = None
    started = clock()
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise ChatFailed(_refusal(response))
            for event in _events(response):
                if "error" in event:
                    raise ChatFailed(f"the stream broke off: {event['error'].get('message')}")
                for choice in event.get("choices", ()):
                    text = choice.get("delta", {}).get("content")
                    if text:
                        first = clock() if first is None else first
                        parts.append(text)
                        on_text(text)
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
    except httpx.HTTPError as error:
        raise ChatFailed(f"{type(error).__name__}: {error}") from error
    ended = clock()
    if first is None or tokens is None:
        raise ChatFailed("the stream ended without an answer")
    return Answer("".join(parts), tokens, first - started, ended - started)


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events, until [DONE]."""
    for line in response.iter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def _refusal(response: httpx.Response) -> str:
    text = response.read().decode(errors="replace")
    try:
        text = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        text = text[:300]
    return f"HTTP {response.status_code}: {text}"
