"""What tables show of a live pod; pure."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from shoal.api.names import LABEL_COMPONENT, LABEL_REVISION, LABEL_ROLE, LABEL_SERVICE
from shoal.api.names import PORT_ENGINE_GRPC as ENGINE_PORT
from shoal.api.names import PORT_ROUTER_GRPC as ROUTER_PORT
from shoal.cli.backend import EventView, PodView


def pod_view(pod: Mapping[str, Any]) -> PodView:
    """A pod as the API server has it."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    labels = metadata.get("labels") or {}
    containers = status.get("containerStatuses") or []
    router = labels.get(LABEL_COMPONENT) == "router"
    ip = status.get("podIP")
    return PodView(
        name=metadata["name"],
        namespace=metadata["namespace"],
        service=labels.get(LABEL_SERVICE, ""),
        role="router" if router else labels.get(LABEL_ROLE, ""),
        revision=labels.get(LABEL_REVISION, ""),
        ready=f"{sum(bool(each.get('ready')) for each in containers)}"
        f"/{len(pod['spec']['containers'])}",
        status=_status(pod),
        restarts=sum(each.get("restartCount", 0) for each in containers),
        created=seconds_of(metadata.get("creationTimestamp")),
        place=pod["spec"].get("nodeName", ""),
        address=f"{ip}:{ROUTER_PORT if router else ENGINE_PORT}" if ip else "",
        document=pod,
        message=_message(pod),
    )


def containers_to_log(pod: Mapping[str, Any]) -> list[str]:
    """Names of the containers that have something to say: those that began, but of the init
    containers only those that have not ended well once another began."""
    status = pod.get("status") or {}
    main = [each["name"] for each in status.get("containerStatuses") or [] if _began(each)]
    init = [each["name"] for each in status.get("initContainerStatuses") or [] if _began(each)]
    return main or init[-1:]


def event_view(event: Mapping[str, Any]) -> EventView:
    """An event of core/v1."""
    about = event.get("involvedObject") or {}
    last = event.get("lastTimestamp") or event.get("eventTime") or event.get("firstTimestamp")
    series = event.get("series") or {}
    return EventView(
        kind=event.get("type", ""),
        reason=event.get("reason", ""),
        subject=f"{about.get('kind', '')}/{about.get('name', '')}".lower(),
        message=(event.get("message") or "").strip(),
        last=seconds_of(series.get("lastObservedTime") or last),
        count=int(series.get("count") or event.get("count") or 1),
    )


def seconds_of(timestamp: object) -> float:
    """Unix seconds of an RFC 3339 timestamp; 0 where there is none."""
    return datetime.fromisoformat(timestamp).timestamp() if isinstance(timestamp, str) else 0.0


def _status(pod: Mapping[str, Any]) -> str:
    """One word, as kubectl finds it."""
    status = pod.get("status") or {}
    if pod["metadata"].get("deletionTimestamp"):
        return "Terminating"
    for each in status.get("initContainerStatuses") or []:
        if reason := _trouble(each):
            return f"Init:{reason}"
        if _running(each):
            return f"Init:{each['name']}"
    for each in status.get("containerStatuses") or []:
        if reason := _trouble(each):
            return reason
    if status.get("reason"):
        return str(status["reason"])
    phase = str(status.get("phase", "Unknown"))
    if phase == "Running" and not _is_ready(status):
        return "Starting"
    return phase


def _message(pod: Mapping[str, Any]) -> str:
    """Why it does not serve, in the words of the kubelet, the scheduler or the container."""
    status = pod.get("status") or {}
    statuses = _containers(status)
    for each in statuses:
        waiting = (each.get("state") or {}).get("waiting") or {}
        ended = _ended(each)
        if waiting.get("reason") == "CrashLoopBackOff" and ended:
            return f"{each['name']} ended with {_end(ended)}"
        if waiting.get("message"):
            return f"{each['name']}: {waiting['message']}"
    for each in statuses:
        ended = _ended(each)
        if ended and ended.get("exitCode") and not each.get("ready"):
            return f"{each['name']} ended with {_end(ended)}"
    if status.get("message"):
        return str(status["message"])
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return str(condition.get("message", ""))
    return ""


def _end(ended: Mapping[str, Any]) -> str:
    words = str(ended.get("message") or "").strip()
    reason = str(ended.get("reason") or "Error")
    code = f"exit code {ended.get('exitCode')}"
    return f"{code} ({reason}): {words}" if words else f"{code} ({reason})"


def _containers(status: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]


def _trouble(each: Mapping[str, Any]) -> str:
    """Why a container waits or has failed; "" while all is as it should be."""
    state = each.get("state") or {}
    reason = str((state.get("waiting") or {}).get("reason") or "")
    if reason and reason not in ("PodInitializing", "ContainerCreating"):
        return reason
    ended = state.get("terminated") or {}
    if ended.get("exitCode"):
        return str(ended.get("reason") or "Error")
    return ""


def _ended(each: Mapping[str, Any]) -> Mapping[str, Any]:
    """How a container's last run ended; {} where it has not."""
    found: Mapping[str, Any] = (
        (each.get("state") or {}).get("terminated")
        or (each.get("lastState") or {}).get("terminated")
        or {}
    )
    return found


def _began(each: Mapping[str, Any]) -> bool:
    return _running(each) or bool(_ended(each))


def _running(each: Mapping[str, Any]) -> bool:
    return "running" in (each.get("state") or {})


def _is_ready(status: Mapping[str, Any]) -> bool:
    return any(
        condition.get("type") == "Ready" and condition.get("status") == "True"
        for condition in status.get("conditions") or []
    )
