"""How the ranks of a group exchange tensors.

Ranks of one node go through memory that they share (`shoal.kernels.shared`); ranks of several
nodes, and those of a machine where that library is not, through torch.distributed and gloo.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from shoal.kernels import shared
from shoal.kernels.shared import Mailbox, Meeting, Segment
from shoal.worker.parallel.layout import Place

# A peer that is gone is noticed by its silence, and ends the group; this only bounds what a bug
# could do. Loading may keep a peer for long.
WAIT_SECONDS: Final = 600.0
_SLOT_BYTES: Final = 1 << 20
_MESSAGES: Final = 8  # on the way between two stages


class Lanes(Protocol):
    """The ranks that share a stage's layers. All make the same calls in the same order."""

    def add_(self, values: Tensor) -> None:
        """values, contiguous, becomes its sum over the lanes, the same bits on all."""
        ...

    def gather(self, part: Tensor) -> Tensor | None:
        """part [rows, columns] float32, of one size on all lanes -> [rows, lanes * columns] on
        lane 0, None elsewhere."""
        ...


class Link(Protocol):
    """From a rank to the one of the next stage, or from that of the one before."""

    def send(self, values: Tensor) -> None:
        """values is contiguous, and free to change afterwards."""
        ...

    def receive(self, into: Tensor) -> Tensor:
        """Fills and returns a contiguous tensor of the size that was sent."""
        ...


class OneLane:
    """A stage of one rank."""

    def add_(self, values: Tensor) -> None:
        pass

    def gather(self, part: Tensor) -> Tensor | None:
        return part


class SharedLanes:
    """Lanes of one node."""

    def __init__(self, meeting: Meeting, lanes: int) -> None:
        self._meeting = meeting
        self._lanes = lanes

    def add_(self, values: Tensor) -> None:
        self._meeting.add_(values)

    def gather(self, part: Tensor) -> Tensor | None:
        return self._meeting.gather(part, 0, [part.shape[1]] * self._lanes)


class GroupLanes:
    """Lanes over a group of torch.distributed."""

    def __init__(self, group: dist.ProcessGroup, lanes: int, root: int, leads: bool) -> None:
        """`root`: the rank of lane 0; `leads`: whether this is it."""
        self._group, self._lanes, self._root, self._leads = group, lanes, root, leads

    def add_(self, values: Tensor) -> None:
        dist.all_reduce(values, group=self._group)

    def gather(self, part: Tensor) -> Tensor | None:
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self._lanes)] if self._leads else None
        dist.gather(part, parts, dst=self._root, group=self._group)
        return None if parts is None else torch.cat(parts, dim=1)


class GroupLink:
    """A link over torch.distributed."""

    def __init__(self, peer: int) -> None:
        self._peer = peer
        self._sending: tuple[dist.Work, Tensor] | None = None

    def send(self, values: Tensor) -> None:
        """Goes on while the message is on the way; a second one waits for the first."""
        if self._sending is not None:
            self._sending[0].wait()
        kept = values.clone()
        work = dist.isend(kept, self._peer)
        assert work is not None
        self._sending = (work, kept)

    def receive(self, into: Tensor) -> Tensor:
        dist.recv(into, self._peer)
        return into


@dataclass(frozen=True, slots=True)
class Peers:
    """Where the ranks of a group are."""

    nodes: tuple[str, ...]  # by rank; ranks of one node share memory
    tensor: int
    pipeline: int
    segments: str  # what the names of shared memory begin with

    def stage(self, stage: int) -> list[int]:
        return list(range(stage * self.tensor, (stage + 1) * self.tensor))

    def together(self, ranks: Sequence[int]) -> bool:
        return len({self.nodes[rank] for rank in ranks}) == 1

    @property
    def apart(self) -> bool:
        """Whether any exchange needs torch.distributed."""
        if shared.unavailable() is not None:
            return len(self.nodes) > 1
        stages = [self.stage(stage) for stage in range(self.pipeline)]
        links = [(rank, rank + self.tensor) for rank in range(len(self.nodes) - self.tensor)]
        return not all(map(self.together, [*stages, *links]))


@dataclass(frozen=True, slots=True)
class Comm:
    """A rank's ways to the others."""

    lanes: Lanes
    before: Link | None  # from the stage before
    after: Link | None  # to the stage after
    segments: tuple[Segment, ...]

    def unlink(self) -> None:
        """Once all ranks have opened theirs: nothing is left when they end, however they do."""
        for segment in self.segments:
            segment.unlink()


def connect(peers: Peers, rank: int, store: TCPStore | None, widest_row: int) -> Comm:
    """Opens what `rank` needs; all ranks call it. `store` where the group is `apart`;
    `widest_row`: bytes of a lane's logits of one token. Raises OSError where memory to share is
    short, and leaves no name of it then."""
    segments: list[Segment] = []
    try:
        return _connect(peers, rank, store, widest_row, segments)
    except BaseException:
        for segment in segments:
            segment.unlink()
        raise


def _connect(
    peers: Peers, rank: int, store: TCPStore | None, widest_row: int, segments: list[Segment]
) -> Comm:
    """`segments`: where those go that are opened."""
    place = Place.of(rank, peers.tensor, peers.pipeline)
    groups: list[dist.ProcessGroup] = []
    if store is not None:
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=len(peers.nodes),
            timeout=timedelta(seconds=WAIT_SECONDS),
        )
        groups = [
            cast(dist.ProcessGroup, dist.new_group(peers.stage(stage)))
            for stage in range(peers.pipeline)
        ]

    def segment(name: str, size: int) -> Segment:
        segments.append(Segment(f"{peers.segments}-{name}", size))
        return segments[-1]

    lanes: Lanes = OneLane()
    own = peers.stage(place.stage)
    if place.lanes > 1 and _share(peers, own):
        slot = max(_SLOT_BYTES, widest_row)
        memory = segment(f"s{place.stage}", Meeting.size(place.lanes, slot))
        meeting = Meeting(memory, place.lanes, place.lane, slot, WAIT_SECONDS)
        lanes = SharedLanes(meeting, place.lanes)
    elif place.lanes > 1:
        lanes = GroupLanes(groups[place.stage], place.lanes, own[0], place.lane == 0)

    def link(sender: int, peer: int) -> Link:
        if not _share(peers, (rank, peer)):
            return GroupLink(peer)
        memory = segment(f"r{sender}", Mailbox.size(_MESSAGES, _SLOT_BYTES))
        return Mailbox(memory, _MESSAGES, _SLOT_BYTES, WAIT_SECONDS)

    return Comm(
        lanes,
        None if place.first else link(rank - peers.tensor, rank - peers.tensor),
        None if place.last else link(rank, rank + peers.tensor),
        tuple(segments),
    )


def disconnect() -> None:
    if dist.is_initialized():
        with suppress(RuntimeError):  # a peer ended first
            dist.destroy_process_group()


def _share(peers: Peers, ranks: Sequence[int]) -> bool:
    return shared.unavailable() is None and peers.together(ranks)
