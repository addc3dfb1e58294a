"""The pods of a group: who they are, how they wait for one another, where ranks go."""

import http.client
import socket
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.worker.cluster.__main__ import main
from shoal.worker.cluster.follower import Health, Leader, outlive, wait_for_leader
from shoal.worker.cluster.group import BadGroup, read_group
from shoal.worker.cluster.node import NodeError
from shoal.worker.cluster.placement import Demand, Node, missing, place
from shoal.worker.cluster.ray_env import ray_environment

GROUP = {
    "SHOAL_GROUP_SIZE": "2",
    "SHOAL_GROUP_MEMBER": "0",
    "SHOAL_LEADER_ADDRESS": "chat-abc12-0.chat-workers.team.svc",
    "SHOAL_TENSOR_PARALLEL": "2",
    "SHOAL_PIPELINE_PARALLEL": "1",
}


class Became(Exception):
    """The process is another one now."""


def become(program: str, arguments: list[str]) -> None:
    raise Became(arguments)


def test_a_leader_of_one_pod_becomes_the_worker() -> None:
    """The worker's flags go on as they are."""
    alone = GROUP | {"SHOAL_GROUP_SIZE": "1", "SHOAL_TENSOR_PARALLEL": "1"}
    with pytest.raises(Became) as caught:
        main(["leader", "--model", "py://m", "--threads", "2"], alone, become)
    command = [sys.executable, "-m", "shoal.worker", "--model", "py://m", "--threads", "2"]
    assert caught.value.args[0] == command


def test_a_leader_of_more_pods_starts_ray_first() -> None:
    """The worker then looks for its ranks there."""
    with pytest.raises(Became) as caught:
        main(["leader", "--model", "py://m"], GROUP, become, lambda group: "10.0.0.1:6379")
    assert caught.value.args[0][-4:] == ["--executor", "ray", "--ray-address", "10.0.0.1:6379"]
    assert main(["leader"], GROUP, become, lambda group: None) == 1


@pytest.mark.parametrize(
    ("role", "changes", "words"),
    [
        ("leader", {"SHOAL_GROUP_MEMBER": "1"}, "member 1 cannot be the leader"),
        ("follower", {}, "member 0 cannot be the follower"),
        ("leader", {"SHOAL_GROUP_MEMBER": "2"}, "not in a group of SHOAL_GROUP_SIZE=2"),
        ("leader", {"SHOAL_GROUP_SIZE": "two"}, "SHOAL_GROUP_SIZE='two'"),
        ("leader", {"SHOAL_TENSOR_PARALLEL": "0"}, "from 1"),
        ("leader", {"SHOAL_TENSOR_PARALLEL": "1"}, "=2 pods are more than the 1 ranks"),
        (
            "follower",
            {"SHOAL_GROUP_MEMBER": "1", "SHOAL_LEADER_ADDRESS": ""},
            "SHOAL_LEADER_ADDRESS",
        ),
    ],
)
def test_a_contradictory_environment_is_named(
    role: str, changes: dict[str, str], words: str
) -> None:
    """The sentence says which variable."""
    with pytest.raises(BadGroup, match=words):
        read_group(GROUP | changes, role)


