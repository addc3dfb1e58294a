"""A live pod of the API server, as the planner sees it, and in words what is wrong with it.

What concerns a single container is in `containers`.
"""

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from shoal.api.names import (
    ANNOTATION_DRAIN_STARTED,
    ANNOTATION_SERVES,
    LABEL_GROUP_SIZE,
    LABEL_MEMBER,
    LABEL_REPLICA,
    LABEL_REVISION,
    PORT_ENGINE_GRPC,
)
from shoal.operator.containers import Trouble, containers, percent, word, words
from shoal.operator.inplace import revisions_of
from shoal.operator.observe import ObservedPod
from shoal.operator.podspec import FETCH_CONTAINER, WORKER_CONTAINER

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
    restarts = sum(c.get("restartCount", 0) for c in status.get("containerStatuses") or ())
    mark = (meta.get("annotations") or {}).get(ANNOTATION_SERVES)
    revision, born = revisions_of(labels.get(LABEL_REVISION, ""), mark, restarts)
    trouble = Trouble("", "") if ready else _trouble(pod, gone_node, progress)
    return ObservedPod(
        name=meta["name"],
        revision=revision,
        replica=_number(labels.get(LABEL_REPLICA), 0),
        created=_time(meta.get("creationTimestamp")),
        address=_address(status.get("podIP")),
        ready=ready,
        drain_started=drain_started(pod),
        deleting=meta.get("deletionTimestamp") is not None,
        restarts=restarts,
        reason=trouble.reason,
        message=trouble.message,
        member=_number(labels.get(LABEL_MEMBER), 0),
        group_size=_number(labels.get(LABEL_GROUP_SIZE), 1),
        started=any(_has_run(c) for c in status.get("containerStatuses") or ()),
        lost=lost,
        gone_node=gone_node,
        fetched=percent(progress) if fetching(pod) is not None else None,
        scheduled=_since(_condition(pod, "PodScheduled")),
        launched=_launched(pod),
        born=born,
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


def _trouble(pod: Mapping[str, Any], gone_node: bool, progress: str) -> Trouble:
    """Of a pod that is not ready: the most telling one."""
    if _ended_by_itself(pod):
        return _ended(pod)
    if gone_node:
        node = pod["spec"]["nodeName"]
        place = "another replica takes its place once no router reaches this one"
        return Trouble("NodeLost", f"node {node} does not answer; {place}")
    if pod["metadata"].get("deletionTimestamp") is not None:
        return Trouble("Terminating", "the pod is being deleted")
    scheduled = _condition(pod, "PodScheduled")
    if scheduled.get("status") == "False":
        return _unscheduled(scheduled)
    for container in containers(pod):
        if (found := container.trouble(progress)) is not None:
            return found
    return Trouble("Starting", "")


def _ended_by_itself(pod: Mapping[str, Any]) -> bool:
    """Whether it ended for good; where somebody deletes it, that is what was wanted."""
    deleted = pod["metadata"].get("deletionTimestamp") is not None
    return not deleted and pod.get("status", {}).get("phase") in _ENDED_PHASES


def _ended(pod: Mapping[str, Any]) -> Trouble:
    status = pod["status"]
    reason = word(status.get("reason") or "PodEnded")
    node = pod.get("spec", {}).get("nodeName")
    where = f" on node {node}" if node else ""
    said = words(status.get("message")) or "it ended for good"
    if reason == "Evicted":
        said += "; where memory or disk ran short, set spec.resources.memory to what the pod needs"
    return Trouble(reason, f"the pod ended{where}: {said}; it is replaced")


def _unscheduled(scheduled: Mapping[str, Any]) -> Trouble:
    reason, said = word(scheduled.get("reason") or "Unschedulable"), scheduled.get("message", "")
    fields = [field for pattern, field in _SCHEDULER_HINTS if re.search(pattern, said)]
    advice = f"; what decides about it: {', '.join(fields)}" if fields else ""
    cause = words(said) or "the scheduler says no more"
    return Trouble(reason, f"no node takes the pod: {cause}{advice}")


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


def _since(condition: Mapping[str, Any]) -> float | None:
    """When a condition came to hold; None where it does not."""
    if condition.get("status") != "True":
        return None
    return _time(condition.get("lastTransitionTime")) or None


def _launched(pod: Mapping[str, Any]) -> float | None:
    """When the engine's process began."""
    statuses = pod.get("status", {}).get("containerStatuses") or ()
    running = (s.get("state", {}).get("running") for s in statuses if s["name"] == WORKER_CONTAINER)
    return next((_time(found.get("startedAt")) for found in running if found), None)
