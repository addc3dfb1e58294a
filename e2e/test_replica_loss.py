"""A replica is killed under load: every answer is complete and what it would have been."""

import asyncio
import os
import signal
from typing import Any

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

STREAMS = 32
TOKENS = 96


def _prompt(index: int) -> str:
    return f"Write a short story about the number {index} and a friend of it."


async def _stream(client: openai.AsyncOpenAI, index: int, started: asyncio.Event) -> str:
    """The whole answer; sets `started` with its first piece."""
    text = ""
    stream = await client.chat.completions.create(
        model="chat",
        messages=[{"role": "user", "content": _prompt(index)}],
        temperature=0,
        max_tokens=TOKENS,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    finish = None
    async for chunk in stream:
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
            finish = chunk.choices[0].finish_reason or finish
            started.set()
    assert finish == "length"
    return text


async def _all(url: str, kill: int | None) -> list[str]:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    events = [asyncio.Event() for _ in range(STREAMS)]
    tasks = [asyncio.create_task(_stream(client, i, event)) for i, event in enumerate(events)]
    if kill is not None:
        # In the middle: every stream has begun, none can have ended.
        await asyncio.gather(*(event.wait() for event in events))
        assert not any(task.done() for task in tasks)
        os.kill(kill, signal.SIGKILL)
    answers = await asyncio.gather(*tasks)
    await client.close()
    return list(answers)


def _migrations(platform: Any) -> float:
    text = httpx.get(f"{platform.url}/metrics").text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "shoal_migrations_total"
    )


def test_streams_survive_the_death_of_their_replica(two_replicas: Any) -> None:
    """32 of 32 streams end complete and equal to the undisturbed greedy answers."""
    undisturbed = asyncio.run(_all(two_replicas.url, kill=None))
    workers = [p for p in two_replicas.get("pods") if p["service"] == "chat" and p["pid"]]
    assert len(workers) == 2
    disturbed = asyncio.run(_all(two_replicas.url, kill=workers[0]["pid"]))
    assert disturbed == undisturbed
    # The dead replica held some of the streams (half of them, if both are equally fast), and each
    # of these went on elsewhere.
    assert _migrations(two_replicas) >= 1
    assert len(set(undisturbed)) > STREAMS // 2
    two_replicas.wait_routable("chat", 2)