@pytest.mark.parametrize("arguments", [[], ["head"], ["follower", "--model", "m"], ["prestop"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2 and the ways to call it."""
    assert main(arguments, GROUP, become) == 2
    assert "usage:" in capsys.readouterr().err


def test_a_pods_ranks_are_its_gpus() -> None:
    """Without any, one rank computes on its processors."""
    assert read_group(GROUP, "leader").own_ranks == 1
    assert read_group(GROUP | {"SHOAL_GPUS_PER_NODE": "4"}, "leader").own_ranks == 4


def test_a_follower_waits_for_its_leader() -> None:
    """Until it takes connections, until told to stop, and not for ever."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as leader:
        port = leader.getsockname()[1]
        assert wait_for_leader("localhost", port, stop) == "127.0.0.1"
    ticks = iter(range(0, 10_000, 1000))
    with pytest.raises(NodeError, match="did not come within 1800 s"):
        wait_for_leader("127.0.0.1", port, stop, lambda: float(next(ticks)))
    stop.set()
    assert wait_for_leader("127.0.0.1", port, stop) is None


def test_a_follower_knows_when_its_leader_is_gone() -> None:
    """Refused connections tell, and those that nobody answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        leader = Leader("127.0.0.1", server.getsockname()[1], 0.05)
        time.sleep(0.5)
        assert leader.lost() is None
    deadline = time.monotonic() + 10
    while leader.lost() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert leader.lost() == "the leader is gone"


def test_a_follower_outlives_its_leaders_drain() -> None:
    """It goes once the leader has stopped listening, or its own time is up."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if now[0] > 3:
            leader.close()

    leader = socket.create_server(("127.0.0.1", 0))
    port = leader.getsockname()[1]
    said = outlive("127.0.0.1", port, 60.0, lambda: now[0], sleep)
    assert said == "the leader has ended, after 4.5 s"
    with socket.create_server(("127.0.0.1", 0)) as stays:
        now[0] = -10.0
        said = outlive("127.0.0.1", stays.getsockname()[1], 10.0, lambda: now[0], sleep)
    assert said == "the leader still serves after 10 s"


def test_probes_know_joining_from_dead() -> None:
    """A follower lives from its first moment, and is ready once it has joined."""
    health = Health("127.0.0.1", 0)

    def status(path: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", health.port, timeout=5)
        connection.request("GET", path)
        found = connection.getresponse().status
        connection.close()
        return found

    assert (status("/live"), status("/ready"), status("/")) == (200, 503, 503)
    health.ready = True
    assert (status("/live"), status("/ready")) == (200, 200)
    health.close()


def test_what_is_said_of_ray_stands() -> None:
    """The tuned settings are defaults; authentication is on unless somebody turned it off."""
    made = ray_environment({"RAY_health_check_period_ms": "9", "HOME": "/h"}, "/t")
    assert made["RAY_health_check_period_ms"] == "9"
    assert (made["RAY_AUTH_MODE"], made["RAY_AUTH_TOKEN_PATH"]) == ("token", "/t")
    assert made["HOME"] == "/h"
    assert ray_environment({"RAY_AUTH_TOKEN_PATH": "/own"}, "/t")["RAY_AUTH_TOKEN_PATH"] == "/own"


def nodes(*rooms: int) -> list[Node]:
    return [Node(f"id-{n}", f"node-{n}", room, 4) for n, room in enumerate(rooms)]


@pytest.mark.parametrize(
    ("rooms", "shape", "expected"),
    [
        ((2, 4), (2, 2), [(1, [0, 1, 2, 3])]),  # all on one node
        ((2, 2), (2, 2), [(0, [0, 1]), (1, [2, 3])]),  # a stage a node
        ((3, 3), (2, 2), [(0, [0, 1]), (1, [2, 3])]),  # no tensor group is torn apart
        ((1, 1), (2, 1), [(0, [0]), (1, [1])]),  # unless no node has room for one
        ((1, 2, 0), (3, 1), [(0, [0]), (1, [1, 2])]),
        ((1, 1), (3, 1), None),
        ((), (1, 1), None),
    ],
)
def test_ranks_are_placed(
    rooms: tuple[int, ...], shape: tuple[int, int], expected: list[tuple[int, list[int]]] | None
) -> None:
    """Together where they talk most, near the driver else."""
    found = place(nodes(*rooms), Demand(*shape, "CPU"))
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert [(b.node.name, list(b.ranks)) for b in found] == [
            (f"node-{n}", ranks) for n, ranks in expected
        ]


@given(st.lists(st.integers(0, 5), max_size=6), st.integers(1, 4), st.integers(1, 3))
def test_every_rank_has_one_place(rooms: list[int], tensor: int, pipeline: int) -> None:
    """In order, within each node's room; and none is found only where there is not enough."""
    demand = Demand(tensor, pipeline, "CPU")
    found = place(nodes(*rooms), demand)
    if found is None:
        assert sum(rooms) < demand.world
        return
    assert [rank for bundle in found for rank in bundle.ranks] == list(range(demand.world))
    assert all(len(bundle.ranks) <= bundle.node.room for bundle in found)
    assert len({bundle.node.node_id for bundle in found}) == len(found)


def test_what_is_missing_is_said() -> None:
    """What is asked, and what each node has."""
    said = missing(nodes(1, 0), Demand(2, 2, "GPU"))
    assert said == (
        "tensor 2 x pipeline 2 asks for 4 ranks with one GPU each, but node-0 has room for 1 of 4, "
        "node-1 has room for 0 of 4"
    )
    assert missing([], Demand(2, 1, "CPU")).endswith("the Ray cluster has no node")
