"""Parts of the test cluster that work without one."""

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest

from e2e.cluster import binaries, kwok
from e2e.cluster.archive import write_image
from e2e.cluster.command import run, wait_for
from e2e.cluster.document import commands
from e2e.cluster.layout import CHECKOUT, ClusterError, Layout
from e2e.cluster.load import Answer, Window
from e2e.cluster.node import Claim
from e2e.cluster.platform import metrics_of
from e2e.cluster.processes import Processes, identify
from e2e.cluster.reading import path_of
from e2e.cluster.report import Report
from e2e.cluster.runtime import base_spec
from e2e.kubernetes.test_documentation import PAGE, STEPS


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "run", tmp_path / "cache")


def test_an_image_holds_its_files_and_says_how_it_starts(tmp_path: Path) -> None:
    """A docker archive: manifest, configuration, one layer with the file at its place."""
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF")
    program.chmod(0o755)
    archive = tmp_path / "image.tar"
    write_image(archive, "localhost/it:1", files={"/bin/it": program}, entrypoint=["/bin/it"])
    with tarfile.open(archive) as image:
        (manifest,) = json.loads(_read(image, "manifest.json"))
        config = json.loads(_read(image, manifest["Config"]))
        layer = io.BytesIO(_read(image, manifest["Layers"][0]))
    assert manifest["RepoTags"] == ["localhost/it:1"]
    assert config["config"]["Entrypoint"] == ["/bin/it"]
    with tarfile.open(fileobj=layer) as files:
        assert files.getmember("bin/it").mode == 0o755


def test_containers_see_host_paths_read_only() -> None:
    """Binds are added to what containerd mounts anyway, and limits are inherited."""
    taken = {"mounts": [{"destination": "/proc"}], "process": {"rlimits": []}}
    spec = base_spec(taken, {Path("/usr"): Path("/usr")})
    mounts = spec["mounts"]
    assert isinstance(mounts, list)
    assert [mount["destination"] for mount in mounts] == ["/proc", "/usr"]
    assert "ro" in mounts[1]["options"]
    assert spec["process"] == {}


def test_the_build_is_found_again_while_its_sources_stay(layout: Layout) -> None:
    """The folder of the binaries depends on what they are built from, not on the checkout."""
    assert binaries.folder(layout) == binaries.folder(layout)
    assert binaries.folder(layout).parent == layout.cache


def test_a_process_is_stopped_and_started_again(layout: Layout) -> None:
    """It is known by id and start time, and comes back with the command line it had."""
    processes = Processes(layout)
    processes.start("sleeper", sys.executable, "-c", "import time; time.sleep(60)")
    first = processes.pid("sleeper")
    assert processes.alive("sleeper")
    processes.stop(["sleeper"])
    assert not processes.alive("sleeper")
    processes.restart("sleeper")
    assert processes.alive("sleeper")
    assert processes.pid("sleeper") != first
    processes.stop(["sleeper"])


def test_a_cluster_is_an_orphan_once_its_owner_is_gone() -> None:
    """A test run that was killed leaves a claim that the next run may clear away."""
    started = identify(os.getpid())
    assert started is not None
    assert not Claim(Path("/x"), os.getpid(), started).orphaned()
    assert Claim(Path("/x"), os.getpid(), started - 100).orphaned()
    assert not Claim(Path("/x"), None, None).orphaned()


def test_commands_fail_with_what_they_said() -> None:
    """The error of a command names it, its exit status and its last words."""
    with pytest.raises(ClusterError, match=r"sh -c .*exit status 3\nno such thing"):
        run("sh", "-c", "echo no such thing >&2; exit 3")
    with pytest.raises(ClusterError, match=r"not within 0.1 s: sleep 5"):
        run("sleep", "5", seconds=0.1)
    with pytest.raises(ClusterError, match=r"gave up after 0 s waiting for rain"):
        wait_for("rain", 0, lambda: False, every=0)


