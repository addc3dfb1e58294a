"""Driver hpa: Kubernetes' own autoscaler scales a service by the operator's metrics."""

import json
from collections.abc import Mapping
from typing import Any

from e2e.cluster.command import wait_for
from e2e.cluster.kube import Kube, condition, timed
from e2e.cluster.platform import Platform
from e2e.cluster.report import Report
from e2e.cluster.services import service, workers
from e2e.cluster.testbed import Testbed


def test_a_real_autoscaler_follows_the_routers(
    cluster: Testbed, shoal: Platform, namespace: str, report: Report
) -> None:
    """Driver hpa: the chart registers the metrics, the operator makes the autoscaler, and pods
    follow it; back to the driver internal, the autoscaler is gone."""
    kube = cluster.kube
    shoal.install("--set", "externalMetrics.enabled=true")
    try:
        wait_for(
            "the registration",
            60,
            lambda: (
                condition(
                    kube.get("apiservice", "v1beta1.external.metrics.k8s.io"), "Available"
                ).get("status")
                == "True"
            ),
        )
        # No node has that label: pods are made, and no engine starts, so requests wait.
        nowhere = {"spec": {"nodeSelector": {"example.com/nowhere": "yes"}}}
        scaling = {"driver": "hpa", "minReplicas": 2, "maxReplicas": 3}
        kube.apply(namespace, service("driven", podOverlay=nowhere, autoscaling=scaling))
        _, took = timed("two pods", 90, lambda: len(workers(kube, namespace, "driven")) == 2)
        report.head("Driven by Kubernetes' autoscaler", "from", "to", "seconds")
        report.row("Driven by Kubernetes' autoscaler", "apply", "minReplicas", f"{took:.1f}")
        path = f"/apis/external.metrics.k8s.io/v1beta1/namespaces/{namespace}/shoal_queue_depth"
        selector = "?labelSelector=serving.shoal.dev%2Fservice%3Ddriven"
        answer = wait_for("a value", 60, lambda: _items(kube, path + selector))
        assert answer[0]["value"] == "0"
        reason = condition(kube.get("infs", "driven", namespace), "ScalingActive")["reason"]
        assert reason == "DrivenByHpa"
        active = wait_for(
            "the autoscaler's own word",
            60,
            lambda: condition(kube.get("hpa", "driven", namespace), "ScalingActive"),
        )
        assert active["status"] == "True", active
        kube.patch("infs", "driven", namespace, {"spec": {"autoscaling": {"driver": "internal"}}})
        wait_for("no autoscaler", 60, lambda: not kube.list("hpa", namespace))
    finally:
        shoal.install()


def _items(kube: Kube, path: str) -> list[Mapping[str, Any]]:
    items: list[Mapping[str, Any]] = json.loads(kube.raw(path))["items"]
    return items
