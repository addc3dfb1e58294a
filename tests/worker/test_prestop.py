"""The preStop hook: it drains what serves here, and never holds up the end of a pod."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from shoal.api.v1 import engine_pb2, engine_pb2_grpc
from shoal.worker import prestop


class Engine(engine_pb2_grpc.EngineServicer):
    """Drains as it is told to."""

    def __init__(self, unfinished: int = 0, takes: float = 0.0) -> None:
        self._unfinished = unfinished
        self._takes = takes
        self.asked: list[float] = []

    def Drain(
        self, request: engine_pb2.DrainRequest, context: grpc.ServicerContext
    ) -> engine_pb2.DrainResponse:
        self.asked.append(request.deadline_seconds)
        time.sleep(self._takes)
        return engine_pb2.DrainResponse(unfinished=self._unfinished)


@contextmanager
def listening(engine: Engine) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    engine_pb2_grpc.add_EngineServicer_to_server(engine, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield str(port)
    server.stop(0).wait()


@pytest.mark.parametrize(
    ("engine", "words"), [(Engine(), "drained in"), (Engine(3), "3 sequences are left")]
)
def test_the_engine_of_the_pod_is_drained(
    engine: Engine, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It finds the port in the environment and hands over its deadline."""
    with listening(engine) as port:
        code = prestop.main(["--drain-seconds", "7"], {"SHOAL_PORT": port})
    assert code == 0
    assert engine.asked == [7.0]
    assert words in capsys.readouterr().out


def test_nobody_there_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    """An engine that has died, or never listened, needs no draining."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
        started = time.monotonic()
        assert prestop.main(["--drain-seconds", "30"], {"SHOAL_PORT": port}) == 0
        assert time.monotonic() - started < 5
    assert "nothing is drained" in capsys.readouterr().out


def test_an_engine_that_does_not_answer_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hung engine cannot hold up the pod's end."""
    monkeypatch.setattr(prestop, "MARGIN_SECONDS", 0.2)
    with listening(Engine(takes=1.5)) as port:
        started = time.monotonic()
        assert prestop.main(["--drain-seconds", "0.1"], {"SHOAL_PORT": port}) == 0
        assert time.monotonic() - started < 1.2
    assert "DEADLINE_EXCEEDED" in capsys.readouterr().out
