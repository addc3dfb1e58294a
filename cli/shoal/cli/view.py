"""What is shown of services and pods: pure functions from documents to cells.

A service is its document as in Kubernetes, status included; the columns are those that the CRD
gives `kubectl get infs`.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from shoal.cli.backend import Document, PodView
from shoal.cli.output import format_age

if TYPE_CHECKING:
    from shoal.api.types import InferenceService
    from shoal.operator.local.records import PodRecord
    from shoal.operator.local.store import Store

SERVICE_COLUMNS = ("name", "model", "ready", "replicas", "desired", "canary", "reason", "age")
SERVICE_COLUMNS_WIDE = (*SERVICE_COLUMNS, "revision", "url", "tp", "pp")
POD_COLUMNS = ("name", "ready", "status", "restarts", "age")


def service_documents(store: "Store", name: str | None = None) -> list[dict[str, Any]]:
    """Services with their status, by name; one of them if asked for. [] where there is none."""
    services = store.services() if name is None else [store.get(name)]
    return [service_document(store, service) for service in services if service is not None]


def service_document(store: "Store", service: "InferenceService") -> dict[str, Any]:
    """One service with its status."""
    from shoal.api.types import to_document

    return {**to_document(service), "status": store.status(service.name) or {}}


def service_cells(document: Document, now: float, *, wide: bool = False) -> list[str]:
    """One row under SERVICE_COLUMNS, or SERVICE_COLUMNS_WIDE."""
    metadata, spec = document["metadata"], document["spec"]
    status = document.get("status") or {}
    ready = condition_of(status, "Ready") or {}
    canary = status.get("canary") or {}
    cells = [
        metadata["name"],
        spec["model"]["uri"],
        ready.get("status", ""),
        str(status.get("readyReplicas", 0)),
        str(spec.get("replicas", 1)),
        str(canary.get("weight", "")),
        ready.get("reason", ""),
        age_of(metadata.get("creationTimestamp"), now),
    ]
    if wide:
        parallelism = spec.get("parallelism") or {}
        cells += [
            status.get("activeRevision") or "",
            status.get("url") or "",
            str(parallelism.get("tensor", 1)),
            str(parallelism.get("pipeline", 1)),
        ]
    return cells


def condition_of(status: Document, kind: str) -> dict[str, Any] | None:
    """The condition of that type, where the status has it."""
    conditions: Sequence[dict[str, Any]] = status.get("conditions") or ()
    return next((found for found in conditions if found.get("type") == kind), None)


def pod_columns(place: str, *, wide: bool = False) -> tuple[str, ...]:
    """`place`: what a pod's place is called, node or pid."""
    more = ("service", "role", "revision", place, "address") if wide else ()
    return (*POD_COLUMNS, *more)


def pod_cells(pod: PodView, now: float, *, wide: bool = False) -> list[str]:
    """One row under pod_columns."""
    cells = [pod.name, pod.ready, pod.status, str(pod.restarts), format_age(now - pod.created)]
    if wide:
        cells += [pod.service, pod.role, pod.revision, pod.place, pod.address]
    return cells


def pod_status(pod: "PodRecord") -> str:
    """One word: the reason where there is one (CrashLoopBackOff), else the phase."""
    if pod.reason:
        return pod.reason
    return "Starting" if pod.phase == "Running" and not pod.ready else pod.phase


def age_of(timestamp: object, now: float) -> str:
    """The age of an RFC 3339 timestamp; empty where there is none."""
    if not isinstance(timestamp, str):
        return ""
    return format_age(now - datetime.fromisoformat(timestamp).timestamp())
