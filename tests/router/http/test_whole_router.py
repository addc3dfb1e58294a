"""HTTP over the real core and scripted engines: the whole router but its process."""

import asyncio
from typing import Any

import openai
import pytest

from bench.scripted_engine import Engine, Script, byte_model, expected

MESSAGES: Any = [{"role": "user", "content": "Hi"}]
PROMPT = list(b"user: Hi\nassistant: ")
LENGTH = 60


def client(port: int) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


def slow() -> Engine:
    return Engine(model=byte_model("r"), script=Script(step_seconds=0.01))


def test_streams_survive_a_replica(stage: Any, support: Any, run: Any) -> None:
    """One of two engines breaks under sixteen streams: every client gets its whole text."""

    async def body() -> None:
        async with stage([slow(), slow()]) as engines, support.served(engines.core) as port:
            async with client(port) as api:

                async def one() -> str:
                    stream = await api.chat.completions.create(
                        model="chat",
                        messages=MESSAGES,
                        stream=True,
                        max_tokens=LENGTH,
                        temperature=0,
                    )
                    return "".join([c.choices[0].delta.content or "" async for c in stream])

                streams = [asyncio.create_task(one()) for _ in range(16)]
                await engines.until(lambda: engines.starts(0) and engines.starts(1))
                await asyncio.sleep(0.1)
                await engines.kill(0)
                texts = await asyncio.gather(*streams)
            assert texts == [bytes(expected(PROMPT, LENGTH)).decode()] * 16

    run(body())


def test_a_hung_up_client_and_a_stop_string_reach_the_engine(
    stage: Any, support: Any, run: Any
) -> None:
    """Both become a cancel on the wire."""

    async def body() -> None:
        async with (
            stage([slow()]) as engines,
            support.served(engines.core) as port,
            client(port) as api,
        ):
            stop = bytes(expected(PROMPT, 5)[3:]).decode()
            answer = await api.chat.completions.create(
                model="chat", messages=MESSAGES, stop=stop, max_tokens=1000, temperature=0
            )
            text = bytes(expected(PROMPT, 5)).decode()
            assert answer.choices[0].message.content == text[: text.index(stop)]
            engine = engines.peers[0].engine
            await engines.until(lambda: len(engine.cancels) == 1)
            stream = await api.chat.completions.create(
                model="chat", messages=MESSAGES, stream=True, max_tokens=1000
            )
            await anext(aiter(stream))
            await stream.close()
            await engines.until(lambda: len(engine.cancels) == 2)

    run(body())


def test_an_engine_s_refusal_is_a_400_and_nothing_listens_is_a_503(
    stage: Any, support: Any, run: Any
) -> None:
    """What is wrong with the request is the client's; no replica in time is ours."""

    async def body() -> None:
        invalid = support.engine_pb2.Error.INVALID_ARGUMENT
        refusing = Engine(model=byte_model("r"), script=Script(refuse=invalid))
        async with (
            stage([refusing], queue_timeout_seconds=0.3) as engines,
            support.served(engines.core) as port,
            client(port) as api,
        ):
            with pytest.raises(openai.BadRequestError):
                await api.completions.create(model="chat", prompt="x")
            await engines.kill(0)
            with pytest.raises(openai.InternalServerError) as unavailable:
                await api.completions.create(model="chat", prompt="x")
            assert unavailable.value.status_code == 503
            assert int(unavailable.value.response.headers["retry-after"]) >= 1

    run(body())
