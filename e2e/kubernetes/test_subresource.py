"""The number of replicas, by those who scale from outside."""

from e2e.cluster import services
from e2e.cluster.command import wait_for
from e2e.cluster.kube import Object, condition
from e2e.cluster.platform import Platform
from e2e.cluster.testbed import Testbed

NAME = "scaled"


def test_replicas_follow_kubectl_scale_and_a_real_autoscaler(
    cluster: Testbed, shoal: Platform, namespace: str
) -> None:
    """Both write the scale subresource of the service, and pods follow; paused holds back changes
    and leaves scaling alone."""
    kube = cluster.kube

    def pods(revisions: int, count: int) -> bool:
        found = services.workers(kube, namespace, NAME)
        seen = {pod["metadata"]["labels"]["serving.shoal.dev/revision"] for pod in found}
        return len(found) == count and len(seen) == revisions

    # No node has that label: pods are made, and no engine starts.
    nowhere = {"spec": {"nodeSelector": {"example.com/nowhere": "yes"}}}
    kube.apply(namespace, services.service(NAME, podOverlay=nowhere))
    wait_for("one pod", 30, lambda: pods(1, 1))
    kube.kubectl("scale", "infs", NAME, "-n", namespace, "--replicas=2")
    wait_for("two pods", 30, lambda: pods(1, 2))
    kube.patch("infs", NAME, namespace, {"spec": {"paused": True, "engine": {"maxNumSeqs": 8}}})
    wait_for(
        "the change held back",
        30,
        lambda: (
            condition(kube.get("infs", NAME, namespace), "Progressing").get("reason") == "Paused"
        ),
    )
    autoscaler = _autoscaler(NAME, at_least=3)
    kube.apply(namespace, autoscaler)
    # It looks every 15 s, and brings the number to its least without any metric.
    wait_for("three pods", 60, lambda: pods(1, 3))
    assert kube.get("infs", NAME, namespace)["spec"]["replicas"] == 3
    assert kube.get("hpa", NAME, namespace)["status"]["currentReplicas"] >= 1


def _autoscaler(name: str, *, at_least: int) -> Object:
    resource = {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": name},
        "spec": {
            "scaleTargetRef": {
                "apiVersion": "serving.shoal.dev/v1alpha1",
                "kind": "InferenceService",
                "name": name,
            },
            "minReplicas": at_least,
            "maxReplicas": at_least + 1,
            "metrics": [{"type": "Resource", "resource": resource}],
        },
    }
