"""The charts on a real API server: every rendering is accepted, upgrades disturb nobody."""

import io
import socket
import ssl
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
import yaml

from e2e.cluster import platform, services
from e2e.cluster.command import wait_for
from e2e.cluster.kube import Object
from e2e.cluster.layout import CHECKOUT, ClusterError
from e2e.cluster.load import Load, undisturbed
from e2e.cluster.platform import Platform
from e2e.cluster.report import Report
from e2e.cluster.testbed import Testbed

CHART = CHECKOUT / "charts/shoal"
EXAMPLES = sorted((CHECKOUT / "manifests/examples").glob("*.yaml"))
STREAMS = 4
NAME = "upgraded"
TABLE = f"helm upgrade with a service under {STREAMS} streams"
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
    sets = [part for assignment in switches for part in ("--set", assignment)]
    text = cluster.kube.helm("template", "dry", CHART, "--namespace", namespace, *sets)
    cluster.kube.kubectl(
        *("apply", "--dry-run=server", "--validate=strict", "-n", namespace, "-f", "-"),
        stdin=_in_one_namespace(text, namespace),
    )


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_api_server_accepts_an_example(
    cluster: Testbed, shoal: Platform, namespace: str, example: Path
) -> None:
    """Types, CEL rules and Kubernetes' own kinds take every example as it is."""
    cluster.kube.kubectl(
        *("apply", "--dry-run=server", "--validate=strict", "-n", namespace, "-f", str(example))
    )


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


def test_https_with_a_given_certificate(
    cluster: Testbed, shoal: Platform, tmp_path: Path, report: Report
) -> None:
    """With a Secret named, clients that trust its authority speak HTTPS, probes too; a renewed
    Secret is served without a restart."""
    authority, host = trustme.CA(), "shoal-router.shoal-system.svc"
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    _certificate(cluster, authority, host, tmp_path)
    tls = "router.tls.enabled=true,router.tls.secretName=router-tls,router.service.port=443"
    try:
        shoal.install("--set", f"{tls},router.replicas=1")
        address = cluster.kube.get("service", "shoal-router", platform.NAMESPACE)["spec"]
        first = _shown(address["clusterIP"], host, tmp_path)
        started = _restarts(cluster)
        begun = time.monotonic()
        _certificate(cluster, authority, host, tmp_path)
        wait_for(
            "the renewed certificate",
            150,
            lambda: _shown(address["clusterIP"], host, tmp_path) != first,
            every=1.0,
        )
        report.head("HTTPS", "what", "seconds")
        report.row(
            "HTTPS",
            "kubectl apply of a renewed Secret to its use",
            f"{time.monotonic() - begun:.0f}",
        )
        assert _restarts(cluster) == started
    finally:
        shoal.install()
        cluster.kube.delete("secret", "router-tls", platform.NAMESPACE)


def test_monitors_where_the_cluster_knows_them(
    cluster: Testbed, shoal: Platform, namespace: str
) -> None:
    """With the Prometheus operator's types the chart's monitors install, and every service gets a
    PodMonitor of its own; without them nothing of that is asked for."""
    types = [
        _type_of_monitoring(kind) for kind in ("ServiceMonitor", "PodMonitor", "PrometheusRule")
    ]
    cluster.kube.apply(namespace, services.service(NAME, replicas=0))
    try:
        cluster.kube.apply(namespace, *types)
        for one in types:
            name = one["metadata"]["name"]
            cluster.kube.kubectl("wait", "--for=condition=Established", f"crd/{name}")
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
        for one in types:
            cluster.kube.kubectl(
                "delete", "crd", one["metadata"]["name"], "--ignore-not-found", seconds=120
            )


@pytest.fixture
def served(cluster: Testbed, shoal: Platform) -> Iterator[str]:
    """A namespace that admits restricted pods alone, with one ready service."""
    namespace = cluster.make_namespace("charts")
    cluster.kube.kubectl("label", "namespace", namespace, *RESTRICTED)
    cluster.kube.apply(namespace, services.service(NAME))
    _wait_settled(cluster, namespace)
    yield namespace
    cluster.remove_namespace(namespace)


def test_an_upgrade_disturbs_nobody(
    cluster: Testbed,
    shoal: Platform,
    served: str,
    report: Report,
    tmp_path: Path,
) -> None:
    """From the previous chart to this one, operator and routers replaced: no worker pod is
    restarted, no request fails, no answer changes."""
    before = previous_charts(tmp_path)
    if before is not None:
        shoal.install(charts=before)
        _wait_settled(cluster, served)
    expected = undisturbed(shoal.url, NAME, STREAMS)
    pods = _identities(cluster, served)
    with Load(shoal.url, NAME, expected) as load, load.window() as window:
        # The annotations replace the pods also where the two charts are equal.
        mark = "podAnnotations.upgraded=yes"
        shoal.install("--set", f"operator.{mark},router.{mark}")
        _wait_settled(cluster, served)
    report.head(TABLE, "from", "answers", "failed", "altered", "worker pods replaced")
    report.row(
        TABLE,
        "the previous chart" if before else "the same chart",
        *(str(len(window.answers)), str(len(window.failed)), str(window.altered)),
        str(len(pods - _identities(cluster, served))),
    )
    assert len(window.answers) >= STREAMS
    assert not window.failed, window.failed[:3]
    assert not window.altered
    assert _identities(cluster, served) == pods


