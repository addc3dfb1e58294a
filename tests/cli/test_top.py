"""`shoal top`: sums over routers, and the command against a router."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from shoal.api.v1 import router_pb2, router_pb2_grpc
from shoal.cli.load_view import replica_cells, service_cells, tops
from shoal.operator.local.records import SupervisorInfo


def report(service: str = "chat", **fields: Any) -> router_pb2.ServiceLoad:
    """One router's view: two replicas, of which it sends to the first alone."""
    found = router_pb2.ServiceLoad(service=service, queued=3, arrivals=10)
    for number in range(2):
        endpoint = found.endpoints.add(name=f"e{number}", revision="r", in_flight=2)
        endpoint.admitted = number == 0
        endpoint.load.running, endpoint.load.waiting = 4, 1
        endpoint.load.blocks_used, endpoint.load.blocks_total = 25 + 50 * number, 100
        endpoint.load.step_seconds = 0.02
    found.revisions.add(revision="r", requests=7, errors=1, ttft_p95_seconds=0.25)
    for name, value in fields.items():
        setattr(found, name, value)
    return found


def load(*services: router_pb2.ServiceLoad) -> router_pb2.RouterLoad:
    return router_pb2.RouterLoad(services=services)


def test_two_routers_are_one_service() -> None:
    """What each router has adds up; an engine's own figures count once; the slowest p95 shows."""
    slow = report(queued=1)
    slow.revisions[0].ttft_p95_seconds = 0.5
    slow.endpoints[1].admitted = True
    (service,), replicas = tops([load(report()), load(slow)], lambda key: key)
    assert (service.running, service.queued, service.requests, service.errors) == (8, 4, 14, 2)
    assert (service.replicas, service.admitted) == (2, 1)
    assert service.kv_used == pytest.approx(0.5)
    assert service.ttft_p95_seconds == 0.5
    assert [(top.running, top.waiting, top.admitted, top.routers) for top in replicas] == [
        (4, 1, 2, 2),
        (4, 1, 1, 2),
    ]
    assert replica_cells(replicas[1])[3] == "1/2"


def test_services_of_other_places_are_left_out() -> None:
    """`name_of` decides what is shown, and under which name."""
    loads = [load(report("a/chat"), report("b/chat"))]
    services, replicas = tops(loads, lambda key: "chat" if key == "b/chat" else None)
    assert [top.name for top in services] == ["chat"]
    assert {top.service for top in replicas} == {"chat"}


def test_what_was_not_measured_is_a_dash() -> None:
    """A service without replicas and requests has no latency, no rate and no share."""
    (service,), replicas = tops([load(router_pb2.ServiceLoad(service="x"))], lambda key: key)
    assert service_cells(service, None) == [
        *("x", "0/0", "0", "0", "0%"),
        *("-", "-", "-", "0", "0"),
    ]
    assert replicas == []


class Router(router_pb2_grpc.RouterServicer):
    """Says what it is told to."""

    def __init__(self) -> None:
        self.load = load(report())

    def GetLoad(
        self, request: router_pb2.GetLoadRequest, context: grpc.ServicerContext
    ) -> router_pb2.RouterLoad:
        return self.load


@pytest.fixture
def asked(world: Any) -> Iterator[Any]:
    """A machine whose supervisor has a router; `router` is on it."""
    server = grpc.server(ThreadPoolExecutor(1))
    world.router = Router()
    router_pb2_grpc.add_RouterServicer_to_server(world.router, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    supervisor = SupervisorInfo(
        pid=1, url="http://h:1", grpc_address=f"127.0.0.1:{port}", started=1.0
    )
    with world.store.hold(supervisor):
        yield world
    server.stop(0).wait()


def test_top_prints_services_and_replicas(asked: Any) -> None:
    """Two tables on one machine; NAME keeps one service."""
    asked.router.load = load(report(), report("other"))
    lines = asked.shoal("top", "chat").stdout.splitlines()
    assert lines[1].split()[:8] == ["chat", "1/2", "4", "3", "50%", "250ms", "-", "-"]
    assert lines[4].split()[:4] == ["e0", "chat", "r", "yes"]
    assert "other" not in asked.shoal("top", "chat").stdout


def test_watching_tells_a_rate(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second look on there are arrivals a second."""

    def sleep(seconds: float) -> None:
        if asked.router.load.services[0].arrivals > 10:
            raise KeyboardInterrupt
        asked.router.load.services[0].arrivals = 1_000_000

    monkeypatch.setattr("shoal.cli.top.time.sleep", sleep)
    done = asked.shoal("top", "--watch")
    assert done.exit_code == 130
    looks = [line for line in done.stdout.splitlines() if line.startswith("chat")]
    first, second = (look.split()[7] for look in looks)
    assert first == "-"
    assert float(second) > 0


def test_json_has_numbers(asked: Any) -> None:
    """Seconds and shares, not texts."""
    data = json.loads(asked.shoal("top", "-o", "json").stdout)
    assert data["routers"] == 1
    assert data["services"][0]["ttft_p95_seconds"] == 0.25
    assert data["replicas"][1]["kv_used"] == 0.75


def test_top_of_nothing(asked: Any, world: Any) -> None:
    """An unknown service, and a service that the router does not know yet, are two sentences."""
    assert '"x" not found' in asked.shoal("top", "x").stderr
    asked.shoal("apply", "-f", asked.write("new"))
    assert "no router knows the service new yet" in asked.shoal("top", "new").stderr


def test_top_where_nothing_runs(world: Any) -> None:
    """It says how to start."""
    done = world.shoal("top")
    assert done.exit_code == 1
    assert "shoal up" in done.stderr
