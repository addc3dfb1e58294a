"""Pod manifests: what a worker of a revision is, as Kubernetes reads it.

A replica is a group of pods; where its ranks fit into one, a group of one. The local applier runs
the same manifest: the container's command, arguments and SHOAL_ environment as a process, its
probes as calls, and of what surrounds it a cache on the host alone.
"""

import math
from dataclasses import dataclass
from typing import Any, Final

from shoal.api.names import (
    ENV_HOST,
    ENV_METRICS_PORT,
    ENV_POD_NAME,
    ENV_PORT,
    ENV_REVISION,
    LABEL_GROUP_SIZE,
    LABEL_MEMBER,
    LABEL_REPLICA,
    LABEL_REVISION,
    LABEL_ROLE,
    PORT_ENGINE_GRPC,
    PORT_ENGINE_METRICS,
    ROLE_FOLLOWER,
    ROLE_LEADER,
)
from shoal.api.quantity import to_bytes, to_cores
from shoal.api.types import ApiModel, CacheType, InferenceService, InferenceServiceSpec
from shoal.operator.metadata import group_size, metadata, pod_name, worker_labels
from shoal.operator.overlay import OverlayError, merged
from shoal.operator.podspec import (
    WORKER_CONTAINER,
    env_list,
    environment,
    group_environment,
    image_of,
    security,
    surroundings,
    volume_mounts,
)
from shoal.operator.revision import Revision