def test_listed_namespaces_are_enough(cluster: Testbed, shoal: Platform, served: str) -> None:
    """With Roles in one namespace alone, operator and router do all they do for it."""
    other = cluster.make_namespace("elsewhere")
    try:
        shoal.install("--set", f"namespaces={{{served}}}")
        cluster.kube.patch("infs", NAME, served, {"spec": {"engine": {"maxNumSeqs": 16}}})
        _wait_settled(cluster, served)
        undisturbed(shoal.url, NAME, 1)
        cluster.kube.apply(other, services.service(NAME))
        assert not services.workers(cluster.kube, other, NAME)
    finally:
        shoal.install()
        cluster.remove_namespace(other)


def test_uninstalling_keeps_services_and_their_pods(
    cluster: Testbed, shoal: Platform, served: str
) -> None:
    """helm uninstall leaves services and worker pods; installed again, they are served at once."""
    pods = _identities(cluster, served)
    try:
        shoal.uninstall()
        said = cluster.kube.helm("uninstall", platform.CRDS, "-n", platform.NAMESPACE)
        assert "kept" in said and "inferenceservices.serving.shoal.dev" in said
        assert cluster.kube.get("infs", NAME, served)
        assert _identities(cluster, served) == pods
    finally:
        shoal.install()
    _wait_settled(cluster, served)
    undisturbed(shoal.url, NAME, 1)
    assert _identities(cluster, served) == pods


def previous_charts(folder: Path) -> Path | None:
    """The charts as they were before their last change; None where history is not there."""
    git = ("git", "-C", str(CHECKOUT))
    log = (*git, "log", "-1", "--skip=1", "--format=%H", "--", "charts/shoal", "charts/shoal-crds")
    commit = subprocess.run(log, capture_output=True, text=True, check=False).stdout.strip()
    if not commit:
        return None
    archive = subprocess.run(
        [*git, "archive", commit, "charts"], capture_output=True, check=False
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder / "charts"


def _identities(cluster: Testbed, namespace: str) -> set[tuple[str, int]]:
    """Worker pods that stay, by uid, with the restarts of their containers."""
    return {
        (
            str(pod["metadata"]["uid"]),
            sum(one["restartCount"] for one in pod["status"].get("containerStatuses", [])),
        )
        for pod in services.workers(cluster.kube, namespace, NAME)
    }


def _wait_settled(cluster: Testbed, namespace: str) -> None:
    try:
        wait_for(
            "the service at full strength",
            240,
            lambda: services.settled(cluster.kube, namespace, NAME, 1),
            every=0.5,
        )
    except ClusterError as error:
        pytest.fail(f"{error}\n{cluster.describe(namespace)}")


def _type_of_monitoring(kind: str) -> Object:
    """A CRD that takes everything, in place of the Prometheus operator's."""
    plural = f"{kind.lower()}s"
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.monitoring.coreos.com"},
        "spec": {
            "group": "monitoring.coreos.com",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
            "scope": "Namespaced",
            "versions": [
                {
                    "name": "v1",
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": anything},
                }
            ],
        },
    }


def _has_account(cluster: Testbed, namespace: str) -> bool:
    return any(
        one["metadata"]["name"] == "default"
        for one in cluster.kube.list("serviceaccounts", namespace)
    )


def _certificate(cluster: Testbed, authority: trustme.CA, host: str, folder: Path) -> None:
    """Issues a certificate and applies it as the Secret `router-tls`."""
    made = authority.issue_cert(host)
    made.cert_chain_pems[0].write_to_path(folder / "tls.crt")
    made.private_key_pem.write_to_path(folder / "tls.key")
    text = cluster.kube.kubectl(
        *("create", "secret", "tls", "router-tls", "--dry-run=client", "-o", "yaml"),
        *(f"--cert={folder / 'tls.crt'}", f"--key={folder / 'tls.key'}"),
    )
    cluster.kube.kubectl("apply", "-n", platform.NAMESPACE, "-f", "-", stdin=text)


def _shown(address: str, host: str, folder: Path) -> bytes:
    """The certificate of the router, once it has answered a request over it."""
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    with (
        socket.create_connection((address, 443), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=host) as secure,
    ):
        secure.sendall(f"GET /ready HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert secure.recv(64).startswith(b"HTTP/1.1 200")
        certificate = secure.getpeercert(binary_form=True)
    assert certificate is not None
    return certificate


def _restarts(cluster: Testbed) -> dict[str, int]:
    return {
        str(pod["metadata"]["uid"]): sum(
            one["restartCount"] for one in pod["status"]["containerStatuses"]
        )
        for pod in cluster.kube.list("pods", platform.NAMESPACE, platform.ROUTER)
        if "deletionTimestamp" not in pod["metadata"]
    }


def _in_one_namespace(text: str, namespace: str) -> str:
    """A dry run needs namespaces that exist: Roles of listed ones go to the test's."""
    objects: list[Object] = [one for one in yaml.safe_load_all(text) if one]
    for one in objects:
        if "namespace" in one["metadata"]:
            one["metadata"]["namespace"] = namespace
    return yaml.safe_dump_all(objects)
