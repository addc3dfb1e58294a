"""Types of others that the chart may use, as their projects publish them in Go modules."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from e2e.cluster.command import run
from e2e.cluster.kube import Kube

DOWNLOAD_SECONDS: Final = 180.0


@dataclass(frozen=True, slots=True)
class Project:
    """A Go module that carries CRDs."""

    module: str
    version: str
    files: tuple[str, ...]  # within the module


_MONITORING = "example/prometheus-operator-crd/monitoring.coreos.com_"
_GATEWAY = "config/crd/standard/gateway.networking.k8s.io_"
PROMETHEUS: Final = Project(
    "github.com/prometheus-operator/prometheus-operator",
    "v0.82.2",
    tuple(
        f"{_MONITORING}{it}.yaml" for it in ("podmonitors", "servicemonitors", "prometheusrules")
    ),
)
GATEWAY: Final = Project("sigs.k8s.io/gateway-api", "v1.4.0", (f"{_GATEWAY}httproutes.yaml",))
CERT_MANAGER: Final = Project(
    "github.com/cert-manager/cert-manager",
    "v1.19.0",
    ("deploy/crds/cert-manager.io_certificates.yaml",),
)


def install(kube: Kube, *projects: Project) -> list[Path]:
    """Makes the types known to the cluster; the files, for `remove`. Raises ClusterError."""
    files = [path for project in projects for path in _download(project)]
    for path in files:
        kube.kubectl("apply", "--server-side", "-f", path)
    for path in files:
        kube.kubectl("wait", "--for=condition=Established", "-f", path, "--timeout=30s")
    return files


def remove(kube: Kube, files: list[Path]) -> None:
    for path in files:
        kube.kubectl("delete", "--ignore-not-found", "-f", path, seconds=120)


def _download(project: Project) -> list[Path]:
    with tempfile.TemporaryDirectory() as nowhere:  # outside of any module
        told = run(
            *("go", "mod", "download", "-json", f"{project.module}@{project.version}"),
            cwd=Path(nowhere),
            seconds=DOWNLOAD_SECONDS,
        )
    folder = Path(json.loads(told)["Dir"])
    return [folder / name for name in project.files]
