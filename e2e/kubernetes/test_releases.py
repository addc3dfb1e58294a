"""Releases: certificates, upgrades, listed namespaces and uninstalling disturb no service."""

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

from e2e.cluster import platform, services
from e2e.cluster.command import wait_for
from e2e.cluster.layout import CHECKOUT, ClusterError
from e2e.cluster.load import Load, undisturbed
from e2e.cluster.platform import Platform
from e2e.cluster.report import Report
from e2e.cluster.testbed import Testbed

STREAMS = 4
NAME = "upgraded"
TABLE = f"helm upgrade with a service under {STREAMS} streams"
RESTRICTED = ("pod-security.kubernetes.io/enforce=restricted",)


def test_https_with_a_given_certificate(
    cluster: Testbed, shoal: Platform, tmp_path: Path, report: Report
) -> None:
    """With a Secret named, clients that trust its authority speak HTTPS, probes too; a renewed
    Secret is served without a restart."""
    if cluster.layout is None:
        pytest.skip("the router's certificate is for its own address, which is the cluster's alone")
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


@pytest.fixture(scope="module")
def restricted(cluster: Testbed, shoal: Platform) -> Iterator[str]:
    """A namespace that admits restricted pods alone, with one service."""
    namespace = cluster.make_namespace("charts")
    cluster.kube.kubectl("label", "namespace", namespace, *RESTRICTED)
    cluster.kube.apply(namespace, services.service(NAME))
    yield namespace
    cluster.remove_namespace(namespace)


@pytest.fixture
def served(cluster: Testbed, restricted: str) -> str:
    """The namespace, its service at full strength."""
    _wait_settled(cluster, restricted)
    return restricted


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
