"""A live pod of the API server, as the planner sees it, and in words what is wrong with it.

Reasons are Kubernetes' own where it has one. Messages name the container, what happened, and
what to change: a field of the InferenceService where one helps.
"""

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Final

from shoal.api.names import (
    ANNOTATION_DRAIN_STARTED,
    LABEL_GROUP_SIZE,
    LABEL_MEMBER,
    LABEL_REPLICA,
    LABEL_REVISION,
    PORT_ENGINE_GRPC,
)
from shoal.operator.observe import ObservedPod
from shoal.operator.podspec import FETCH_CONTAINER, WORKER_CONTAINER

_IMAGE_REASONS: Final = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
)
_ENDED_PHASES: Final = ("Failed", "Succeeded")
# What the scheduler says, and the field that decides about it.
_SCHEDULER_HINTS: Final = (
    (r"Insufficient cpu", "spec.resources.cpu"),
    (r"Insufficient memory", "spec.resources.memory"),
    (r"Insufficient [a-z0-9.-]+/", "spec.resources.gpusPerNode and spec.resources.gpuResource"),
    (r"untolerated taint", "spec.podOverlay.spec.tolerations"),
    (r"node affinity|node selector|nodeSelector", "spec.podOverlay.spec.nodeSelector and affinity"),
    (r"persistentvolumeclaim", "spec.cache.claimName"),
    (r"topology spread", "spec.podOverlay.spec.topologySpreadConstraints"),
)
_PERCENT_STEP: Final = 5
_MANY_RESTARTS: Final = 2
_LONGEST_WORDS: Final = 500  # characters of somebody else's words in a message


def observed_pod(
    pod: Mapping[str, Any], nodes: Mapping[str, bool], progress: str = ""
) -> ObservedPod:
    """The pod as the planner sees it.

    `nodes`: whether a node answers, by name; one that is not named counts as answering.
    `progress`: the last line that the container named by `fetching` has logged.
    """
    meta, status = pod["metadata"], pod.get("status", {})
    labels = meta.get("labels", {})
    ended = status.get("phase") in _ENDED_PHASES
    node = pod.get("spec", {}).get("nodeName")
    gone_node = not ended and node is not None and not nodes.get(node, True)
    lost = ended or gone_node
    ready = not lost and _condition(pod, "Ready").get("status") == "True"
    reason, message = ("", "") if ready else _trouble(pod, gone_node, progress)
    return ObservedPod(
        name=meta["name"],
        revision=labels.get(LABEL_REVISION, ""),
        replica=_number(labels.get(LABEL_REPLICA), 0),
        created=_time(meta.get("creationTimestamp")),
        address=_address(status.get("podIP")),
        ready=ready,
        drain_started=drain_started(pod),
        deleting=meta.get("deletionTimestamp") is not None,
        restarts=sum(c.get("restartCount", 0) for c in status.get("containerStatuses") or ()),
        reason=reason,
        message=message,
        member=_number(labels.get(LABEL_MEMBER), 0),
        group_size=_number(labels.get(LABEL_GROUP_SIZE), 1),
        started=any(_has_run(c) for c in status.get("containerStatuses") or ()),
        lost=lost,
        gone_node=gone_node,
        fetched=_percent(progress) if fetching(pod) is not None else None,
    )


def fetching(pod: Mapping[str, Any]) -> str | None:
    """The init container that downloads the model right now; its log tells how far it is."""
    for status in pod.get("status", {}).get("initContainerStatuses") or ():
        if status["name"] == FETCH_CONTAINER and "running" in status.get("state", {}):
            return FETCH_CONTAINER
    return None


def drain_started(pod: Mapping[str, Any]) -> float | None:
    """When the pod was marked; None also for what is no time: it is no mark of ours."""
    annotations = pod["metadata"].get("annotations") or {}
    try:
        return float(annotations[ANNOTATION_DRAIN_STARTED])
    except (KeyError, ValueError):
        return None


def _trouble(pod: Mapping[str, Any], gone_node: bool, progress: str) -> tuple[str, str]:
    """(reason, message) of a pod that is not ready; the most telling one."""
    if _ended_by_itself(pod):
        return _ended(pod)
    if gone_node:
        node = pod["spec"]["nodeName"]
        place = "another replica takes its place once no router reaches this one"
        return "NodeLost", f"node {node} does not answer; {place}"
    if pod["metadata"].get("deletionTimestamp") is not None:
        return "Terminating", "the pod is being deleted"
    scheduled = _condition(pod, "PodScheduled")
    if scheduled.get("status") == "False":
        return _unscheduled(scheduled)
    for container, state in _containers(pod):
        if told := _container_trouble(container, state, progress):
            return told
    return "Starting", ""


def _ended_by_itself(pod: Mapping[str, Any]) -> bool:
    """Whether it ended for good; where somebody deletes it, that is what was wanted."""
    deleted = pod["metadata"].get("deletionTimestamp") is not None
    return not deleted and pod.get("status", {}).get("phase") in _ENDED_PHASES


def _ended(pod: Mapping[str, Any]) -> tuple[str, str]:
    status = pod["status"]
    reason = _word(status.get("reason") or "PodEnded")
    node = pod.get("spec", {}).get("nodeName")
    where = f" on node {node}" if node else ""
    said = _words(status.get("message")) or "it ended for good"
    if reason == "Evicted":
        said += "; where memory or disk ran short, set spec.resources.memory to what the pod needs"
    return reason, f"the pod ended{where}: {said}; it is replaced"


