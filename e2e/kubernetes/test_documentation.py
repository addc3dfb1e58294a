"""docs/kubernetes.md, read by a machine: every command of the page is run, in its order.

A command that the page has and this file does not know fails the test, and so does one that this
file knows and the page has no more.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from e2e import tools
from e2e.cluster import foreign, host, images, platform, runtime, services
from e2e.cluster.command import PATH, Say, attached, wait_for
from e2e.cluster.document import commands
from e2e.cluster.kube import condition, is_ready
from e2e.cluster.layout import CHECKOUT, SECOND, ClusterError, Layout
from e2e.cluster.load import undisturbed
from e2e.cluster.platform import Platform
from e2e.cluster.report import Report
from e2e.cluster.testbed import Testbed, since

PAGE = CHECKOUT / "docs/kubernetes.md"
TABLE = "docs/kubernetes.md, from the file"
REGISTRY = "--set image.registry=registry.example.com/team"
SECONDS = 900.0
SETTLE_SECONDS = 300


@dataclass(frozen=True)
class Step:
    """What a command of the page becomes here."""

    begins: str  # how the page's command begins
    swap: Mapping[str, str] = field(default_factory=dict)  # what is the reader's own to put in
    watches: bool = False  # it goes on until somebody ends it
    says: str = ""  # is in what it prints
    settles: bool = True  # the service is to be at strength again before the next command
    elsewhere: bool = False  # another way to what is there already: a test of its own


# `{...}` is filled in by the test.
STEPS = (
    Step("make images", {"make": "make -n"}, says="images/build.sh", settles=False),
    Step("helm install shoal-crds", settles=False),
    Step("helm install shoal charts/shoal", {REGISTRY: "-f {values}"}, settles=False),
    Step("kubectl apply --server-side -f manifests/crd -f manifests/install.yaml", elsewhere=True),
    Step("kubectl apply -f manifests/examples/smollm2.yaml", settles=False),
    Step("kubectl wait --for=condition=Ready", says="condition met"),
    Step("kubectl -n shoal-system port-forward"),
    Step("curl -N", says="data: [DONE]"),
    Step("kubectl get infs", says="smollm2"),
    Step("kubectl get infs -o wide", says="REVISION"),
    Step("kubectl describe infs smollm2", says="RolloutComplete"),
    Step("kubectl get pods -l", says="Running"),
    Step("kubectl logs -l"),
    Step("helm upgrade shoal charts/shoal", says="STATUS: deployed"),
    Step("kubectl scale infs smollm2 --replicas=2", says="scaled"),
    Step("kubectl patch infs smollm2 --type=merge", says="patched", settles=False),
    Step("kubectl get infs smollm2 -w", watches=True, says="replicas"),
    Step("kubectl get controllerrevisions", says="smollm2-"),
    Step("kubectl patch infs smollm2 --type=merge", says="patched", settles=False),
    Step("kubectl delete pod POD", {"POD": "{pod}"}, says="deleted"),
    Step("kubectl drain NODE", {"NODE": "{node}"}, says="drained"),
    Step("kubectl delete infs smollm2", says="deleted", settles=False),
    Step("helm upgrade shoal charts/shoal", says="STATUS: deployed", settles=False),
    Step("helm upgrade shoal-crds", says="STATUS: deployed", settles=False),
    Step("helm upgrade shoal charts/shoal", says="STATUS: deployed", settles=False),
    Step("helm uninstall shoal --namespace", says="uninstalled", settles=False),
    Step("kubectl delete inferenceservices --all", settles=False),
    # By then one of the two is gone: the page says how to end all at once.
    Step("helm uninstall shoal shoal-crds", {"shoal shoal-crds": "shoal-crds"}, settles=False),
    Step("kubectl delete customresourcedefinition", says="deleted", settles=False),
)


@pytest.fixture
def bare(cluster: Testbed, shoal: Platform, say: Say) -> Iterator[Platform]:
    """A cluster without Shoal, with two nodes where they are ours, and the types of others that
    the page's commands ask for."""
    if shutil.which("go") is None:
        pytest.skip("the Prometheus operator's types come out of a Go module; go is not there")
    if cluster.layout is None:
        pytest.skip("the page drains a node, and the nodes are not ours")
    kube = cluster.kube
    files = foreign.install(kube, foreign.PROMETHEUS)
    host.add(cluster.layout, say)
    for room in images.ROOMS:
        images.provide(cluster.layout.of(SECOND), room, say)
    _remove_all(shoal)
    yield shoal
    host.remove(cluster.layout)
    _remove_all(shoal)
    foreign.remove(kube, files)
    shoal.install()


