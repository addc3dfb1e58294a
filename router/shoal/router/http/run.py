"""One API request on its way: its generations and the text of every choice.

A request has one generation a prompt, and each generation has `samples` choices, so choice
`prompt * samples + sample` belongs to that prompt.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from shoal.api.v1 import engine_pb2
from shoal.router.generation import Generation, GenerationError, Output
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
        self._left = len(streams)
        self._cached = [0] * len(generations)

    @property
    def done(self) -> bool:
        """Every choice has ended."""
        return not self._left

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
        """Ends whatever still runs."""
        for generation in self.generations:
            if not generation.settled:
                generation.cancel()

    async def steps(self) -> AsyncGenerator[list[Step], None]:
        """All that is there at each wake-up. Raises GenerationError. Close it on leaving early."""
        if len(self.generations) == 1:
            generation = self.generations[0]
            while not generation.done:
                yield self._take(0, await generation.next())
        else:
            async with aclosing(_merged(self.generations)) as merged:
                async for prompt, outputs in merged:
                    yield self._take(prompt, outputs)
        if self._left:
            raise GenerationError(499, "cancelled", "the client hung up")

    def _take(self, prompt: int, outputs: list[Output]) -> list[Step]:
        generation = self.generations[prompt]
        steps: list[Step] = []
        for output in outputs:
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
                self._left -= 1
                if not output.finish:
                    generation.cancel(output.index)
        return steps


async def _merged(
    generations: Sequence[Generation],
) -> AsyncGenerator[tuple[int, list[Output]], None]:
    """Outputs of several generations as they come, with the generation's place."""
    waiting: dict[asyncio.Task[list[Output]], int] = {
        asyncio.create_task(generation.next()): place
        for place, generation in enumerate(generations)
    }
    try:
        while waiting:
            ready, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in ready:
                place = waiting.pop(task)
                yield place, task.result()
                if not generations[place].done:
                    waiting[asyncio.create_task(generations[place].next())] = place
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
