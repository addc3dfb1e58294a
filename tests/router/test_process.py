"""The router as a process: ports, signals, lifeline."""

import asyncio
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme

from shoal.api.names import ENV_LIFELINE
from tests.router.kube_server import KubeServer, config_map

ROOT = Path(__file__).resolve().parents[2]


class Process:
    """A Python module as a process whose ports are read from what it says."""

    def __init__(self, module: str, *arguments: str, **environ: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environ},
        )

    def until(self, pattern: str) -> str:
        """The first group of the first line that matches."""
        for line in self.process.stdout:
            if found := re.search(pattern, line):
                return found[1]
        raise AssertionError(f"it ended without saying {pattern}")

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def engine():
    with Process("bench.scripted_engine", "--port", "0", "--step-seconds", "0.02") as process:
        yield process.until(r"listening on (\S+)")


@pytest.fixture
def routes(tmp_path, engine):
    table = {
        "service": "chat",
        "models": ["chat"],
        "endpoints": [{"name": "a", "address": engine, "revision": ""}],
    }
    (tmp_path / "chat.json").write_text(json.dumps(table))
    return tmp_path


def router(routes: Path, *arguments: str, **environ: str) -> Process:
    ports = ("--http-port", "0", "--grpc-port", "0")
    flags = ("--routes", str(routes), "--host", "127.0.0.1", *ports, *arguments)
    return Process("shoal.router", *flags, **environ)


def chat(url: str, max_tokens: int) -> dict:
    body = {
        "model": "chat",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": max_tokens,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as response:
        return json.load(response)


def test_sigterm_lets_requests_finish(routes):
    """What is in flight at SIGTERM is answered whole, then the process exits with 0."""
    with router(routes) as process:
        url = process.until(r"serving (http://\S+),")
        assert chat(url, 1)["usage"]["completion_tokens"] == 1
        answers = []
        thread = threading.Thread(target=lambda: answers.append(chat(url, 50)))
        thread.start()
        threading.Event().wait(0.3)
        process.process.send_signal(signal.SIGTERM)
        assert process.until("stopping; (1) requests")
        thread.join(timeout=20)
        assert answers[0]["usage"]["completion_tokens"] == 50
        assert process.process.wait(timeout=10) == 0


def test_draining_is_bounded(routes):
    """A request longer than --drain-seconds is cut off, and the process still exits with 0."""
    with router(routes, "--drain-seconds", "0.3") as process:
        url = process.until(r"serving (http://\S+),")
        chat(url, 1)
        outcome = []

        def ask() -> None:
            try:
                outcome.append(chat(url, 2000))
            except OSError as error:
                outcome.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        threading.Event().wait(0.3)
        process.process.send_signal(signal.SIGTERM)
        assert process.process.wait(timeout=10) == 0
        thread.join(timeout=10)
        assert isinstance(outcome[0], OSError)


@pytest.mark.parametrize("flag", ["--http-port", "--grpc-port"])
def test_a_taken_port_says_what_to_do(tmp_path, flag):
    """Exit 1 with one sentence that names port and flag."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with router(tmp_path, flag, port) as process:
            output, _ = process.process.communicate(timeout=20)
            assert process.process.returncode == 1
            last = output.strip().splitlines()[-1]
            assert port in last
            assert flag in last
            assert "Traceback" not in output


def test_the_lifeline_ends_it(tmp_path):
    """A router whose supervisor dies does not outlive it."""
    with router(tmp_path, **{ENV_LIFELINE: "stdin"}) as process:
        process.until("(serving)")
        process.process.stdin.close()
        assert process.process.wait(timeout=10) == 3


def test_json_logs_are_json(tmp_path):
    """Every line of a JSON log is an object with time, level and event."""
    with router(tmp_path, "--log-format", "json") as process:
        line = json.loads(process.process.stdout.readline())
        assert line["event"].startswith("serving http://127.0.0.1:")
        assert {"time", "level"} <= set(line)


def test_after_sigterm_it_serves_on_while_not_ready(routes):
    """For --shutdown-delay-seconds new requests are answered as before, but /ready says no."""
    with router(routes, "--shutdown-delay-seconds", "1.5") as process:
        url = process.until(r"serving (http://\S+),")
        assert chat(url, 1)["usage"]["completion_tokens"] == 1
        process.process.send_signal(signal.SIGTERM)
        process.until("(not ready any more)")
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{url}/ready", timeout=5)
        assert chat(url, 2)["usage"]["completion_tokens"] == 2
        assert process.process.wait(timeout=10) == 0


def test_https_with_a_certificate(tmp_path):
    """With --tls-cert-file and --tls-key-file the HTTP port speaks TLS."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    chain, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    issued.cert_chain_pems[0].write_to_path(chain)
    issued.private_key_pem.write_to_path(key)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    flags = ("--tls-cert-file", str(chain), "--tls-key-file", str(key))
    with router(tmp_path, *flags) as process:
        url = process.until(r"serving (https://\S+),")
        with urllib.request.urlopen(f"{url}/ready", timeout=5, context=trust) as response:
            assert response.status == 200


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tls-cert-file", "x"), "--tls-key-file"),
        (("--namespaces", "a,b"), "--namespaces a,b"),
        (("--drain-seconds", "-1"), "0 seconds or more"),
    ],
)
def test_contradictory_flags_are_refused(tmp_path, flags, words):
    """Exit 2 and a sentence that names the flag."""
    with router(tmp_path, *flags) as process:
        output, _ = process.process.communicate(timeout=20)
        assert process.process.returncode == 2
        assert words in output


def test_outside_a_cluster_routes_kubernetes_says_so(tmp_path):
    """Exit 1 with one sentence."""
    environ = {"KUBERNETES_SERVICE_HOST": "", "KUBERNETES_SERVICE_PORT": ""}
    with router(Path("kubernetes"), **environ) as process:
        output, _ = process.process.communicate(timeout=20)
        assert process.process.returncode == 1
        assert "works in a pod" in output
        assert "Traceback" not in output


def test_a_router_in_a_pod(tmp_path):
    """With a service account and nothing else it serves what the ConfigMaps say."""

    async def play() -> None:
        async with KubeServer(tmp_path / "account") as server:
            server.put(config_map("team", "chat", models=["smol"]))
            address = urlsplit(server.account.server)
            environ = {
                "KUBERNETES_SERVICE_HOST": address.hostname,
                "KUBERNETES_SERVICE_PORT": str(address.port),
            }
            flags = ("--service-account-dir", str(server.folder), "--namespaces", "team")
            await asyncio.to_thread(look, flags, environ)

    def look(flags: tuple[str, ...], environ: dict[str, str]) -> None:
        with router(Path("kubernetes"), *flags, **environ) as process:
            url = process.until(r"serving (http://\S+),")
            deadline = time.monotonic() + 10
            while True:
                try:
                    urllib.request.urlopen(f"{url}/ready", timeout=5)
                    break
                except urllib.error.HTTPError:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as response:
                assert [model["id"] for model in json.load(response)["data"]] == ["smol"]

    asyncio.run(play())
