"""What tests do with a cluster beyond kubectl: namespaces, faults, evidence of failures."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx

from e2e import tools
from e2e.cluster import platform
from e2e.cluster.command import attached
from e2e.cluster.kube import Kube, Object
from e2e.cluster.layout import HERE, ClusterError, Layout
from e2e.cluster.processes import Processes
from shoal.api.names import API_VERSION

EVIDENCE: Final = HERE / ".evidence"
_FOREIGN_FOLDERS: Final = Path("/var/lib/shoal-e2e")
KINDS: Final = "infs,pods,services,configmaps,controllerrevisions,pdb,events"


@dataclass
class Testbed:
    """A cluster. `layout` is None where it is not ours, and then it has no faults of the host."""

    __test__ = False  # not a test class, whatever pytest makes of the name

    kube: Kube
    layout: Layout | None
    made: int = field(default=0)

    def make_namespace(self, test: str) -> str:
        self.made += 1
        short = re.sub("[^a-z0-9]+", "-", test.removeprefix("test_").lower()).strip("-")[:40]
        name = f"{short.strip('-')}-{self.made}"
        self.kube.kubectl("create", "namespace", name)
        return name

    def remove_namespace(self, name: str) -> None:
        """Services first: what they own goes while the operator still watches."""
        self.kube.kubectl("delete", "infs", "--all", "-n", name, "--wait=true", seconds=120)
        self.kube.kubectl("delete", "namespace", name, "--wait=false")

    def host_folder(self, namespace: str) -> Path:
        """A folder of the node for a test's volume; on our own node it goes with the cluster."""
        root = self.layout.run / "volumes" if self.layout is not None else _FOREIGN_FOLDERS
        return root / namespace

    def describe(self, namespace: str) -> str:
        """Pods, their events and the last of their logs, for a failure message."""
        last = ("--tail=8", "--prefix")
        parts = [
            self._try("get", "pods", "-n", namespace, "-o", "wide"),
            *self._try("get", "events", "-n", namespace).splitlines()[-15:],
            self._try("logs", "-n", namespace, "-l", platform.OPERATOR, *last),
            self._try("logs", "-n", namespace, "-l", platform.ROUTER, *last),
        ]
        return "\n".join(parts)

    def keep(self, namespace: str, test: str) -> Path:
        """Writes down what explains a failure; the folder."""
        folder = EVIDENCE / re.sub(r"[^\w.-]+", "-", test)
        folder.mkdir(parents=True, exist_ok=True)
        objects = self._try("get", KINDS, "-n", namespace, "-o", "yaml")
        (folder / "objects.yaml").write_text(objects)
        (folder / "pods.txt").write_text(self._try("describe", "pods", "-n", namespace))
        for name, where, selector in (
            ("workers", namespace, "app.kubernetes.io/component=worker"),
            ("operator", platform.NAMESPACE, platform.OPERATOR),
            ("router", platform.NAMESPACE, platform.ROUTER),
        ):
            text = self._try(
                *("logs", "-n", where, "-l", selector, "--all-containers", "--tail=-1"),
                *("--prefix", "--ignore-errors", "--max-log-requests=20"),
            )
            (folder / f"{name}.log").write_text(text)
        return folder

    # --- faults of the host, on our own node alone

    def pid_in_pod(self, pod: Object, command: str) -> int:
        """The pod's process, as the host counts, whose command line holds `command`."""
        uid = pod["metadata"]["uid"]
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                groups = (entry / "cgroup").read_text()
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # it just ended
            if uid in groups and command in line:
                return int(entry.name)
        raise ClusterError(f"pod {pod['metadata']['name']} runs no process with {command!r}")

    def kill_in_pod(self, pod: Object, command: str, number: int = signal.SIGKILL) -> None:
        """From the host: within it, a container's first process cannot be killed."""
        os.kill(self.pid_in_pod(pod, command), number)

    def stop_api_server(self) -> None:
        assert self.layout is not None
        Processes(self.layout).stop(["kube-apiserver"], signal.SIGKILL)

    def start_api_server(self) -> None:
        assert self.layout is not None
        Processes(self.layout).restart("kube-apiserver")

    def api_server_answers(self) -> bool:
        try:
            return self.kube.raw("/readyz") == "ok"
        except ClusterError:
            return False

    def _try(self, *arguments: str) -> str:
        try:
            return self.kube.kubectl(*arguments)
        except ClusterError as error:
            return str(error)


@contextmanager
def open_api(kube: Kube) -> Iterator[httpx.Client]:
    """The API server over plain HTTP, by `kubectl proxy`: kubectl itself asks too slowly."""
    command = attached(tools.kubectl(), "--kubeconfig", kube.kubeconfig, "proxy", "--port=0")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().rsplit(" ", 1)[1].strip()
            with httpx.Client(base_url=f"http://{address}", timeout=60) as client:
                yield client
        finally:
            process.terminate()


def create_service(api: httpx.Client, namespace: str, thing: Object) -> httpx.Response:
    """As `kubectl create` asks: a field that the type does not have is an error."""
    group, _, version = API_VERSION.partition("/")
    path = f"/apis/{group}/{version}/namespaces/{namespace}/inferenceservices"
    return api.post(path, params={"fieldValidation": "Strict"}, json=thing)


def evict(kube: Kube, namespace: str, pod: str) -> None:
    """As `kubectl drain` does it, so a PodDisruptionBudget is asked. Raises ClusterError."""
    body = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": pod, "namespace": namespace},
    }
    path = f"/api/v1/namespaces/{namespace}/pods/{pod}/eviction"
    kube.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(body))


def since(started: float) -> str:
    """Seconds since a monotonic time, for a report."""
    return f"{time.monotonic() - started:.1f}"