def _unscheduled(scheduled: Mapping[str, Any]) -> tuple[str, str]:
    reason, said = _word(scheduled.get("reason") or "Unschedulable"), scheduled.get("message", "")
    fields = [field for pattern, field in _SCHEDULER_HINTS if re.search(pattern, said)]
    advice = f"; what decides about it: {', '.join(fields)}" if fields else ""
    return reason, f"no node takes the pod: {_words(said) or 'the scheduler says no more'}{advice}"


def _container_trouble(
    container: Mapping[str, Any], status: Mapping[str, Any], progress: str
) -> tuple[str, str] | None:
    """What one container says of why its pod is not ready; None: it is not the cause."""
    state, name = status.get("state", {}), container["name"]
    init = "init" in container
    before, restarts = status.get("lastState", {}).get("terminated"), status.get("restartCount", 0)
    if (now := state.get("terminated")) is not None:
        if init and now.get("exitCode") == 0:
            return None
        return _termination(container, now, restarts)
    if (waiting := state.get("waiting")) is not None:
        reason, said = waiting.get("reason") or "Waiting", _words(waiting.get("message"))
        if reason in _IMAGE_REASONS:
            return reason, (
                f"container {name}: image {container.get('image', '')} cannot be had: "
                f"{said or reason}; check its name, and imagePullSecrets in the pod defaults"
            )
        if reason == "CrashLoopBackOff" and before is not None:
            return _termination(container, before, _MANY_RESTARTS)
        if reason in ("PodInitializing", "ContainerCreating"):
            return (reason, f"container {name} is being created") if not init else None
        return _word(reason), f"container {name}: {said or reason}"
    if init:
        percent = _percent(progress)
        if before is not None and restarts >= _MANY_RESTARTS and percent is None:
            return _termination(container, before, restarts)
        if name == FETCH_CONTAINER:
            so_far = f", {percent} % so far" if percent is not None else ""
            return "FetchingModel", f"container {name} downloads the model{so_far}"
        return "Initializing", f"container {name} runs"
    if status.get("ready"):
        return None
    if before is not None and not status.get("started"):
        return _termination(container, before, restarts)
    if status.get("started"):
        return "Unhealthy", f"container {name} runs but its readiness probe fails"
    return "Starting", f"container {name} loads the model" if name == WORKER_CONTAINER else (
        f"container {name} is not ready yet"
    )


def _termination(
    container: Mapping[str, Any], terminated: Mapping[str, Any], restarts: int
) -> tuple[str, str]:
    """Why a container ended. One that does so again and again has that reason also while it
    starts anew, and the same words: they would come and go otherwise."""
    name, code = container["name"], terminated.get("exitCode")
    if terminated.get("reason") == "OOMKilled":
        limit = container.get("resources", {}).get("limits", {}).get("memory")
        cause = f"its memory limit of {limit}" if limit else "the memory of its node"
        return "OOMKilled", (
            f"container {name} was killed for using more than {cause}: raise "
            f"spec.resources.memory, or lower spec.engine.maxModelLen or maxNumSeqs; "
            f"it is started again"
        )
    said = _words(terminated.get("message"))
    ended = (
        f"ended by signal {terminated['signal']}"
        if terminated.get("signal")
        else f"ended with exit code {code}"
    )
    message = f"container {name} {ended}{f': {said}' if said else ''}; it is started again"
    if name == FETCH_CONTAINER:
        return "FetchFailed", message
    return "CrashLoopBackOff" if restarts >= _MANY_RESTARTS else "Restarted", message


def _containers(pod: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], Mapping[str, Any]]]:
    """Every container with its status, in the order in which they run."""
    for key, statuses, extra in (
        ("initContainers", "initContainerStatuses", {"init": True}),
        ("containers", "containerStatuses", {}),
    ):
        specs = {c["name"]: c for c in pod.get("spec", {}).get(key) or ()}
        for status in pod.get("status", {}).get(statuses) or ():
            spec = specs.get(status["name"], {"name": status["name"]})
            sidecar = spec.get("restartPolicy") == "Always"
            yield {**spec, **({} if sidecar else extra)}, status


def _percent(progress: str) -> int | None:
    """In steps, so that a download does not mean a write of the status every second."""
    found = re.search(r"(\d{1,3})(?:\.\d+)?\s?%", progress)
    return min(100, int(found[1])) // _PERCENT_STEP * _PERCENT_STEP if found else None


def _condition(pod: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    conditions = pod.get("status", {}).get("conditions") or ()
    return next((c for c in conditions if c.get("type") == kind), {})


def _has_run(status: Mapping[str, Any]) -> bool:
    states = (status.get("state", {}), status.get("lastState", {}))
    return any("running" in state or "terminated" in state for state in states)


def _address(ip: str | None) -> str | None:
    if not ip:
        return None
    return f"[{ip}]:{PORT_ENGINE_GRPC}" if ":" in ip else f"{ip}:{PORT_ENGINE_GRPC}"


def _number(text: str | None, otherwise: int) -> int:
    return int(text) if text is not None and text.isdecimal() else otherwise


def _time(text: str | None) -> float:
    return datetime.fromisoformat(text).timestamp() if text else 0.0


def _word(reason: str) -> str:
    """A reason that a condition may have: one word."""
    return re.sub(r"[^A-Za-z0-9_]", "", reason) or "Unknown"


def _words(text: str | None) -> str:
    """Somebody else's words on one line, not too long, without a full stop."""
    flat = " ".join((text or "").split()).rstrip(".")
    return flat if len(flat) <= _LONGEST_WORDS else f"…{flat[-_LONGEST_WORDS:]}"
