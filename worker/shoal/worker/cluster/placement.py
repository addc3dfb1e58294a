"""Which rank runs on which node; pure.

Ranks of one tensor group talk in every layer, stages once a step. So: all on one node where one
has room; else every stage on a node of its own or beside its neighbour; else ranks in a row over
the nodes. The driver's own node comes first, so that rank 0 is beside it where it can be.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster that is alive."""

    node_id: str
    name: str  # for people: host name or address
    room: int  # ranks it can take now
    total: int  # ranks it could take were it empty


@dataclass(frozen=True, slots=True)
class Demand:
    """What a group needs. Every rank takes one of `resource`: CPU or GPU."""

    tensor: int
    pipeline: int
    resource: str

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline


@dataclass(frozen=True, slots=True)
class Bundle:
    """Consecutive ranks on one node."""

    node: Node
    ranks: tuple[int, ...]


def place(nodes: Sequence[Node], demand: Demand) -> tuple[Bundle, ...] | None:
    """The ranks' places, all of them in order, or None where there is no room (yet). `nodes`
    in order of preference."""
    world = demand.world
    for node in nodes:
        if node.room >= world:
            return (Bundle(node, tuple(range(world))),)
    places = _in_a_row(nodes, demand, demand.tensor) or _in_a_row(nodes, demand, 1)
    if places is None:
        return None
    return tuple(
        Bundle(nodes[index], tuple(rank for rank, _ in found))
        for index, found in groupby(enumerate(places), key=lambda placed: placed[1])
    )


def _in_a_row(nodes: Sequence[Node], demand: Demand, together: int) -> list[int] | None:
    """Each rank's node, by number, in units of `together` ranks that share a node."""
    places: list[int] = []
    for index, node in enumerate(nodes):
        units = min(node.room, demand.world - len(places)) // together
        places += [index] * (units * together)
    return places if len(places) == demand.world else None


def missing(nodes: Sequence[Node], demand: Demand) -> str:
    """What is asked and what each node has, in a sentence."""
    asked = (
        f"tensor {demand.tensor} x pipeline {demand.pipeline} asks for {demand.world} ranks with "
        f"one {demand.resource} each"
    )
    if not nodes:
        return f"{asked}, but the Ray cluster has no node"
    have = ", ".join(f"{node.name} has room for {node.room} of {node.total}" for node in nodes)
    return f"{asked}, but {have}"
