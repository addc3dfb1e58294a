"""`shoal up` on one machine: apply, scale, logs, delete, and nothing left behind."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from e2e.conftest import MANIFEST, Platform, wait_until


@pytest.fixture
def platform(tmp_path: Path) -> Any:
    manifest = tmp_path / "service.yaml"
    manifest.write_text(MANIFEST.format(name="one", dtype="bfloat16", replicas=1))
    platform = Platform(tmp_path / "state")
    platform.up(manifest)
    yield platform
    assert platform.process is not None
    if platform.process.poll() is None:
        platform.stop()


def _ask(platform: Platform, model: str) -> httpx.Response:
    return httpx.post(
        f"{platform.url}/v1/completions",
        json={"model": model, "prompt": "1, 2, 3,", "max_tokens": 4, "temperature": 0},
        timeout=60,
    )


def test_a_service_lives_and_changes(platform: Platform, tmp_path: Path) -> None:
    """Up, scale, apply an edit as a rolling update, add a second service, delete it, Ctrl-C."""
    platform.wait_routable("one", 1)
    assert _ask(platform, "one").status_code == 200

    platform.shoal("scale", "one", "2")
    platform.wait_routable("one", 2)
    platform.shoal("scale", "one", "1")
    platform.wait_routable("one", 1)

    before = {pod["name"] for pod in platform.get("pods") if pod["service"] == "one"}
    edited = tmp_path / "edited.yaml"
    edited.write_text(
        MANIFEST.format(name="one", dtype="bfloat16", replicas=1).replace("1024", "512")
    )
    assert "configured" in platform.shoal("apply", "-f", str(edited))
    assert "unchanged" in platform.shoal("apply", "-f", str(edited))

    def replaced() -> bool:
        # The old revision serves until the new one is admitted: never a failed request.
        assert _ask(platform, "one").status_code == 200
        now = {pod["name"] for pod in platform.get("pods") if pod["service"] == "one"}
        return len(now) == 1 and not now & before

    wait_until(replaced, 120, "the edited revision takes over")

    second = tmp_path / "second.yaml"
    second.write_text(MANIFEST.format(name="two", dtype="bfloat16", replicas=1))
    platform.shoal("apply", "-f", str(second))
    platform.wait_routable("two", 1)
    assert _ask(platform, "two").status_code == 200
    assert platform.shoal("logs", "two", "--tail", "5").strip()
    platform.shoal("delete", "two")
    assert {one["metadata"]["name"] for one in platform.get("infs")} == {"one"}
    assert wait_until(lambda: _ask(platform, "two").status_code == 404, 10, "two is gone")

    assert platform.stop() in (0, 130)


def test_a_killed_worker_is_restarted(platform: Platform) -> None:
    """SIGKILL of the only worker: requests wait, and are answered when it is back."""
    platform.wait_routable("one", 1)
    worker = next(pod for pod in platform.get("pods") if pod["service"] == "one")
    os.kill(worker["pid"], signal.SIGKILL)
    assert _ask(platform, "one").status_code == 200
    platform.wait_routable("one", 1)


def test_sigkill_of_the_supervisor_leaves_no_process(platform: Platform) -> None:
    """Children notice that their supervisor is gone and end by themselves."""
    platform.wait_routable("one", 1)
    children = platform.descendants()
    assert len(children) >= 2
    assert platform.process is not None
    platform.process.kill()
    platform.process.wait()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


def test_bad_manifests_are_refused(tmp_path: Path) -> None:
    """`shoal up` says what is wrong with a manifest, a line each, and exits 2."""
    import subprocess

    manifest = tmp_path / "bad.yaml"
    manifest.write_text(
        MANIFEST.format(name="bad", dtype="bfloat17", replicas=-1).replace(
            "maxNumSeqs", "maxNumSeq"
        )
    )
    platform = Platform(tmp_path / "state")
    done = subprocess.run(
        platform.command("up", "-f", str(manifest), "--state-dir", str(platform.state)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    for word in ("spec.engine.dtype", "bfloat17", "maxNumSeqs", "spec.replicas", "-1"):
        assert word in done.stderr, done.stderr


def test_get_as_json_is_a_list(platform: Platform) -> None:
    """`shoal get -o json` prints one JSON document with items, also while nothing is ready."""
    wait_until(
        lambda: json.loads(platform.shoal("get", "infs", "-o", "json"))["items"], 20, "the service"
    )
