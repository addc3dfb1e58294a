"""The charts on a real API server: every rendering and every example is accepted."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from e2e.cluster import foreign, platform, services
from e2e.cluster.command import wait_for
from e2e.cluster.kube import Object, condition
from e2e.cluster.layout import CHECKOUT
from e2e.cluster.platform import Platform
from e2e.cluster.testbed import Testbed

CHART = CHECKOUT / "charts/shoal"
EXAMPLES = sorted((CHECKOUT / "manifests/examples").glob("*.yaml"))
NAME = "watched"
# Every switch whose objects a bare Kubernetes knows.
SWITCHES = {
    "defaults": (),
    "networks": (
        "networkPolicy.enabled=true",
        "networkPolicy.clients[0].podSelector.matchLabels.app=web",
        "networkPolicy.scrapers[0].namespaceSelector.matchLabels.name=monitoring",
        "networkPolicy.workerEgress[0].ports[0].port=443",
        "namespaces={default}",
    ),
    "front": (
        "ingress.enabled=true",
        "ingress.hosts={llm.example.com}",
        "ingress.tls[0].secretName=llm-tls",
        "router.service.type=LoadBalancer",
        "router.service.loadBalancerSourceRanges={10.0.0.0/8}",
        "router.tls.enabled=true",
        "router.tls.secretName=mine",
        "router.autoscaling.enabled=true",
    ),
    "rest": (
        "monitoring.dashboard.enabled=true",
        "featureGates.MultiNode=true",
        "router.podDisruptionBudget.maxUnavailable=50%",
        "operator.extraEnv[0].name=HTTPS_PROXY",
        "router.tolerations[0].operator=Exists",
        "workers.podOverlay.spec.nodeSelector.disk=fast",
    ),
}


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_the_api_server_accepts_a_rendering(
    cluster: Testbed, shoal: Platform, namespace: str, switches: tuple[str, ...]
) -> None:
    """Every object of the chart is valid to this Kubernetes, unknown fields included."""
    _dry_run(cluster, namespace, *switches)


def test_the_manifests_without_helm_are_accepted(cluster: Testbed, shoal: Platform) -> None:
    """`kubectl apply` takes the type and what the chart renders by default."""
    for path in ("manifests/crd", "manifests/install.yaml"):
        cluster.kube.kubectl(
            *("apply", "--dry-run=server", "--server-side", "--force-conflicts"),
            *("--validate=strict", "-f", CHECKOUT / path),
        )


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_applied_and_acted_on(
    cluster: Testbed, shoal: Platform, namespace: str, example: Path
) -> None:
    """kubectl apply takes every example as it is, and the operator makes the pods it asks for."""
    cluster.kube.kubectl("apply", "--validate=strict", "-n", namespace, "-f", example)
    try:
        (service,) = cluster.kube.list("infs", namespace)
        name = service["metadata"]["name"]
        wait_for("its first pod", 30, lambda: services.workers(cluster.kube, namespace, name))
        degraded = condition(cluster.kube.get("infs", name, namespace), "Degraded")
        assert degraded.get("reason") not in REFUSED, degraded
    finally:
        cluster.kube.kubectl("delete", "-n", namespace, "-f", example, "--wait=false")


# Reasons by which the operator refuses a service.
REFUSED = ("NotSupported", "InvalidOverlay", "InvalidSpec", "ModelIdTaken", "PodRejected")
RESTRICTED = ("pod-security.kubernetes.io/enforce=restricted",)


@pytest.mark.parametrize("component", ["operator", "router"])
def test_a_restricted_namespace_admits_the_pods(
    cluster: Testbed, shoal: Platform, namespace: str, component: str
) -> None:
    """Operator and routers keep to the strictest Pod Security Standard."""
    cluster.kube.kubectl("label", "namespace", namespace, *RESTRICTED)
    deployment = cluster.kube.get("deployment", f"shoal-{component}", platform.NAMESPACE)
    template = deployment["spec"]["template"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": component, "labels": template["metadata"]["labels"]},
        "spec": {**template["spec"], "serviceAccountName": "default"},
    }
    wait_for("the namespace's account", 30, lambda: _has_account(cluster, namespace))
    cluster.kube.kubectl(
        *("create", "--dry-run=server", "-n", namespace, "-f", "-"), stdin=yaml.safe_dump(pod)
    )


@pytest.fixture
def foreign_types(cluster: Testbed) -> Iterator[None]:
    """Types of the Prometheus operator, cert-manager and the Gateway API, as published."""
    if shutil.which("go") is None:
        pytest.skip("the types of others come out of Go modules, and go is not installed")
    files = foreign.install(cluster.kube, foreign.PROMETHEUS, foreign.GATEWAY, foreign.CERT_MANAGER)
    yield
    foreign.remove(cluster.kube, files)


def test_types_of_others_are_met(
    cluster: Testbed, shoal: Platform, foreign_types: None, namespace: str
) -> None:
    """What the chart asks of the Prometheus operator, cert-manager and a Gateway is valid to their
    published types; and where PodMonitors are known, every service gets one."""
    _dry_run(
        cluster,
        namespace,
        "monitoring.enabled=true",
        "monitoring.alerts.enabled=true",
        "monitoring.tlsConfig.insecureSkipVerify=true",
        "httpRoute.enabled=true",
        "httpRoute.parentRefs[0].name=gateway",
        "httpRoute.hostnames={llm.example.com}",
        "router.tls.enabled=true",
        "router.tls.certManager.enabled=true",
        "router.tls.certManager.issuerRef.name=ca",
        "router.tls.certManager.duration=2160h",
    )
    cluster.kube.apply(namespace, services.service(NAME, replicas=0))
    try:
        switches = ("enabled=true", "alerts.enabled=true", "dashboard.enabled=true")
        values = ",".join(f"monitoring.{switch}" for switch in switches)
        # The operator looks for the type at its start, and every minute.
        shoal.install("--set", f"{values},operator.podAnnotations.monitoring=yes")
        found = wait_for(
            "the service's PodMonitor", 90, lambda: cluster.kube.list("podmonitors", namespace)
        )
        assert [one["metadata"]["name"] for one in found] == [NAME]
        assert cluster.kube.get("servicemonitor", "shoal-router", platform.NAMESPACE)
        assert cluster.kube.get("prometheusrule", "shoal", platform.NAMESPACE)
    finally:
        shoal.install()


def _dry_run(cluster: Testbed, namespace: str, *assignments: str) -> None:
    """The API server judges the chart with these values. Raises ClusterError with its words."""
    sets = [part for assignment in assignments for part in ("--set", assignment)]
    text = cluster.kube.helm("template", "dry", CHART, "--namespace", namespace, *sets)
    cluster.kube.kubectl(
        *("apply", "--dry-run=server", "--validate=strict", "-n", namespace, "-f", "-"),
        stdin=_in_one_namespace(text, namespace),
    )


def _has_account(cluster: Testbed, namespace: str) -> bool:
    return any(
        one["metadata"]["name"] == "default"
        for one in cluster.kube.list("serviceaccounts", namespace)
    )


def _in_one_namespace(text: str, namespace: str) -> str:
    """A dry run needs namespaces that exist: Roles of listed ones go to the test's."""
    objects: list[Object] = [one for one in yaml.safe_load_all(text) if one]
    for one in objects:
        if "namespace" in one["metadata"]:
            one["metadata"]["namespace"] = namespace
    return yaml.safe_dump_all(objects)
