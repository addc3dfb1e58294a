"""The openai package, sync and async, against a real server over a scripted core."""

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pytest

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


def with_client(core: Any, support: Any, use: Callable[[openai.OpenAI], None]) -> None:
    """Runs `use` in a thread beside the server."""

    async def main() -> None:
        async with support.served(core) as port:

            def run() -> None:
                url = f"http://127.0.0.1:{port}/v1"
                with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
                    use(client)

            await asyncio.to_thread(run)

    asyncio.run(main())


def test_chat_whole_and_streamed(core: Any, support: Any) -> None:
    """The client's own types parse everything."""

    def use(client: openai.OpenAI) -> None:
        whole = client.chat.completions.create(
            model="m", messages=MESSAGES, logprobs=True, top_logprobs=1, n=2
        )
        assert [choice.message.content for choice in whole.choices] == ["Hello world"] * 2
        assert whole.choices[0].logprobs is not None
        assert whole.choices[0].logprobs.content is not None
        assert whole.choices[0].logprobs.content[0].token == "H"
        assert whole.usage is not None
        assert whole.usage.prompt_tokens_details is not None
        assert whole.usage.prompt_tokens_details.cached_tokens == 3
        stream = client.chat.completions.create(
            model="m", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == "Hello world"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 12

    with_client(core, support, use)


def test_the_stream_helper_accumulates(core: Any, support: Any) -> None:
    """client.chat.completions.stream builds the final message from our chunks."""

    def use(client: openai.OpenAI) -> None:
        with client.chat.completions.stream(model="m", messages=MESSAGES) as stream:
            final = stream.until_done().get_final_completion()
        assert final.choices[0].message.content == "Hello world"
        assert final.choices[0].finish_reason == "stop"

    with_client(core, support, use)


def test_completions_and_models(core: Any, support: Any) -> None:
    """Lists of prompts, logprobs, echo; models by list and by name."""

    def use(client: openai.OpenAI) -> None:
        answer = client.completions.create(model="m", prompt=["a", "b"], echo=True, logprobs=2)
        assert [choice.text for choice in answer.choices] == ["aHello world", "bHello world"]
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None and logprobs.tokens is not None
        assert logprobs.tokens[:2] == ["a", "H"]
        chunks = list(client.completions.create(model="m", prompt=[72], stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello world"
        assert [model.id for model in client.models.list()] == ["m", "alias"]
        assert client.models.retrieve("alias").id == "alias"

    with_client(core, support, use)


def test_errors_become_the_client_s_exceptions(core: Any, support: Any) -> None:
    """By status, with code and param; an error in a stream raises too."""

    def use(client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model="m", messages=MESSAGES, temperature=9)
        assert (bad.value.param, bad.value.code) == ("temperature", "integer_above_max_value")
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=MESSAGES)
        core.reply = support.says(b"x", support.GenerationError(503, "lost", "no replica"))
        with pytest.raises(openai.APIError, match="no replica"):
            list(client.chat.completions.create(model="m", messages=MESSAGES, stream=True))
        core.refuse = support.GenerationError(429, "queue_full", "full", retry_after=1)
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="m", prompt="x")

    with_client(core, support, use)


def test_many_streams_at_once(core: Any, support: Any) -> None:
    """Async client: every stream gets its own text."""
    core.reply = lambda request, index: [bytes([b]) for b in bytes(request.token_ids)[6:-12]]

    async def main() -> None:
        async with support.served(core) as port:
            url = f"http://127.0.0.1:{port}/v1"
            async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

                async def one(number: int) -> str:
                    stream = await client.chat.completions.create(
                        model="m",
                        messages=[{"role": "user", "content": f"número {number}"}],
                        stream=True,
                    )
                    return "".join([c.choices[0].delta.content or "" async for c in stream])

                texts = await asyncio.gather(*[one(number) for number in range(32)])
            assert texts == [f"número {number}" for number in range(32)]

    asyncio.run(main())
