"""`shoal demo`: what it says when things work, and when they do not."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from shoal.api.types import parse_document, parse_manifest
from shoal.cli import demo
from shoal.cli.chat import ChatFailed, stream_chat
from shoal.cli.child import ServingProcess
from shoal.operator.local.records import SupervisorInfo
from shoal.operator.local.store import Store

EVENTS = [
    {"choices": [{"delta": {"role": "assistant"}}]},
    {"choices": [{"delta": {"content": "Many "}}]},
    {"choices": [{"delta": {"content": "eyes."}}]},
    {"choices": [{"delta": {}, "finish_reason": "stop"}]},
    {"choices": [], "usage": {"completion_tokens": 3}},
]


def sse(events: Sequence[object]) -> bytes:
    return b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in events)


def client(handle: Callable[[httpx.Request], httpx.Response]) -> httpx.Client:
    return httpx.Client(base_url="http://test", transport=httpx.MockTransport(handle))


def answer(content: bytes, code: int = 200) -> httpx.Client:
    return client(lambda request: httpx.Response(code, content=content))


def test_chat_streams_and_times() -> None:
    """Text is handed on as it comes; the figures are the clock's and the server's."""
    clock = iter((10.0, 10.5, 12.5))
    parts: list[str] = []
    with answer(sse(EVENTS) + b"data: [DONE]\n\n") as http:
        found = stream_chat(http, "m", "Why?", 8, parts.append, lambda: next(clock))
    assert parts == ["Many ", "eyes."]
    assert (found.text, found.tokens, found.first, found.total) == ("Many eyes.", 3, 0.5, 2.5)
    assert found.tokens_per_second == 1.0


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b'{"error": {"message": "no such model"}}', 404, "HTTP 404: no such model"),
        (b"<html>", 502, "HTTP 502: <html>"),
        (sse([{"error": {"message": "engine died"}}]), 200, "engine died"),
        (sse(EVENTS[:1]), 200, "without an answer"),
    ],
)
def test_chat_failures_are_sentences(content: bytes, code: int, words: str) -> None:
    """Refusals, errors in mid-stream and empty streams each say what came."""
    with answer(content, code) as http, pytest.raises(ChatFailed, match=words):
        stream_chat(http, "m", "Why?", 8, lambda text: None)


def test_chat_without_a_server_is_a_sentence() -> None:
    """A broken connection is no traceback."""

    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with client(refuse) as http, pytest.raises(ChatFailed, match="ConnectError: refused"):
        stream_chat(http, "m", "Why?", 8, lambda text: None)


class Handler(BaseHTTPRequestHandler):
    """Streams EVENTS to whoever asks."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(sse(EVENTS) + b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


class FakeUp:
    """Stands in for the process of `shoal up`: plays its part in the store."""

    scene: Callable[[Store, str], None]  # (store, base URL)
    stopped: list[bool]

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        log.write_text("the log of up\n")
        self.command = list(command)
        self.exit_code: int | None = None
        self.store = Store(Path(command[command.index("--state-dir") + 1]))

    def __enter__(self) -> "FakeUp":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{self._server.server_port}"
        self._held = self.store.hold(SupervisorInfo(1, url, "", 0.0))
        self._held.__enter__()
        type(self).scene(self.store, url)
        if "--dies" in self.command:
            self.exit_code = 1
        return self

    def __exit__(self, *error: object) -> None:
        self._held.__exit__(None, None, None)
        self._server.shutdown()
        self._server.server_close()
        self.stopped.append(True)