def test_metrics_are_summed_by_name() -> None:
    """Labels are summed over, and lines can be chosen."""
    text = '# HELP a b\na_total{code="200"} 3\na_total{code="500"} 1\nb 2.5\n'
    assert metrics_of(text) == {"a_total": 4, "b": 2.5}
    assert metrics_of(text, lambda line: "500" in line) == {"a_total": 1}


@pytest.mark.parametrize(
    ("asked", "path"),
    [
        (("pods", "a"), "/api/v1/namespaces/a/pods"),
        (("pods", None), "/api/v1/pods"),
        (("pod", "a", "p"), "/api/v1/namespaces/a/pods/p"),
        (("pod", None, "p"), "/api/v1/namespaces/default/pods/p"),
        (("node", "a", "n"), "/api/v1/nodes/n"),
        (("infs", None, None, "a=b"), "/apis/serving.shoal.dev/v1alpha1/inferenceservices"),
        (("horses", "a"), None),
    ],
)
def test_what_is_read_often_is_read_by_its_path(
    asked: tuple[str, str | None], path: str | None
) -> None:
    """As kubectl would find it; what has no path here kubectl reads."""
    found = path_of(*asked)
    assert (found and found.partition("?")[0]) == path
    assert path is None or ("labelSelector=a%3Db" in str(found)) is ("a=b" in asked)


def test_a_report_is_a_table() -> None:
    """The first row is the head, and a head is given once."""
    report = Report()
    for value in ("1", "2"):
        report.head("Times", "what", "s")
        report.row("Times", "it", value)
    assert report.markdown() == (
        "## Times\n\n| what | s |\n| --- | --- |\n| it | 1 |\n| it | 2 |\n"
    )


def test_a_window_counts_what_went_wrong() -> None:
    """Errors, questions asked again, and the longest silence of any stream."""
    answers = [
        Answer(0, 1, 0, "a", longest_silence=0.5, asked_again=1, error=None),
        Answer(0, 2, 1, "", longest_silence=2.0, asked_again=0, error="refused"),
    ]
    window = Window(answers)
    assert (window.failed, window.asked_again, window.longest_silence) == (["refused"], 1, 2.0)


def test_pods_for_fake_nodes_go_there_alone() -> None:
    """The placement selects the fake nodes' label and tolerates their taint."""
    (node,) = kwok.nodes(1)
    placement = kwok.placement()
    assert placement["nodeSelector"].items() <= node["metadata"]["labels"].items()
    (taint,) = node["spec"]["taints"]
    (toleration,) = placement["tolerations"]
    assert (toleration["key"], toleration["effect"]) == (taint["key"], taint["effect"])


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    found = archive.extractfile(name)
    assert found is not None
    return found.read()


def test_commands_of_a_page_are_read_as_they_are_typed() -> None:
    """Continued lines, quotes and documents belong to their command; output is no command."""
    page = """\
Do this:

    kubectl get infs     # all
    curl http://x -d '{
      "a": 1}'

    helm upgrade shoal \\
      --wait -f - <<'YAML'
    a: 1
    YAML
    kubectl get pods &

and read:

    Ready=True Serving
"""
    assert commands(page) == [
        "kubectl get infs     # all",
        "curl http://x -d '{\n  \"a\": 1}'",
        "helm upgrade shoal \\\n  --wait -f - <<'YAML'\na: 1\nYAML",
        "kubectl get pods &",
    ]


def test_the_cluster_tests_know_every_command_of_the_page() -> None:
    """Each is run on a cluster; what the README tells to type is on the page too."""
    page = commands(PAGE.read_text())
    known = [step.begins for step in STEPS]
    assert [one[: len(begins)] for one, begins in zip(page, known, strict=True)] == known
    readme = commands((CHECKOUT / "README.md").read_text())
    assert {one for one in readme if one.startswith(("helm", "kubectl"))} <= set(page)
