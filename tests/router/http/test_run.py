"""What waits for a run's news: passed on where it comes, or handed to the one who waits."""

import asyncio
from typing import Any

import pytest

from shoal.router.generation import Generation, GenerationRequest, Output
from shoal.router.http.run import Run, Step
from shoal.router.text_stream import TextStream


class _Nobody:
    def cancel(self, generation: Generation, index: int | None) -> None:
        """Nothing runs."""


def _run(text_model: Any) -> tuple[Run, Generation]:
    request = GenerationRequest("s", [1], None)  # type: ignore[arg-type]  # nobody reads it here
    generation = Generation(request, _Nobody(), 0.0)
    return Run([generation], [TextStream(text_model)]), generation


def _say(generation: Generation, text: bytes, finish: int = 0) -> None:
    generation.deliver(Output(0, list(text), finish=finish))


def test_news_is_passed_on_where_it_comes_until_somebody_declines(core: Any) -> None:
    """Each piece reaches the one who passes it on before `deliver` returns and in order; what he
    declines ends the wait, and later news waits for the next call."""
    seen: list[str] = []

    def pass_on(steps: list[Step]) -> bool:
        seen.extend(text for _, text, _ in steps)
        return seen[-1] != "c"

    async def scenario() -> None:
        run, generation = _run(core.text_model)
        waiting = asyncio.create_task(run.next(pass_on))
        await asyncio.sleep(0)
        for text in (b"a", b"b", b"c", b"d"):
            _say(generation, text)
        assert seen == ["a", "b", "c"]
        assert [text for _, text, _ in await waiting] == ["c"]
        assert [text for _, text, _ in await run.next(pass_on)] == ["d"]
        run.cancel()

    asyncio.run(scenario())


def test_an_error_while_passing_on_reaches_the_one_who_waits(core: Any) -> None:
    """Whoever delivers news never sees a reader's error; the reader does."""

    def pass_on(steps: list[Step]) -> bool:
        raise ValueError("cannot be written")

    async def scenario() -> None:
        run, generation = _run(core.text_model)
        waiting = asyncio.create_task(run.next(pass_on))
        await asyncio.sleep(0)
        _say(generation, b"a")
        with pytest.raises(ValueError, match="cannot be written"):
            await waiting
        run.cancel()

    asyncio.run(scenario())
