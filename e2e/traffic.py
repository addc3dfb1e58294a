"""Clients that ask one service for short answers for as long as they are let, and what they met."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import httpx


@dataclass(frozen=True)
class Answer:
    """One request as its client saw it."""

    at: float  # Unix seconds, when it was sent
    status: int  # 0: no answer came
    revision: str  # that answered; "" where none is named
    first: float  # seconds to the first token
    prompt: str
    text: str
    error: str = ""

    @property
    def good(self) -> bool:
        return self.status == 200 and not self.error


class Traffic:
    """`streams` clients, each with one request after the other: always another one, or the same
    `prompts` in turn."""

    def __init__(
        self, url: str, model: str, streams: int, tokens: int = 6, prompts: int | None = None
    ) -> None:
        self.answers: list[Answer] = []
        self._url, self._model, self._tokens, self._prompts = url, model, tokens, prompts
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask_on, args=(number,)) for number in range(streams)
        ]

    @contextmanager
    def running(self) -> Iterator["Traffic"]:
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()

    def since(self, at: float) -> list[Answer]:
        return [answer for answer in list(self.answers) if answer.at >= at]

    def failed(self, but: Sequence[str] = ()) -> list[Answer]:
        """Requests that went wrong, of all revisions but these."""
        return [a for a in list(self.answers) if not a.good and a.revision not in but]

    def undisturbed(self, revision: str) -> dict[str, str]:
        """What this revision answers to each prompt that was asked, while nothing happens."""
        prompts = {answer.prompt for answer in self.answers}
        with httpx.Client(timeout=60, headers={"x-shoal-revision": revision}) as client:
            answers = [self._ask(client, prompt) for prompt in sorted(prompts)]
        assert all(one.good and one.revision == revision for one in answers), answers
        return {one.prompt: one.text for one in answers}

    def _ask_on(self, number: int) -> None:
        with httpx.Client(timeout=60) as client:
            for turn in count(1):
                if self._stop.is_set():
                    return
                asked = turn % self._prompts if self._prompts else turn
                self.answers.append(self._ask(client, f"{number}, {asked},"))

    def _ask(self, client: httpx.Client, prompt: str) -> Answer:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": self._tokens,
            "temperature": 0,
            "stream": True,
        }
        began, sent, first, text, error = time.monotonic(), time.time(), 0.0, "", ""
        status, revision = 0, ""
        try:
            with client.stream("POST", f"{self._url}/v1/completions", json=body) as answer:
                status = answer.status_code
                revision = answer.headers.get("x-shoal-revision", "")
                for line in answer.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    first = first or time.monotonic() - began
                    if "error" in event:
                        error = str(event["error"])
                    else:
                        text += event["choices"][0]["text"] if event["choices"] else ""
        except httpx.HTTPError as broken:
            error = repr(broken)
        return Answer(sent, status, revision, first, prompt, text, error)


def revisions(answers: Sequence[Answer]) -> Counter[str]:
    """How many of the answers came from each revision."""
    return Counter(answer.revision for answer in answers)