WORKER_COMMAND: Final = ("python", "-m", "shoal.worker")
CLUSTER_COMMAND: Final = ("python", "-m", "shoal.worker.cluster")
LEADER_COMMAND: Final = (*CLUSTER_COMMAND, "leader")
FOLLOWER_COMMAND: Final = (*CLUSTER_COMMAND, "follower")
HEALTH_LIVE: Final = "live"  # the health service that says whether the engine still beats
STOP_MARGIN_SECONDS: Final = 15  # after draining, for the process to end
# Settings that become flags under their own name; `threads` and memory are worked out.
_FLAGS: Final = (
    "max_model_len",
    "max_num_seqs",
    "max_batched_tokens",
    "max_prefill_tokens",
    "block_size",
    "kv_cache_memory_fraction",
    "kv_cache_blocks",
    "enable_prefix_caching",
    "dtype",
    "quantization",
)
_PARALLEL_FLAGS: Final = ("tensor", "pipeline", "executor")


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod to be made: its place in the plan, and its manifest."""

    name: str
    revision: str
    replica: int
    manifest: dict[str, Any]
    member: int = 0  # of its group; 0 leads
    group_size: int = 1


def build_group(service: InferenceService, revision: Revision, replica: int) -> tuple[Pod, ...]:
    """The pods of replica `replica` (from 0) of a revision, which need not be the present one;
    the leader first. OverlayError where an overlay cannot be merged."""
    size = group_size(revision.spec, revision.pods)
    return tuple(_pod(service, revision, replica, member) for member in range(size))


def _pod(service: InferenceService, revision: Revision, replica: int, member: int) -> Pod:
    size = group_size(revision.spec, revision.pods)
    name = pod_name(service.name, revision.name, replica, member)
    labels = {
        **worker_labels(service.name),
        LABEL_REVISION: revision.name,
        LABEL_REPLICA: str(replica),
        LABEL_ROLE: ROLE_FOLLOWER if member else ROLE_LEADER,
        LABEL_MEMBER: str(member),
        LABEL_GROUP_SIZE: str(size),
    }
    own = metadata(service, name, labels)
    template = {
        "metadata": own,
        "spec": {
            **surroundings(service, revision, replica, member),
            "terminationGracePeriodSeconds": service.spec.rollout.drain_seconds
            + STOP_MARGIN_SECONDS,
            "containers": [_container(service, revision, replica, member)],
        },
    }
    manifest = {"apiVersion": "v1", "kind": "Pod", **_overlaid(template, revision)}
    return Pod(name, revision.name, replica, manifest, member, size)


def _overlaid(template: dict[str, Any], revision: Revision) -> dict[str, Any]:
    """The template under both overlays; the names and labels that Shoal goes by stand."""
    result = template
    for whose, overlay in (
        ("the operator's pod defaults: podOverlay", revision.pods.pod_overlay),
        ("spec.podOverlay", revision.spec.pod_overlay),
    ):
        try:
            result = merged(result, overlay)
        except OverlayError as error:
            raise OverlayError(f"{whose}: {error}") from None
        containers = result["spec"].get("containers", [])
        if not any(container["name"] == WORKER_CONTAINER for container in containers):
            raise OverlayError(f"{whose}: spec.containers: {WORKER_CONTAINER} must stay")
    own = template["metadata"]
    kept = {**result["metadata"], **{key: own[key] for key in own if key != "labels"}}
    kept["labels"] = {**result["metadata"].get("labels", {}), **own["labels"]}
    return {**result, "metadata": kept}


def worker_args(spec: InferenceServiceSpec, drain_seconds: int) -> list[str]:
    """Flags of `python -m shoal.worker`; settings at their default are left to the worker."""
    args = ["--model", spec.model.uri]
    if spec.model.revision is not None:
        args += ["--model-revision", spec.model.revision]
    for name in _FLAGS:
        args += _flag(spec.engine, name)
    for name in _PARALLEL_FLAGS:
        args += _flag(spec.parallelism, name)
    if (threads := _threads(spec)) is not None:
        args += ["--threads", str(threads)]
    if spec.resources.memory is not None:
        args += ["--memory-limit-bytes", str(to_bytes(spec.resources.memory))]
    if spec.cache.type is not CacheType.NONE:
        args.append("--packed-cache")  # a volume that outlives the pod
    return [*args, "--drain-seconds", str(drain_seconds)]


def _container(
    service: InferenceService, revision: Revision, replica: int, member: int
) -> dict[str, Any]:
    values = {
        ENV_HOST: "0.0.0.0",
        ENV_PORT: str(PORT_ENGINE_GRPC),
        ENV_METRICS_PORT: str(PORT_ENGINE_METRICS),
        ENV_POD_NAME: pod_name(service.name, revision.name, replica, member),
        ENV_REVISION: revision.name,
        **environment(),
        **group_environment(service, revision, replica, member),
    }
    drain_seconds = service.spec.rollout.drain_seconds
    container: dict[str, Any] = {
        "name": WORKER_CONTAINER,
        **image_of(revision.pods),
        "env": env_list(values),
        "volumeMounts": volume_mounts(revision),
        "securityContext": security(),
        # Where a process could not write its last words, the end of its log stands for them.
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    if resources := _resources(revision.spec):
        container["resources"] = resources
    if member:
        return {**container, **_follower(drain_seconds)}
    alone = group_size(revision.spec, revision.pods) == 1
    return {
        **container,
        "command": list(WORKER_COMMAND if alone else LEADER_COMMAND),
        "args": worker_args(revision.spec, drain_seconds),
        "ports": [
            {"name": "grpc", "containerPort": PORT_ENGINE_GRPC, "protocol": "TCP"},
            {"name": "metrics", "containerPort": PORT_ENGINE_METRICS, "protocol": "TCP"},
        ],
        # Loading a large model may take an hour; only after it does the engine have to beat.
        "startupProbe": _health("", period=2, failures=1800),
        "readinessProbe": _health("", period=1, failures=3),
        "livenessProbe": _health(HEALTH_LIVE, period=10, failures=6),
        "lifecycle": {"preStop": {"exec": {"command": _pre_stop(drain_seconds)}}},
    }


def _follower(drain_seconds: int) -> dict[str, Any]:
    """What is a follower's own: it lives while it waits for its leader, is ready once its node
    has joined, and stays until the leader, deleted at the same time, has drained."""
    hook = [*CLUSTER_COMMAND, "prestop", "--drain-seconds", str(drain_seconds)]
    return {
        "command": list(FOLLOWER_COMMAND),
        "ports": [{"name": "health", "containerPort": PORT_ENGINE_METRICS, "protocol": "TCP"}],
        "startupProbe": _answers("/live", period=2, failures=60),
        "readinessProbe": _answers("/ready", period=1, failures=3),
        "livenessProbe": _answers("/live", period=10, failures=6),
        "lifecycle": {"preStop": {"exec": {"command": hook}}},
    }


def _answers(path: str, *, period: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": PORT_ENGINE_METRICS, "scheme": "HTTP"},
        "periodSeconds": period,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _pre_stop(drain_seconds: int) -> list[str]:
    """Runs before SIGTERM however the pod is deleted: requests end while routers learn of it."""
    return ["python", "-m", "shoal.worker.prestop", "--drain-seconds", str(drain_seconds)]


def _health(service: str, *, period: int, failures: int) -> dict[str, Any]:
    return {
        "grpc": {"port": PORT_ENGINE_GRPC, "service": service},
        "periodSeconds": period,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _resources(spec: InferenceServiceSpec) -> dict[str, Any]:
    """CPU is asked for, not capped: throttling in the middle of a step costs latency. Memory is
    asked for and capped at the same size, since the KV cache is allocated at the start."""
    requests: dict[str, str] = {}
    if spec.resources.cpu is not None:
        requests["cpu"] = spec.resources.cpu
    if spec.resources.memory is not None:
        requests["memory"] = spec.resources.memory
    resources: dict[str, Any] = {"requests": requests} if requests else {}
    limits = {} if spec.resources.memory is None else {"memory": spec.resources.memory}
    if spec.resources.gpus_per_node:
        limits[spec.resources.gpu_resource] = str(spec.resources.gpus_per_node)
    return {**resources, **({"limits": limits} if limits else {})}


def _threads(spec: InferenceServiceSpec) -> int | None:
    if spec.engine.threads is not None:
        return spec.engine.threads
    if spec.resources.cpu is not None:
        return max(1, math.floor(to_cores(spec.resources.cpu)))
    return None


def _flag(section: ApiModel, name: str) -> list[str]:
    value = getattr(section, name)
    if value == type(section).model_fields[name].default:
        return []
    kebab = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{kebab}" if value else f"--no-{kebab}"]
    return [f"--{kebab}", str(value)]