def _remove_all(shoal: Platform) -> None:
    """Releases that are there, and the type with all services."""
    kube = shoal.kube
    for release in (platform.RELEASE, platform.CRDS):
        kube.helm("uninstall", release, "-n", platform.NAMESPACE, "--ignore-not-found", "--wait")
    kube.kubectl(
        *("delete", "customresourcedefinition", "inferenceservices.serving.shoal.dev"),
        "--ignore-not-found",
        seconds=180,
    )


@pytest.mark.timeout(2400, func_only=True)
def test_every_command_of_the_page_works(
    cluster: Testbed, bare: Platform, report: Report, say: Say, tmp_path: Path
) -> None:
    """Install, apply, wait, ask, watch, scale, roll out, drain, expose, upgrade, uninstall."""
    page = commands(PAGE.read_text())
    known = [step.begins for step in STEPS]
    assert len(page) == len(STEPS), _difference([one.splitlines()[0] for one in page], known)
    reader = Reader(cluster, bare, tmp_path)
    report.head(TABLE, "command", "seconds")
    try:
        for command, step in zip(page, STEPS, strict=True):
            assert command.startswith(step.begins), (command, step.begins)
            if step.elsewhere:
                continue
            began = time.monotonic()
            reader.follow(command, step)
            first = command.splitlines()[0].split("  #")[0].strip()
            report.row(TABLE, f"`{first}`", since(began))
            say(f"{since(began)} s: {first}")
    finally:
        reader.leave()
    assert not cluster.kube.list("pods", "default")


class Reader:
    """Somebody with a shell, kubectl and helm."""

    def __init__(self, cluster: Testbed, shoal: Platform, folder: Path) -> None:
        self._cluster, self._shoal, self._folder = cluster, shoal, folder
        self._in_background: list[subprocess.Popen[bytes]] = []
        self._environ = {
            **os.environ,
            "KUBECONFIG": str(cluster.kube.kubeconfig),
            "PATH": f"{tools.kubectl().parent}:{PATH}",
        }

    def follow(self, command: str, step: Step) -> None:
        """Does what the page says. Asserts that it works."""
        for theirs, ours in step.swap.items():
            assert theirs in command, (theirs, command)
            command = command.replace(theirs, self._filled(ours))
        if command.rstrip().endswith("&"):
            self._background(command.rstrip().removesuffix("&"))
            return
        said, status = self._run(command, step.watches)
        assert step.watches or status == 0, f"{command}: exit status {status}: {said}"
        assert step.says in said, f"{command}: {said}"
        if step.settles:
            wait_for(f"the service after {command}", SETTLE_SECONDS, self._settled, every=0.5)

    def leave(self) -> None:
        for process in self._in_background:
            process.send_signal(signal.SIGTERM)
            process.wait(10)

    def _run(self, command: str, watches: bool) -> tuple[str, int]:
        """What it prints, and its exit status. One that watches is ended once it has told of a
        service that is as it is wanted."""
        output = self._folder / "said"
        with output.open("wb") as file:
            process = subprocess.Popen(
                attached("bash", "-ec", command),
                cwd=CHECKOUT,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=watches,
            )
            if watches:
                wait_for("the rollout", SETTLE_SECONDS, self._settled, every=0.5)
                os.killpg(process.pid, signal.SIGTERM)
            try:
                status = process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return output.read_text(), status

    def _background(self, command: str) -> None:
        process = subprocess.Popen(
            attached("bash", "-ec", f"exec {command}"),
            cwd=CHECKOUT,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=(self._folder / "background").open("wb"),
            stderr=subprocess.STDOUT,
        )
        self._in_background.append(process)
        wait_for("the forwarded port", 30, self._forwards)

    def _forwards(self) -> bool:
        return "Forwarding from" in (self._folder / "background").read_text()

    def _settled(self) -> bool:
        """Whether the service serves its present spec at full strength."""
        try:
            found = self._cluster.kube.get("infs", "smollm2", "default")
            pods = self._cluster.kube.list("pods", "default", "serving.shoal.dev/service=smollm2")
        except ClusterError:
            return False  # an upgrade replaces what answers
        status, wanted = found.get("status", {}), found["spec"].get("replicas", 1)
        held = found["spec"].get("paused", False)
        return (
            status.get("observedGeneration") == found["metadata"]["generation"]
            and status.get("routableReplicas") == wanted == len(pods)
            and all(map(is_ready, pods))
            and (held or condition(found, "Progressing").get("reason") == "Complete")
        )

    def _filled(self, text: str) -> str:
        """The reader's own values, file, pod and node."""
        pods = self._cluster.kube.list("pods", "default") if "{pod}" in text else []
        names = [pod["metadata"]["name"] for pod in pods]
        return text.format(values=self._shoal.values, pod=next(iter(names), ""), node=SECOND.name)


