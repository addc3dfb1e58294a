"""One API request on its way: its generations and the text of every choice.

A request has one generation a prompt, and each generation has `samples` choices, so choice
`prompt * samples + sample` belongs to that prompt.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from shoal.api.v1 import engine_pb2
from shoal.router.generation import Generation, Output
from shoal.router.http.errors import Headers
from shoal.router.text_stream import TextStream

Step = tuple[int, str, Output]  # choice, text to show now, what the choice brought

_LENGTH = engine_pb2.FINISH_REASON_LENGTH


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request; a prompt counts once for all its samples."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def json(self) -> dict[str, object]:
        """As OpenAI writes it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Run:
    """Reads the generations and turns their tokens into text."""

    def __init__(
        self,
        generations: Sequence[Generation],
        streams: Sequence[TextStream],
        *,
        discard: bool = False,
    ) -> None:
        """`streams`: one a choice. `discard`: the client wants no token (max_tokens is 0), so
        the one that the engine draws is dropped."""
        self.generations = generations
        self.streams = streams
        self._samples = len(streams) // len(generations)
        self._discard = discard
        self._open = [self._samples] * len(generations)  # choices that have not ended
        self._cached = [0] * len(generations)
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._pass_on: Callable[[list[Step]], bool] | None = None
        # Generations that have something to take, in the order in which they said so.
        self._news: list[int] = []
        self._left: list[Step] = []  # taken, but not passed on
        for place, generation in enumerate(generations):
            generation.listen(partial(self._tell, place))

    @property
    def done(self) -> bool:
        """Every choice has ended."""
        return not any(self._open)

    def prompt_of(self, choice: int) -> int:
        return choice // self._samples

    def usage(self) -> Usage:
        """Of all that came so far."""
        return Usage(
            sum(generation.prompt_tokens for generation in self.generations),
            sum(stream.num_tokens for stream in self.streams),
            sum(self._cached),
        )

    def headers(self) -> Headers:
        """Who answers, for people who look for the cause of something."""
        generation = self.generations[0]
        return [
            (b"x-shoal-revision", generation.revision.encode("latin-1", "replace")),
            (b"x-shoal-endpoint", generation.endpoint.encode("latin-1", "replace")),
        ]

    def cancel(self) -> None:
        """Ends whatever still runs. Always call it in the end: it also lets go of the
        generations, which are garbage at once and not at the collector's next pass."""
        self._pass_on = None
        for generation in self.generations:
            generation.listen(None)
            if not generation.settled:
                generation.cancel()

    async def next(self, pass_on: Callable[[list[Step]], bool] | None = None) -> list[Step]:
        """All that is there, and waits until something is. Raises GenerationError: failed, or
        over before every choice had ended, since the client hung up.

        `pass_on`: called meanwhile with each piece of news as it comes, where it comes; True: it
        took care of it, and the wait goes on. False, or an error, which is raised here, ends
        the wait. It saves a stream a wake-up of its task for every token.
        """
        self._pass_on = pass_on
        while not self._news:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
            if self._left:
                left, self._left = self._left, []
                return left
        news, self._news = self._news, []
        if len(news) == 1:
            return self._take(news[0])
        return [step for prompt in dict.fromkeys(news) for step in self._take(prompt)]

    def _tell(self, prompt: int) -> None:
        """A generation has something new."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            self._news.append(prompt)
            return
        try:
            if self._pass_on is None or not self.generations[prompt].ready:
                self._news.append(prompt)
            else:
                steps = self._take(prompt)
                if not steps or self._pass_on(steps):
                    return
                self._left = steps
        except Exception as error:
            waiter.set_exception(error)
            return
        waiter.set_result(None)

    def _take(self, prompt: int) -> list[Step]:
        generation = self.generations[prompt]
        steps: list[Step] = []
        if not self._open[prompt]:
            return steps
        for output in generation.take():
            choice = prompt * self._samples + output.index
            stream = self.streams[choice]
            if stream.finish is not None:
                continue
            if output.cached_tokens > self._cached[prompt]:
                self._cached[prompt] = output.cached_tokens
            if self._discard:
                steps.append((choice, stream.feed((), _LENGTH), output))
            else:
                steps.append((choice, stream.feed(output.token_ids, output.finish), output))
            if stream.finish is not None:
                self._open[prompt] -= 1
                if not output.finish:
                    generation.cancel(output.index)
        return steps
