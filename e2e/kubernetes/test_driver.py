"""Somebody else's autoscaler scales a service by the operator's metrics: drivers hpa and keda."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc
import httpx
import pytest

from e2e.cluster.command import wait_for
from e2e.cluster.kube import Kube, Object, condition, timed
from e2e.cluster.platform import NAMESPACE, RELEASE, Platform
from e2e.cluster.report import Report
from e2e.cluster.services import service, workers
from e2e.cluster.testbed import Testbed
from shoal.api.v1 import externalscaler_pb2 as pb
from shoal.api.v1 import externalscaler_pb2_grpc

TABLE = "Driven by somebody else's autoscaler"
# No node has that label: pods are made, and no engine starts, so requests wait.
NOWHERE: Object = {"spec": {"nodeSelector": {"example.com/nowhere": "yes"}}}
WAITING = 24  # requests
# KEDA's type, as far as an API server has to know it.
SCALED_OBJECTS: Object = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "scaledobjects.keda.sh"},
    "spec": {
        "group": "keda.sh",
        "scope": "Namespaced",
        "names": {"kind": "ScaledObject", "plural": "scaledobjects", "singular": "scaledobject"},
        "versions": [
            {
                "name": "v1alpha1",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "x-kubernetes-preserve-unknown-fields": True,
                    }
                },
            }
        ],
    },
}


def test_a_real_autoscaler_follows_the_routers(
    cluster: Testbed, shoal: Platform, namespace: str, report: Report
) -> None:
    """Driver hpa: the chart registers the metrics, the operator makes the autoscaler, and pods
    follow it, to more of them when requests wait; back to the driver internal, it is gone."""
    kube = cluster.kube
    shoal.install("--set", "externalMetrics.enabled=true")
    try:
        wait_for("the registration", 60, lambda: _registered(kube))
        scaling = {"driver": "hpa", "minReplicas": 2, "maxReplicas": 3}
        kube.apply(namespace, service("driven", podOverlay=NOWHERE, autoscaling=scaling))
        _, took = timed("two pods", 90, lambda: len(workers(kube, namespace, "driven")) == 2)
        report.head(TABLE, "driver", "from", "to", "seconds")
        report.row(TABLE, "hpa", "apply", "minReplicas", f"{took:.1f}")
        path = f"/apis/external.metrics.k8s.io/v1beta1/namespaces/{namespace}/shoal_queue_depth"
        path += "?labelSelector=serving.shoal.dev%2Fservice%3Ddriven"
        answer = wait_for("a value", 60, lambda: _items(kube, path))
        assert answer[0]["value"] == "0"
        reason = condition(kube.get("infs", "driven", namespace), "ScalingActive")["reason"]
        assert reason == "DrivenByHpa"
        active = wait_for(
            "the autoscaler's own word",
            60,
            lambda: condition(kube.get("hpa", "driven", namespace), "ScalingActive"),
        )
        assert active["status"] == "True", active
        with waiting(shoal, "driven", WAITING):
            wait_for("their number", 30, lambda: _items(kube, path)[0]["value"] == str(WAITING))
            _, took = timed("three pods", 60, lambda: len(workers(kube, namespace, "driven")) == 3)
        report.row(TABLE, "hpa", f"{WAITING} requests wait", "maxReplicas", f"{took:.1f}")
        kube.patch("infs", "driven", namespace, {"spec": {"autoscaling": {"driver": "internal"}}})
        wait_for("no autoscaler", 60, lambda: not kube.list("hpa", namespace))
    finally:
        shoal.install()


def test_keda_is_answered(
    cluster: Testbed, shoal: Platform, namespace: str, report: Report
) -> None:
    """Driver keda: the operator makes a ScaledObject; whoever asks the scaler that it names as KEDA
    does hears of the request that waits, and pods follow the number that is written then. KEDA
    itself is played by this test."""
    if cluster.layout is None:
        pytest.skip("the scaler is asked over the cluster's own network")
    kube = cluster.kube
    kube.apply("default", SCALED_OBJECTS)
    kube.kubectl("wait", "--for=condition=Established", "crd/scaledobjects.keda.sh")
    shoal.install("--set", "keda.enabled=true")
    try:
        scaling = {
            "driver": "keda",
            "minReplicas": 0,
            "maxReplicas": 3,
            "metrics": [{"type": "QueueDepth", "target": 8}],
            "scaleToZero": {"idleSeconds": 30},
        }
        spec = {"podOverlay": NOWHERE, "autoscaling": scaling, "replicas": 0}
        kube.apply(namespace, service("pushed", **spec))
        wait_for("a ScaledObject", 60, lambda: kube.list("scaledobjects", namespace))
        made = kube.get("scaledobject", "pushed", namespace)["spec"]
        assert (made["minReplicaCount"], made["maxReplicaCount"]) == (0, 3)
        assert made["cooldownPeriod"] == 30
        triggers = {one["metadata"]["metric"]: one for one in made["triggers"]}
        assert triggers["shoal_replicas_filled"]["type"] == "external-push"
        queue = triggers["shoal_queue_depth"]["metadata"]
        host = f"{RELEASE}-operator"
        assert queue["scalerAddress"] == f"{host}.{NAMESPACE}.svc:9092"
        address = kube.get("service", host, NAMESPACE)["spec"]["clusterIP"]
        where = pb.ScaledObjectRef(name="pushed", namespace=namespace, scalerMetadata=queue)
        question = pb.GetMetricsRequest(scaledObjectRef=where, metricName="shoal_queue_depth")
        with grpc.insecure_channel(f"{address}:9092") as channel:
            scaler = externalscaler_pb2_grpc.ExternalScalerStub(channel)

            def active() -> bool:
                return bool(scaler.IsActive(where, timeout=10, wait_for_ready=True).result)

            def waits() -> float:
                (found,) = scaler.GetMetrics(question, timeout=10).metricValues
                return float(found.metricValueFloat)

            (asked,) = scaler.GetMetricSpec(where, timeout=10, wait_for_ready=True).metricSpecs
            assert (asked.metricName, asked.targetSizeFloat) == ("shoal_queue_depth", 8.0)
            wait_for("nothing to do", 60, lambda: not active())
            assert not workers(kube, namespace, "pushed")
            with waiting(shoal, "pushed", WAITING):
                _, took = timed("work", 30, active)
                report.head(TABLE, "driver", "from", "to", "seconds")
                report.row(TABLE, "keda", f"{WAITING} requests wait", "told", f"{took:.1f}")
                wait_for("their number", 30, lambda: waits() == WAITING)
                kube.kubectl("scale", "infs/pushed", "-n", namespace, "--replicas=3")
                _, took = timed("3 pods", 30, lambda: len(workers(kube, namespace, "pushed")) == 3)
                report.row(TABLE, "keda", "the scale subresource", "3 pods", f"{took:.1f}")
        kube.patch("infs", "pushed", namespace, {"spec": {"autoscaling": {"driver": "internal"}}})
        wait_for("no ScaledObject", 60, lambda: not kube.list("scaledobjects", namespace))
    finally:
        shoal.install()
        kube.delete("crd", "scaledobjects.keda.sh", "default")


@contextmanager
def waiting(shoal: Platform, model: str, count: int) -> Iterator[None]:
    """So many requests that nobody serves; their clients give up at the end of the block."""
    client = httpx.Client(base_url=shoal.url, timeout=120, limits=httpx.Limits())
    body = {"model": model, "prompt": "1, 2,", "max_tokens": 2}

    def ask() -> None:
        try:
            client.post("/v1/completions", json=body)
        except (httpx.HTTPError, OSError, RuntimeError):
            return  # its connection was closed at the end

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        client.close()


def _registered(kube: Kube) -> bool:
    service = kube.get("apiservice", "v1beta1.external.metrics.k8s.io")
    return bool(condition(service, "Available").get("status") == "True")


def _items(kube: Kube, path: str) -> list[Mapping[str, Any]]:
    items: list[Mapping[str, Any]] = json.loads(kube.raw(path))["items"]
    return items
