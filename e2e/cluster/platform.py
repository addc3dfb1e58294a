"""Shoal installed on a cluster by its charts, as docs/kubernetes.md has it."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from e2e.cluster import images, runtime
from e2e.cluster.command import Say, wait_for
from e2e.cluster.forward import Forward
from e2e.cluster.kube import Kube, Object, is_ready
from e2e.cluster.layout import CHECKOUT, ClusterError, Layout

NAMESPACE: Final = "shoal-system"
RELEASE: Final = "shoal"
CRDS: Final = "shoal-crds"
CHARTS: Final = CHECKOUT / "charts"
OPERATOR: Final = "app.kubernetes.io/name=shoal,app.kubernetes.io/component=operator"
ROUTER: Final = "app.kubernetes.io/name=shoal,app.kubernetes.io/component=router"
WORKER: Final = "app.kubernetes.io/component=worker"
# A values file that names images which a cluster of the user's can pull.
ENV_VALUES: Final = "SHOAL_E2E_VALUES"


@dataclass
class Platform:
    """One release."""

    kube: Kube
    values: Path
    forward: Forward | None = None  # to the router; None: this is the node, its address is enough

    def install(self, *flags: str, charts: Path = CHARTS) -> None:
        """Both charts, and waits until every pod is ready. Raises ClusterError."""
        # Whoever used this cluster by hand may have applied the type by kubectl.
        self._upgrade(CRDS, charts / "shoal-crds", "--create-namespace", "--force-conflicts")
        wait = ("--wait", "--timeout", "180s")
        self._upgrade(RELEASE, charts / "shoal", "-f", self.values, *wait, *flags)

    def _upgrade(self, release: str, chart: Path, *flags: str | Path) -> None:
        self.kube.helm("upgrade", "--install", release, chart, "-n", NAMESPACE, *flags)

    def uninstall(self) -> str:
        """What helm said. Services and their type stay."""
        return self.kube.helm("uninstall", RELEASE, "-n", NAMESPACE, "--wait")

    @property
    def url(self) -> str:
        """Of the router's Service, as this machine reaches it."""
        if self.forward is not None:
            return self.forward.url
        found = self.kube.get("service", f"{RELEASE}-router", NAMESPACE)["spec"]
        port = next(one["port"] for one in found["ports"] if one["name"] == "http")
        return f"http://{found['clusterIP']}:{port}"

    def operators(self) -> list[Object]:
        """Ready pods of the operator."""
        return [pod for pod in self.kube.list("pods", NAMESPACE, OPERATOR) if is_ready(pod)]

    def holder(self) -> str | None:
        """Name of the operator pod that leads; None between two leaders."""
        identity = self.identity()
        return None if identity is None else identity.split("_")[0]

    def identity(self) -> str | None:
        """The process that leads, which is another one when its container is started anew."""
        lease = self.kube.get("lease", f"{RELEASE}-operator", NAMESPACE)
        return lease["spec"].get("holderIdentity") or None

    def leader(self) -> Object:
        """The pod of the operator that leads."""
        name = wait_for("a leading operator", 30, self.holder)
        assert name is not None
        return self.kube.get("pod", name, NAMESPACE)

    def metrics(
        self, pod: Object, port: int = 9090, keep: Callable[[str], bool] = lambda line: True
    ) -> dict[str, float]:
        """Samples of a pod, summed over the lines that `keep` takes."""
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod['metadata']['name']}:{port}/proxy/metrics"
        return metrics_of(self.kube.raw(path), keep)


def metrics_of(text: str, keep: Callable[[str], bool] = lambda line: True) -> dict[str, float]:
    """Prometheus samples by name, summed over the lines that `keep` takes."""
    sums: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#") and keep(line):
            name = line.split("{")[0].split(" ")[0]
            sums[name] = sums.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
    return sums


def own_values(layout: Layout, say: Say) -> Mapping[str, Any]:
    """Values for our own node: images built and imported, workers that run from the checkout."""
    tags = {room: images.provide(layout, room, say).rsplit(":", 1)[1] for room in images.ROOMS}
    base, base_tag = runtime.BASE_IMAGE.removeprefix("localhost/").split(":")
    return {
        "image": {"registry": "localhost", "pullPolicy": "IfNotPresent"},
        # Room for the workers of tests on two cores.
        "operator": {
            "image": {"tag": tags["operator"]},
            "resources": {"requests": {"cpu": "20m"}, "limits": {"memory": "512Mi"}},
        },
        "router": {
            "image": {"tag": tags["router"]},
            "resources": {"requests": {"cpu": "20m"}, "limits": {"memory": "1Gi"}},
        },
        "workers": {
            "image": {"repository": base, "tag": base_tag},
            "podOverlay": {"spec": {"runtimeClassName": runtime.HOST_CLASS}},
        },
    }


def write_values(values: Mapping[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(dict(values)))
    return path


def external_values() -> Path:
    """The values file for a cluster of the user's. Raises ClusterError where none is named."""
    named = os.environ.get(ENV_VALUES)
    if not named:
        raise ClusterError(
            f"KUBECONFIG names a cluster, so {ENV_VALUES} must name a values file of charts/shoal "
            "with images which that cluster can pull (make images builds them)"
        )
    return Path(named)