def _difference(page: list[str], known: list[str]) -> str:
    lines = [f"the page has {len(page)} commands, this file knows {len(known)}:"]
    return "\n".join(
        [*lines, *(f"  page: {one}" for one in page), *(f"  here: {it}" for it in known)]
    )


def test_without_helm(cluster: Testbed, shoal: Platform, report: Report) -> None:
    """The manifests that stand beside the charts, applied as they are, end in tokens too."""
    if cluster.layout is None:
        pytest.skip("the images that the manifests name are not the cluster's")
    kube = cluster.kube
    (command,) = [one for one in commands(PAGE.read_text()) if "manifests/install.yaml" in one]
    _tag_as_released(cluster.layout)
    _remove_all(shoal)
    kube.kubectl("delete", "namespace", platform.NAMESPACE, seconds=120)
    try:
        began = time.monotonic()
        kube.kubectl(*[_absolute(one) for one in command.split()[1:]])
        for component in ("operator", "router"):
            kube.kubectl(
                *("rollout", "status", f"deployment/shoal-{component}", "--timeout=90s"),
                *("-n", platform.NAMESPACE),
                seconds=100,
            )
        report.head(TABLE, "command", "seconds")
        report.row(TABLE, f"`{command}`, to pods that are ready", since(began))
        namespace = cluster.make_namespace("without-helm")
        overlay = {"spec": {"runtimeClassName": runtime.HOST_CLASS}}
        kube.apply(namespace, services.service("plain", podOverlay=overlay))
        wait_for("it", 240, lambda: services.settled(kube, namespace, "plain", 1), every=0.5)
        undisturbed(shoal.url, "plain", 1)
        cluster.remove_namespace(namespace)
    finally:
        kube.kubectl(
            *("delete", "--ignore-not-found", "-f", CHECKOUT / "manifests/install.yaml"),
            seconds=180,
        )
        _remove_all(shoal)
        shoal.install()


def _absolute(argument: str) -> str:
    return str(CHECKOUT / argument) if argument.startswith("manifests/") else argument


def _tag_as_released(layout: Layout) -> None:
    """The node has the images by the names that the manifests have."""
    text = (CHECKOUT / "manifests/install.yaml").read_text()
    have = {room: images.image(room) for room in images.ROOMS} | {"worker": runtime.BASE_IMAGE}
    for component, name in have.items():
        found = re.search(rf"image: (shoal-{component}:\S+)", text)
        assert found is not None, component
        runtime.tag_image(layout, name, f"docker.io/library/{found[1]}")
