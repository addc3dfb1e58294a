"""Names, labels and owners of everything that belongs to a service."""

from typing import Any

from shoal.api.names import (
    API_VERSION,
    APP,
    KIND,
    LABEL_COMPONENT,
    LABEL_MANAGED_BY,
    LABEL_NAME,
    LABEL_ROLE,
    LABEL_SERVICE,
    MANAGER,
    ROLE_LEADER,
)
from shoal.api.types import InferenceService, InferenceServiceSpec
from shoal.operator.platform import PodDefaults


def pod_name(service: str, revision: str, replica: int, member: int = 0) -> str:
    """At most 40 + 1 + 5 + 1 + 5 + 1 + 7 characters: a DNS label, which Kubernetes bounds at 63."""
    leader = f"{service}-{revision[:5]}-{replica}"
    return f"{leader}-{member}" if member else leader


def workers_name(service: str) -> str:
    """The headless Service under which the pods of a service find each other."""
    return f"{service}-workers"


def routes_name(service: str) -> str:
    """The ConfigMap that holds the route table."""
    return f"{service}-routes"


def group_token_name(service: str) -> str:
    """The Secret with which the pods of a group know each other."""
    return f"{service}-group-token"


def controller_revision_name(service: str, revision: str) -> str:
    """The ControllerRevision that keeps a revision's spec."""
    return f"{service}-{revision}"


def ranks_of(spec: InferenceServiceSpec) -> int:
    """Processes that share the model of one replica."""
    return spec.parallelism.tensor * spec.parallelism.pipeline


def group_size(spec: InferenceServiceSpec, pods: PodDefaults) -> int:
    """Pods of one replica: as many as its ranks need, one rank a GPU, or one a pod on CPUs;
    one where a pod takes whole replicas."""
    if pods.whole_replicas:
        return 1
    return -(-ranks_of(spec) // max(1, spec.resources.gpus_per_node))


def selector(service: str) -> str:
    """Label selector of the pods that count as replicas: leaders alone."""
    return f"{LABEL_SERVICE}={service},{LABEL_ROLE}={ROLE_LEADER}"


def worker_labels(service: str) -> dict[str, str]:
    """What selects every worker pod of a service."""
    return {LABEL_SERVICE: service, LABEL_COMPONENT: "worker"}


def metadata(service: InferenceService, name: str, labels: dict[str, str]) -> dict[str, Any]:
    """Metadata of an object that the service owns and that goes with it.

    The owner does not block: deleting a service in the foreground must not wait for a drain.
    """
    found: dict[str, Any] = {
        "name": name,
        "namespace": service.metadata.namespace,
        "labels": {
            LABEL_SERVICE: service.name,
            LABEL_NAME: APP,
            LABEL_MANAGED_BY: MANAGER,
            **labels,
        },
    }
    if service.metadata.uid is not None:
        found["ownerReferences"] = [
            {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "name": service.name,
                "uid": service.metadata.uid,
                "controller": True,
                "blockOwnerDeletion": False,
            }
        ]
    return found
