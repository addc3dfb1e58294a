"""kwok: fake nodes, and pods on them that are Running and Ready as soon as they are scheduled."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from e2e.cluster.layout import HERE, Layout
from e2e.cluster.processes import Processes

ANNOTATION: Final = "kwok.x-k8s.io/node"
LABELS: Final = {"type": "kwok"}
TAINT: Final = {"key": "kwok.x-k8s.io/node", "value": "fake", "effect": "NoSchedule"}
POD_RANGE: Final = "10.244.0.0/16"  # addresses that nobody answers
PODS_PER_NODE: Final = 500
LEASE_SECONDS: Final = 40


def start(layout: Layout, processes: Processes, programs: Path) -> None:
    processes.start(
        "kwok",
        *(programs / "kwok", "--kubeconfig", layout.kubeconfig("kwok")),
        *("--config", HERE / "conf/kwok.yaml", "--manage-all-nodes=false"),
        *("--manage-nodes-with-annotation-selector", f"{ANNOTATION}=fake"),
        *("--cidr", POD_RANGE, "--node-lease-duration-seconds", str(LEASE_SECONDS)),
    )


def nodes(count: int) -> Iterator[dict[str, Any]]:
    """Manifests of fake nodes. Pods get there by LABELS as node selector and tolerating TAINT."""
    size = {"cpu": "1000", "memory": "4Ti", "pods": str(PODS_PER_NODE)}
    for index in range(count):
        name = f"fake-{index}"
        yield {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": name,
                "annotations": {ANNOTATION: "fake", "node.alpha.kubernetes.io/ttl": "0"},
                "labels": {**LABELS, "kubernetes.io/hostname": name, "kubernetes.io/os": "linux"},
            },
            "spec": {"taints": [TAINT]},
            "status": {"allocatable": size, "capacity": size},
        }


def placement() -> dict[str, Any]:
    """Pod spec fields that put a pod on a fake node."""
    tolerated = {"key": TAINT["key"], "operator": "Exists", "effect": TAINT["effect"]}
    return {"nodeSelector": dict(LABELS), "tolerations": [tolerated]}
