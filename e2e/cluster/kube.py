"""A cluster as a test sees it: kubectl, helm, and objects as data."""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import yaml

from e2e import tools
from e2e.cluster.command import run, wait_for
from e2e.cluster.reading import Reader, open_reader, path_of

T = TypeVar("T")
Object = dict[str, Any]

HELM_SECONDS = 300.0


@dataclass(frozen=True)
class Kube:
    """Whoever `kubeconfig` names. All errors are ClusterError with what the command or the server
    said."""

    kubeconfig: Path
    environ: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _reader(self) -> Reader | None:
        return None if self.environ else open_reader(self.kubeconfig)

    def kubectl(self, *arguments: str | Path, stdin: str | None = None, seconds: float = 60) -> str:
        """Standard output of kubectl."""
        return run(
            *(tools.kubectl(), "--kubeconfig", self.kubeconfig, *arguments),
            stdin=stdin,
            seconds=seconds,
            environ=self.environ,
        )

    def helm(self, *arguments: str | Path) -> str:
        """Standard output of helm."""
        return run(
            *(tools.helm(), "--kubeconfig", self.kubeconfig, *arguments),
            seconds=HELM_SECONDS,
            environ=self.environ,
        )

    def apply(self, namespace: str, *objects: Object | Path) -> None:
        """Files or objects, as `kubectl apply` does it."""
        for path in objects:
            if isinstance(path, Path):
                self.kubectl("apply", "-n", namespace, "-f", path)
        documents = [one for one in objects if not isinstance(one, Path)]
        if documents:
            text = yaml.safe_dump_all(documents)
            self.kubectl("apply", "-n", namespace, "-f", "-", stdin=text, seconds=300)

    def get(self, kind: str, name: str, namespace: str | None = None) -> Object:
        path = path_of(kind, namespace, name)
        if path is not None and self._reader is not None:
            return self._reader.json(path)
        found: Object = json.loads(self.kubectl("get", kind, name, *_in(namespace), "-o", "json"))
        return found

    def list(self, kind: str, namespace: str | None = None, selector: str = "") -> list[Object]:
        """Of all namespaces where none is named."""
        path = path_of(kind, namespace, selector=selector)
        if path is not None and self._reader is not None:
            found: list[Object] = self._reader.json(path)["items"]
            return found
        where = _in(namespace) or ["--all-namespaces"]
        text = self.kubectl("get", kind, *where, "-l", selector, "-o", "json", seconds=120)
        items: list[Object] = json.loads(text)["items"]
        return items

    def conditions(self, namespace: str, name: str) -> dict[str, Object]:
        """Conditions of an InferenceService by type."""
        found = self.get("infs", name, namespace).get("status", {}).get("conditions", [])
        return {one["type"]: one for one in found}

    def patch(self, kind: str, name: str, namespace: str, change: Object) -> None:
        """A JSON merge patch."""
        self.kubectl(
            *("patch", kind, name, "-n", namespace, "--type=merge", "-p", json.dumps(change))
        )

    def delete(self, kind: str, name: str, namespace: str, *flags: str) -> None:
        self.kubectl("delete", kind, name, "-n", namespace, *flags, seconds=180)

    def logs(self, namespace: str, selector: str) -> str:
        return self.kubectl(
            *("logs", "-n", namespace, "-l", selector, "--all-containers", "--tail=-1"),
            *("--prefix", "--ignore-errors"),
        )

    def raw(self, path: str) -> str:
        """An API path's answer as it is, such as /metrics."""
        if self._reader is not None:
            return self._reader.text(path)
        return self.kubectl("get", "--raw", path)


def _in(namespace: str | None) -> list[str]:
    return [] if namespace is None else ["-n", namespace]


def condition(thing: Object, name: str) -> Object:
    """A condition of an object's status; empty where it is not there."""
    found: Iterable[Object] = thing.get("status", {}).get("conditions", [])
    return next((one for one in found if one["type"] == name), {})


def is_ready(pod: Object) -> bool:
    return condition(pod, "Ready").get("status") == "True"


def timed(what: str, seconds: float, check: Callable[[], T]) -> tuple[T, float]:
    """The first truthy result, and how long it took in seconds."""
    started = time.monotonic()
    result = wait_for(what, seconds, check)
    return result, time.monotonic() - started


def external_kubeconfig() -> Path | None:
    """A cluster to use in place of our own: the first file that KUBECONFIG names."""
    named = os.environ.get("KUBECONFIG", "")
    return Path(named.split(os.pathsep)[0]) if named else None
