"""Charts as Helm renders them: `render("operator.replicas=1")` and look at the objects."""

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.tools import ToolError, helm

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/shoal"
NAMESPACE = "shoal-system"
Json = dict[str, Any]


class Refused(RuntimeError):
    """Helm does not render the chart with these values; the message is Helm's."""


@dataclass(frozen=True)
class Rendering:
    """The objects of one rendering."""

    objects: tuple[Json, ...]

    def one(self, kind: str, name: str) -> Json:
        (found,) = [o for o in self.of(kind) if o["metadata"]["name"] == name]
        return found

    def of(self, kind: str) -> list[Json]:
        return [o for o in self.objects if o["kind"] == kind]

    def pod(self, component: str) -> Json:
        """The pod template's spec of `operator` or `router`."""
        spec: Json = self.one("Deployment", f"shoal-{component}")["spec"]["template"]["spec"]
        return spec

    def container(self, component: str) -> Json:
        (container,) = self.pod(component)["containers"]
        assert isinstance(container, dict)
        return container

    def rules(self, component: str) -> dict[tuple[str, str], set[str]]:
        """Verbs by (API group, resource) of every Role that binds the component's account."""
        bound = {
            binding["roleRef"]["name"]
            for kind in ("RoleBinding", "ClusterRoleBinding")
            for binding in self.of(kind)
            if f"shoal-{component}" in [subject["name"] for subject in binding["subjects"]]
        }
        verbs: dict[tuple[str, str], set[str]] = {}
        for role in (*self.of("Role"), *self.of("ClusterRole")):
            for rule in role["rules"] if role["metadata"]["name"] in bound else ():
                for group in rule["apiGroups"]:
                    for resource in rule["resources"]:
                        verbs.setdefault((group, resource), set()).update(rule["verbs"])
        return verbs


Render = Callable[..., Rendering]


@pytest.fixture(scope="session")
def helm_binary() -> Path:
    """Helm; where the machine cannot have it, the tests are skipped, but not in CI."""
    try:
        return helm()
    except ToolError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def run_helm(helm_binary: Path) -> Callable[..., str]:
    """Runs helm; its standard output. Raises Refused."""

    def run(*arguments: str | Path) -> str:
        command = [str(part) for part in (helm_binary, *arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise Refused(done.stderr)
        return done.stdout

    return run


@pytest.fixture(scope="session")
def render(run_helm: Callable[..., str]) -> Iterator[Render]:
    """Renders charts/shoal with `--set` assignments, each combination once."""
    seen: dict[tuple[str, ...], Rendering] = {}

    def rendered(*assignments: str) -> Rendering:
        if assignments not in seen:
            sets = [part for assignment in assignments for part in ("--set", assignment)]
            text = run_helm("template", "shoal", CHART, "--namespace", NAMESPACE, *sets)
            objects = [document for document in yaml.safe_load_all(text) if document]
            seen[assignments] = Rendering(tuple(objects))
        return seen[assignments]

    yield rendered
