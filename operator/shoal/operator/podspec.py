"""What surrounds the engine in a pod: volumes, init containers, security, spreading.

A pod keeps to Kubernetes' "restricted" Pod Security Standard, except for the one init container
that hands a HostPath cache to the worker's user: a folder that the kubelet makes is root's.
Writable are /tmp, which is also HOME, and the cache.
"""

from typing import Any, Final

from shoal.api.names import (
    ENV_CACHE_DIR,
    ENV_GPUS_PER_NODE,
    ENV_GROUP_MEMBER,
    ENV_GROUP_SIZE,
    ENV_LEADER_ADDRESS,
    ENV_PIPELINE_PARALLEL,
    ENV_TENSOR_PARALLEL,
    LABEL_REPLICA,
    LABEL_REVISION,
    LABEL_ROLE,
    ROLE_LEADER,
)
from shoal.api.types import CacheType, InferenceService, InferenceServiceSpec
from shoal.operator.metadata import (
    group_size,
    group_token_name,
    pod_name,
    ranks_of,
    worker_labels,
    workers_name,
)
from shoal.operator.platform import PodDefaults
from shoal.operator.revision import Revision

WORKER_CONTAINER: Final = "worker"
FETCH_CONTAINER: Final = "fetch"
OWN_CACHE_CONTAINER: Final = "own-cache"
CACHE_DIR: Final = "/var/cache/shoal"
WORKER_UID: Final = 65532
_GROUP_TOKEN_DIR: Final = "/etc/shoal/group"
_SHM_OF_RANKS: Final = "1Gi"
_TMP: Final = "/tmp"  # an emptyDir of the pod's own
# A folder that somebody gave to another user stays theirs.
_OWN_CACHE: Final = (
    f'[ "$(stat -c %u {CACHE_DIR})" != 0 ] || chown {WORKER_UID}:{WORKER_UID} {CACHE_DIR}'
)
_FETCHED_SCHEMES: Final = ("hf", "py")
_SPREAD_OVER: Final = ("kubernetes.io/hostname", "topology.kubernetes.io/zone")
_LOCKED_DOWN: Final = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def environment() -> dict[str, str]:
    """Where a process may write, and where downloaded models are."""
    return {ENV_CACHE_DIR: CACHE_DIR, "HF_HOME": f"{CACHE_DIR}/huggingface", "HOME": _TMP}


def group_environment(
    service: InferenceService, revision: Revision, replica: int, member: int
) -> dict[str, str]:
    """What the pods of a group need to find each other; {} for a group of one."""
    spec = revision.spec
    if (size := group_size(spec, revision.pods)) == 1:
        return {}
    leader = pod_name(service.name, revision.name, replica)
    namespace = service.metadata.namespace
    return {
        ENV_GROUP_SIZE: str(size),
        ENV_GROUP_MEMBER: str(member),
        ENV_LEADER_ADDRESS: f"{leader}.{workers_name(service.name)}.{namespace}.svc",
        ENV_TENSOR_PARALLEL: str(spec.parallelism.tensor),
        ENV_PIPELINE_PARALLEL: str(spec.parallelism.pipeline),
        ENV_GPUS_PER_NODE: str(spec.resources.gpus_per_node),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": f"{_GROUP_TOKEN_DIR}/token",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def security() -> dict[str, Any]:
    """Security context of a container."""
    return {**_LOCKED_DOWN}


def surroundings(
    service: InferenceService, revision: Revision, replica: int, member: int
) -> dict[str, Any]:
    """The pod's spec without the worker's container."""
    pods, spec = revision.pods, revision.spec
    found: dict[str, Any] = {
        "restartPolicy": "Always",
        "hostname": pod_name(service.name, revision.name, replica, member),
        "subdomain": workers_name(service.name),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": WORKER_UID,
            "runAsGroup": WORKER_UID,
            "fsGroup": WORKER_UID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": _volumes(service, revision),
    }
    if pods.service_account_name is not None:
        found["serviceAccountName"] = pods.service_account_name
    if pods.image_pull_secrets:
        found["imagePullSecrets"] = [{"name": name} for name in pods.image_pull_secrets]
    if inits := list(_init_containers(spec, pods)):
        found["initContainers"] = inits
    if spec.resources.gpus_per_node:
        # Nodes with GPUs are often tainted by the resource's name.
        found["tolerations"] = [{"key": spec.resources.gpu_resource, "operator": "Exists"}]
    if member == 0:
        found["topologySpreadConstraints"] = _spread(service, revision)
    if group_size(spec, pods) > 1:
        found["affinity"] = _together(service, revision, replica)
    return found


def volume_mounts(revision: Revision) -> list[dict[str, Any]]:
    """Of the worker's container."""
    mounts: list[dict[str, Any]] = [*_writable()]
    if _shm(revision.spec) is not None:
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})  # a volume
    if group_size(revision.spec, revision.pods) > 1:
        mounts.append({"name": "group", "mountPath": _GROUP_TOKEN_DIR, "readOnly": True})
    return mounts


