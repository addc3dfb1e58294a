"""Pod manifests: what a worker of a revision is, as Kubernetes reads it.

The local applier runs the same manifest: the container's command, arguments and environment as
a process, its probes as calls, its image ignored.
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
    LABEL_COMPONENT,
    LABEL_MANAGED_BY,
    LABEL_REPLICA,
    LABEL_REVISION,
    LABEL_ROLE,
    LABEL_SERVICE,
    MANAGER,
    PORT_ENGINE_GRPC,
    PORT_ENGINE_METRICS,
    ROLE_LEADER,
)
from shoal.api.quantity import to_bytes, to_cores
from shoal.api.types import EngineSpec, InferenceService, InferenceServiceSpec
from shoal.operator.revision import Revision

WORKER_COMMAND: Final = ("python", "-m", "shoal.worker")
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
)


@dataclass(frozen=True, slots=True)
class PodDefaults:
    """What the operator's own configuration says about every pod."""

    image: str = "shoal-worker"


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod to be made: its place in the plan, and its manifest."""

    name: str
    revision: str
    replica: int
    manifest: dict[str, Any]


def pod_name(service: str, revision: str, replica: int) -> str:
    """At most 40 + 1 + 5 + 1 + 5 characters: a DNS label, which Kubernetes bounds at 63."""
    return f"{service}-{revision[:5]}-{replica}"


def selector(service: str) -> str:
    """Label selector of the pods that count as replicas: leaders alone."""
    return f"{LABEL_SERVICE}={service},{LABEL_ROLE}={ROLE_LEADER}"


def build_pod(
    service: InferenceService, revision: Revision, replica: int, defaults: PodDefaults
) -> Pod:
    """The pod of replica `replica` (from 0) of a revision, which need not be the present one."""
    drain_seconds = service.spec.rollout.drain_seconds
    name = pod_name(service.name, revision.name, replica)
    labels = {
        LABEL_SERVICE: service.name,
        LABEL_REVISION: revision.name,
        LABEL_REPLICA: str(replica),
        LABEL_ROLE: ROLE_LEADER,
        LABEL_COMPONENT: "worker",
        LABEL_MANAGED_BY: MANAGER,
    }
    manifest = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": service.metadata.namespace, "labels": labels},
        "spec": {
            "restartPolicy": "Always",
            "terminationGracePeriodSeconds": drain_seconds + STOP_MARGIN_SECONDS,
            "containers": [_container(name, revision, drain_seconds, defaults)],
        },
    }
    return Pod(name, revision.name, replica, manifest)


def worker_args(spec: InferenceServiceSpec, drain_seconds: int) -> list[str]:
    """Flags of `python -m shoal.worker`; settings at their default are left to the worker."""
    args = ["--model", spec.model.uri]
    if spec.model.revision is not None:
        args += ["--model-revision", spec.model.revision]
    for name in _FLAGS:
        args += _flag(spec.engine, name)
    if (threads := _threads(spec)) is not None:
        args += ["--threads", str(threads)]
    if spec.resources.memory is not None:
        args += ["--memory-limit-bytes", str(to_bytes(spec.resources.memory))]
    return [*args, "--drain-seconds", str(drain_seconds)]


def _container(
    pod: str, revision: Revision, drain_seconds: int, defaults: PodDefaults
) -> dict[str, Any]:
    environment = {
        ENV_HOST: "0.0.0.0",
        ENV_PORT: str(PORT_ENGINE_GRPC),
        ENV_METRICS_PORT: str(PORT_ENGINE_METRICS),
        ENV_POD_NAME: pod,
        ENV_REVISION: revision.name,
    }
    container: dict[str, Any] = {
        "name": "worker",
        "image": defaults.image,
        "command": list(WORKER_COMMAND),
        "args": worker_args(revision.spec, drain_seconds),
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "ports": [
            {"name": "grpc", "containerPort": PORT_ENGINE_GRPC},
            {"name": "metrics", "containerPort": PORT_ENGINE_METRICS},
        ],
        # Loading a large model may take an hour; only after it does the engine have to beat.
        "startupProbe": _health("", period=2, failures=1800),
        "readinessProbe": _health("", period=1, failures=3),
        "livenessProbe": _health(HEALTH_LIVE, period=10, failures=6),
    }
    if resources := _resources(revision.spec):
        container["resources"] = resources
    return container


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
    if spec.resources.memory is not None:
        resources["limits"] = {"memory": spec.resources.memory}
    return resources


def _threads(spec: InferenceServiceSpec) -> int | None:
    if spec.engine.threads is not None:
        return spec.engine.threads
    if spec.resources.cpu is not None:
        return max(1, math.floor(to_cores(spec.resources.cpu)))
    return None


def _flag(engine: EngineSpec, name: str) -> list[str]:
    value = getattr(engine, name)
    if value == EngineSpec.model_fields[name].default:
        return []
    kebab = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{kebab}" if value else f"--no-{kebab}"]
    return [f"--{kebab}", str(value)]
