"""`python -m shoal.worker.cluster ranks`: a group's ranks as Ray actors, in a process of its own.

    connect -> wait for room -> reserve -> start the actors -> watch them -> end them

Ray ends a driver whose node is gone without a word, and holds 200 MB: neither is the engine's.
Standard input: one line of JSON (`RayOrder`), then nothing; its end means that the engine wants the
ranks gone, or is gone itself. Standard output: one line of JSON an event:

    waiting             what is asked and what is there, while it does not suffice
    rank host ip pid    where a rank runs
    started             all ranks run; from now on the next event is the last
    lost why            a rank ended
    error               why the ranks cannot be

"""

import json
import os
import sys
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Sequence
from typing import Any, Final

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from shoal.worker.cluster.placement import Bundle, Demand, Node, missing, place
from shoal.worker.cluster.ray_actor import RankActor
from shoal.worker.cluster.ray_order import RESERVE_SECONDS, SEAT_SECONDS, RayOrder

_LOOK_SECONDS: Final = 0.5
_TELL_SECONDS: Final = 5.0
_LABEL_NODE: Final = "ray.io/node-id"


class CannotPlace(RuntimeError):
    """The cluster does not give what the group needs; says what is asked and what is there."""


def main() -> int:
    order = RayOrder.of(sys.stdin.readline())
    threading.Thread(target=_end_with_engine, name="lifeline", daemon=True).start()
    try:
        ray.init(
            address=order.address,
            _node_ip_address=order.ip,
            log_to_driver=False,
            logging_level="error",
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        tell(error=f"the Ray cluster at {order.address} cannot be joined: {error}")
        return 1
    try:
        run(order)
    except CannotPlace as error:
        tell(error=str(error))
    except ray.exceptions.RayError as error:
        tell(error=f"Ray failed: {_first_line(error)}")
    return 1


def run(order: RayOrder) -> None:
    """Until a rank ends, which is told; then the others are no use. Raises CannotPlace."""
    resource = "GPU" if ray.cluster_resources().get("GPU", 0) else "CPU"
    demand = Demand(order.tensor, order.pipeline, resource)
    bundles = wait_for_room(
        lambda: nodes_of(resource, order.ip), demand, order.wait_seconds, time.monotonic
    )
    group = reserve(bundles, resource)
    actors = start(group, bundles, resource)
    seats = {rank: _seat(rank, actor) for rank, actor in actors.items()}
    for rank, seat in seats.items():
        tell(rank=rank, host=seat.host, ip=seat.ip, pid=seat.pid)
    invitation = b64decode(order.invitation)
    runs = {actor.run.remote(invitation, rank): rank for rank, actor in actors.items()}
    tell(started=len(actors))
    done, _ = ray.wait(list(runs), num_returns=1)
    for ended in done:
        tell(lost=runs[ended], why=_why(ended))


def wait_for_room(
    look: Callable[[], Sequence[Node]],
    demand: Demand,
    seconds: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Bundle, ...]:
    """The ranks' places, as soon as there is room for all. Raises CannotPlace."""
    began = told = clock()
    while (bundles := place(nodes := look(), demand)) is None:
        now = clock()
        if now - began >= seconds:
            raise CannotPlace(f"{missing(nodes, demand)}; waited {seconds:g} s for more")
        if now - told >= _TELL_SECONDS:
            told = now
            tell(waiting=missing(nodes, demand))
        sleep(_LOOK_SECONDS)
    return bundles


def nodes_of(resource: str, first_ip: str) -> list[Node]:
    """The nodes that are alive: that of `first_ip`, then by address."""
    free = ray._private.state.available_resources_per_node()
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            name = node["NodeManagerAddress"]
            room = int(free.get(node["NodeID"], {}).get(resource, 0))
            total = int(node["Resources"].get(resource, 0))
            found.append(Node(node["NodeID"], name, room, total))
    return sorted(found, key=lambda node: (node.name != first_ip, node.name))


def reserve(bundles: Sequence[Bundle], resource: str) -> PlacementGroup:
    """All places at once, or none. Raises CannotPlace."""
    group = placement_group(
        [{resource: float(len(bundle.ranks))} for bundle in bundles],
        strategy="PACK",
        bundle_label_selector=[{_LABEL_NODE: bundle.node.node_id} for bundle in bundles],
    )
    if not group.wait(RESERVE_SECONDS):
        places = ", ".join(f"{len(b.ranks)} on {b.node.name}" for b in bundles)
        raise CannotPlace(
            f"Ray did not grant the places within {RESERVE_SECONDS:g} s ({places}): another "
            "group took them"
        )
    return group


def start(group: PlacementGroup, bundles: Sequence[Bundle], resource: str) -> dict[int, Any]:
    """An actor a rank, by rank."""
    make = ray.remote(RankActor)
    actors = {}
    for index, bundle in enumerate(bundles):
        for rank in bundle.ranks:
            actors[rank] = make.options(
                num_cpus=1 if resource == "CPU" else 0,
                num_gpus=1 if resource == "GPU" else 0,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=index
                ),
            ).remote()
    return actors


def _seat(rank: int, actor: Any) -> Any:
    try:
        return ray.get(actor.seat.remote(), timeout=SEAT_SECONDS)
    except ray.exceptions.GetTimeoutError:
        raise CannotPlace(f"rank {rank}'s process did not start in {SEAT_SECONDS:g} s") from None


def _why(ended: Any) -> str:
    try:
        ray.get(ended)
    except ray.exceptions.RayTaskError as error:
        return _first_line(error.cause)
    except ray.exceptions.RayError as error:
        return f"its process ended ({type(error).__name__})"
    return "its program ended"


def _end_with_engine() -> None:
    while sys.stdin.readline():
        pass
    # The job ends with its driver, and Ray ends the job's actors.
    os._exit(0)


def tell(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