def image_of(pods: PodDefaults) -> dict[str, str]:
    """Image and pull policy of every container."""
    policy = pods.image_pull_policy
    return {"image": pods.image, **({"imagePullPolicy": policy} if policy is not None else {})}


def env_list(values: dict[str, str]) -> list[dict[str, str]]:
    """Environment as a manifest has it."""
    return [{"name": name, "value": value} for name, value in values.items()]


def _writable() -> list[dict[str, Any]]:
    return [{"name": "tmp", "mountPath": _TMP}, {"name": "cache", "mountPath": CACHE_DIR}]


def _volumes(service: InferenceService, revision: Revision) -> list[dict[str, Any]]:
    spec = revision.spec
    volumes: list[dict[str, Any]] = [
        {"name": "tmp", "emptyDir": {}},
        {"name": "cache", **_cache_source(spec)},
    ]
    if (size := _shm(spec)) is not None:
        shm = {"medium": "Memory", "sizeLimit": size}
        volumes.append({"name": "shm", "emptyDir": shm})
    if group_size(spec, revision.pods) > 1:
        secret = {"secretName": group_token_name(service.name), "defaultMode": 0o440}
        volumes.append({"name": "group", "secret": secret})
    return volumes


def _shm(spec: InferenceServiceSpec) -> str | None:
    """Size of /dev/shm where it is a volume: ranks meet there, in more than a container's own
    64 MB."""
    if spec.resources.shm is not None:
        return spec.resources.shm
    return _SHM_OF_RANKS if ranks_of(spec) > 1 else None


def _cache_source(spec: InferenceServiceSpec) -> dict[str, Any]:
    match spec.cache.type:
        case CacheType.NONE:
            return {"emptyDir": {}}
        case CacheType.HOST_PATH:
            return {"hostPath": {"path": spec.cache.path, "type": "DirectoryOrCreate"}}
        case CacheType.PVC:
            return {"persistentVolumeClaim": {"claimName": spec.cache.claim_name}}


def _init_containers(spec: InferenceServiceSpec, pods: PodDefaults) -> list[dict[str, Any]]:
    containers: list[dict[str, Any]] = []
    scheme, separator, _ = spec.model.uri.partition("://")
    if not separator or scheme not in _FETCHED_SCHEMES:
        return containers
    if spec.cache.type is CacheType.HOST_PATH:
        containers.append(_own_cache(pods))
    args = ["--model", spec.model.uri]
    if spec.model.revision is not None:
        args += ["--model-revision", spec.model.revision]
    containers.append(
        {
            "name": FETCH_CONTAINER,
            **image_of(pods),
            "command": ["python", "-m", "shoal.worker.fetch"],
            "args": args,
            "env": env_list(environment()),
            "volumeMounts": _writable(),
            "securityContext": security(),
            "terminationMessagePolicy": "FallbackToLogsOnError",
        }
    )
    return containers


def _own_cache(pods: PodDefaults) -> dict[str, Any]:
    return {
        "name": OWN_CACHE_CONTAINER,
        **image_of(pods),
        "command": ["sh", "-c", _OWN_CACHE],
        "volumeMounts": [{"name": "cache", "mountPath": CACHE_DIR}],
        "securityContext": {
            **_LOCKED_DOWN,
            "capabilities": {"drop": ["ALL"], "add": ["CHOWN"]},
            "runAsUser": 0,
            "runAsNonRoot": False,
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def _spread(service: InferenceService, revision: Revision) -> list[dict[str, Any]]:
    """Replicas of a revision keep apart, where there is room."""
    labels = {
        **worker_labels(service.name),
        LABEL_REVISION: revision.name,
        LABEL_ROLE: ROLE_LEADER,
    }
    return [
        {
            "maxSkew": 1,
            "topologyKey": key,
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": labels},
        }
        for key in _SPREAD_OVER
    ]


def _together(service: InferenceService, revision: Revision, replica: int) -> dict[str, Any]:
    """The pods of a group stay in one zone, where they can: they talk at every step."""
    labels = {
        **worker_labels(service.name),
        LABEL_REVISION: revision.name,
        LABEL_REPLICA: str(replica),
    }
    term = {
        "topologyKey": "topology.kubernetes.io/zone",
        "labelSelector": {"matchLabels": labels},
    }
    preferred = [{"weight": 100, "podAffinityTerm": term}]
    return {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}
