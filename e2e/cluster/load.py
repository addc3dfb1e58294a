"""Constant load by the openai client, and what became of every answer.

Each of N streams asks a question, reads the answer to its end, compares it with what the same
question was answered undisturbed, and asks the next. The client retries connections as it does
by default. A stream that breaks in the middle is asked again, and counted: only the death of the
router that carries it excuses that.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import httpx
import openai

FINISH_SECONDS: Final = 240.0
ASK_AGAIN: Final = 3


def question(index: int) -> str:
    return f"Write a short story about the number {index} and a friend of it."


def tokens(index: int) -> int:
    """Answers differ in length, or all streams would begin and end in step."""
    return 24 + 7 * index % 32


def _nobody(flows: bool) -> None:
    """Hears nothing."""


@dataclass(frozen=True, slots=True)
class Answer:
    begun: float  # monotonic seconds
    ended: float
    question: int
    text: str
    longest_silence: float  # seconds between two pieces, or before the first
    asked_again: int
    error: str | None


@dataclass
class Window:
    """What happened to the requests that were under way while something was done."""

    answers: list[Answer] = field(default_factory=list)
    altered: int = 0

    @property
    def failed(self) -> list[str]:
        return [answer.error for answer in self.answers if answer.error]

    @property
    def asked_again(self) -> int:
        return sum(answer.asked_again for answer in self.answers)

    @property
    def longest_silence(self) -> float:
        return max((answer.longest_silence for answer in self.answers), default=0.0)


async def ask(
    client: openai.AsyncOpenAI,
    model: str,
    index: int,
    flows: Callable[[bool], None] = _nobody,
) -> Answer:
    """One answer. Never raises: an error is part of it. `flows` hears when pieces begin to come,
    and when they end."""
    begun = time.monotonic()
    again, silence = 0, 0.0
    while True:
        text, last = "", time.monotonic()
        try:
            stream = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question(index)}],
                temperature=0,
                max_tokens=tokens(index),
                stream=True,
                extra_body={"ignore_eos": True},
            )
            finish = None
            async for chunk in stream:
                now = time.monotonic()
                silence, last = max(silence, now - last), now
                flows(True)
                if chunk.choices:
                    text += chunk.choices[0].delta.content or ""
                    finish = chunk.choices[0].finish_reason or finish
            error = None if finish == "length" else f"ended with {finish!r} after {len(text)} chars"
        except (httpx.TransportError, openai.APIConnectionError) as failure:
            if again < ASK_AGAIN:
                again += 1
                continue
            error = f"{type(failure).__name__}: {failure}"
        except openai.OpenAIError as failure:
            error = f"{type(failure).__name__}: {failure}"
        finally:
            flows(False)
        return Answer(begun, time.monotonic(), index, text, silence, again, error)


def undisturbed(url: str, model: str, count: int) -> Mapping[int, str]:
    """What each question is answered while nothing happens. Asserts that all succeed."""

    async def all_of_them() -> list[Answer]:
        async with _client(url) as client:
            return list(await asyncio.gather(*(ask(client, model, it) for it in range(count))))

    answers = asyncio.run(all_of_them())
    assert not [one.error for one in answers if one.error], [one.error for one in answers]
    return {one.question: one.text for one in answers}


class Load:
    """N streams in a thread of their own, from `with` to its end."""

    def __init__(self, url: str, model: str, expected: Mapping[int, str]) -> None:
        self._url, self._model, self._expected = url, model, expected
        self._answers: list[Answer] = []
        self._under_way: dict[int, float] = {}  # stream -> when its present question was asked
        self._flowing: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load")

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(FINISH_SECONDS)

    @contextmanager
    def window(self) -> Iterator[Window]:
        """Collects the answers that were under way at any moment of the block."""
        window, begun = Window(), time.monotonic()
        yield window
        ended = time.monotonic()
        give_up = ended + FINISH_SECONDS
        while any(asked <= ended for asked in list(self._under_way.values())):
            assert time.monotonic() < give_up, "requests hang"
            time.sleep(0.1)
        window.answers = [it for it in self._answers if it.ended >= begun and it.begun <= ended]
        window.altered = sum(
            not answer.error and answer.text != self._expected[answer.question]
            for answer in window.answers
        )

    @property
    def tokens(self) -> int:
        """Of all finished answers so far."""
        done = list(self._answers)
        return sum(tokens(answer.question) for answer in done if not answer.error)

    @property
    def flowing(self) -> int:
        """Streams that are in the middle of an answer."""
        return len(self._flowing)

    async def _run(self) -> None:
        async with _client(self._url) as client:
            await asyncio.gather(*(self._stream(client, it) for it in range(len(self._expected))))

    def _note(self, index: int, flows: bool) -> None:
        (self._flowing.add if flows else self._flowing.discard)(index)

    async def _stream(self, client: openai.AsyncOpenAI, index: int) -> None:
        while not self._stop.is_set():
            self._under_way[index] = time.monotonic()
            answer = await ask(client, self._model, index, partial(self._note, index))
            self._answers.append(answer)
            del self._under_way[index]
            if answer.error:
                await asyncio.sleep(0.5)


def _client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=FINISH_SECONDS)