@pytest.fixture
def fake_up(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`fake_up(scene)` lets the demo start a FakeUp that plays the scene."""
    stopped: list[bool] = []

    def install(scene: Callable[[Store, str], None]) -> list[bool]:
        monkeypatch.setattr(FakeUp, "scene", staticmethod(scene), raising=False)
        monkeypatch.setattr(FakeUp, "stopped", stopped, raising=False)
        monkeypatch.setattr(demo, "ServingProcess", FakeUp)
        return stopped

    return install


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def test_demo_tells_the_whole_story(world: Any, fake_up: Any) -> None:
    """Phases, the answer, figures, the URL, next commands; and it says when a port is taken."""

    def scene(store: Store, url: str) -> None:
        world.store = store
        world.pod(ready=False)
        world.log("chat-abc12-0", "12:00:00 startup phase phase=load seconds=1.5\n")

        def ready() -> None:
            world.log("chat-abc12-0", "12:00:00 startup phase phase=warm-up seconds=0.5\n")
            world.status()

        threading.Timer(0.4, ready).start()

    stopped = fake_up(scene)
    with taken_port() as port:
        done = world.shoal("demo", "-f", world.write(), "--port", str(port), "--prompt", "Why?")
    assert done.exit_code == 0, done.output
    for part in (
        f"Port {port} is taken",
        "  load 1.5 s\n",
        "  warm-up 0.5 s\n",
        "> Why?\nMany eyes.\n",
        "Time to first token",
        "tokens/s (3 tokens)",
        " up -f ",
        "/v1/chat/completions",
        " --port ",
        " scale chat 2",
        " logs chat -f",
        "Stopped. Nothing is left running.",
    ):
        assert part in done.stdout, done.stdout
    assert stopped == [True]


def test_demo_shows_the_log_of_a_crashing_pod(world: Any, fake_up: Any) -> None:
    """A worker that cannot start: its message, the end of its log, exit 1, all stopped."""

    def scene(store: Store, url: str) -> None:
        world.store = store
        world.pod(ready=False, restarts=2, message="exited with code 1")
        world.log("chat-abc12-0", "".join(f"line {n}\n" for n in range(100)))

    stopped = fake_up(scene)
    done = world.shoal("demo", "-f", world.write(), "--port", "0")
    assert done.exit_code == 1
    assert "chat-abc12-0: exited with code 1" in done.stderr
    assert "line 99" in done.stderr
    assert "line 9\n" not in done.stderr
    assert stopped == [True]


def test_demo_that_never_gets_ready_ends(world: Any, fake_up: Any) -> None:
    """At the timeout the condition's message tells why."""

    def scene(store: Store, url: str) -> None:
        world.store = store
        world.status(ready="False", replicas=0)

    stopped = fake_up(scene)
    done = world.shoal("demo", "-f", world.write(), "--port", "0", "--timeout", "0.2s")
    assert done.exit_code == 1
    assert "0 replicas take requests" in done.stderr
    assert "the log of up" in done.stderr
    assert stopped == [True]


def test_demo_without_an_answer_shows_the_routers_log(
    world: Any, fake_up: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused request is told with the log that matters."""

    def scene(store: Store, url: str) -> None:
        world.store = store
        world.status()
        world.log("router", "no such model\n")

    fake_up(scene)
    monkeypatch.setattr(Handler, "do_POST", lambda self: self.send_error(404))
    done = world.shoal("demo", "-f", world.write(), "--port", "0")
    assert done.exit_code == 1
    assert "HTTP 404" in done.stderr
    assert "no such model" in done.stderr


def test_an_interrupted_demo_stops_everything(world: Any, fake_up: Any) -> None:
    """Ctrl-C while it loads: exit 130, and the child is stopped."""

    def scene(store: Store, url: str) -> None:
        threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,)).start()

    stopped = fake_up(scene)
    done = world.shoal("demo", "-f", world.write(), "--port", "0")
    assert done.exit_code == 130
    assert "Nothing is left running" in done.stderr
    assert stopped == [True]


def test_a_real_up_that_fails_is_told(world: Any) -> None:
    """The demo's own child process refuses a manifest: its words reach the user."""
    path = world.write(engine={"quantization": "fp8"})
    done = world.shoal("demo", "-f", path, "--port", "0")
    assert done.exit_code == 1
    assert "ended with exit code 2" in done.stderr
    assert "not supported yet: spec.engine.quantization=fp8" in done.stderr


def test_the_built_in_example_is_the_repositorys() -> None:
    """An installed package serves what the repository's example says."""
    example = Path(__file__).parents[2] / "manifests" / "examples" / "smollm2.yaml"
    (service,) = parse_manifest(example.read_text())
    assert parse_document(yaml.safe_load(yaml.safe_dump(dict(demo.EXAMPLE)))) == service


def test_the_example_is_written_where_there_is_no_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere the built-in example becomes a file that parses."""
    monkeypatch.chdir(tmp_path)
    (service,) = parse_manifest(demo._example(tmp_path).read_text())
    assert service.name == "smollm2"


SLEEPER = "import sys, time; print('up', flush=True); time.sleep(60)"
DEAF = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {SLEEPER}"


def _wait_for_log(process: ServingProcess) -> None:
    deadline = time.monotonic() + 20
    while not process.log.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("program", "code"), [(SLEEPER, -signal.SIGINT), (DEAF, -signal.SIGKILL)])
def test_the_child_is_always_stopped(tmp_path: Path, program: str, code: int) -> None:
    """By an interrupt, or by force where that does not help."""
    log = tmp_path / "log"
    with ServingProcess([sys.executable, "-c", program], log, stop_seconds=0.5) as process:
        _wait_for_log(process)
        assert process.exit_code is None
    assert process.exit_code == code


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    """A parent that is killed takes the child along: its lifeline ends."""
    child = (
        "import time; from shoal.api.lifeline import watch_lifeline; watch_lifeline();"
        "print('up', flush=True); time.sleep(60)"
    )
    parent = (
        "import os, sys, time; from pathlib import Path\n"
        "from shoal.cli.child import ServingProcess\n"
        f"log = Path({str(tmp_path / 'log')!r})\n"
        f"with ServingProcess([sys.executable, '-c', {child!r}], log) as p:\n"
        "    print(p._process.pid, flush=True)\n"
        "    while not p.log.read_bytes(): time.sleep(0.02)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
