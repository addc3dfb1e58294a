"""The queue of one service: priorities, fairness between tenants, deadlines, cancel anywhere.

Priorities are strict, smaller first. Within a priority tenants share by start-time fair queueing
(Goyal, Vin, Cheng 1996): an item's tag is the later of the virtual time and the end of its
tenant's previous item, whose length is its cost; the smallest tag goes first, and the virtual
time is the tag of the item that went last. One tenant alone is served in order of arrival.

Items live in lanes, one a constraint on the replica (a revision, a tokenizer): a lane whose
replicas are busy does not hold up the others. Removal is lazy: a ticket that was taken, cancelled
or has expired stays in the heaps until it surfaces or until such tickets are the majority.
"""

from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")
L = TypeVar("L", bound=Hashable)

FRONT = -1.0  # tag of an item that was dispatched before and comes back: ahead of its priority


class Ticket(Generic[T, L]):
    """An item's place in the queue. It is queued once; what comes back takes a new one."""

    __slots__ = (
        "cost",
        "deadline",
        "front",
        "item",
        "lane",
        "priority",
        "queued",
        "since",
        "tenant",
    )

    def __init__(
        self,
        item: T,
        *,
        since: float,
        deadline: float,
        lane: L,
        priority: int = 0,
        tenant: str = "",
        cost: float = 1.0,
        front: bool = False,
    ) -> None:
        self.item = item
        self.since = since
        self.deadline = deadline
        self.lane = lane
        self.priority = priority
        self.tenant = tenant
        self.cost = cost
        self.front = front  # ahead of all others of its priority in its lane
        self.queued = False

    def moved(self, lane: L) -> "Ticket[T, L]":
        """A new ticket for the same item, the same in all but its lane."""
        return Ticket(
            self.item,
            since=self.since,
            deadline=self.deadline,
            lane=lane,
            priority=self.priority,
            tenant=self.tenant,
            cost=self.cost,
            front=self.front,
        )


class _Level:
    """Virtual time of one priority of one lane."""

    __slots__ = ("_sweep_at", "ends", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self.ends: dict[str, float] = {}  # tenant -> end of its last item
        self._sweep_at = 64

    def tag(self, tenant: str, cost: float) -> float:
        start = max(self.now, self.ends.get(tenant, 0.0))
        self.ends[tenant] = start + cost
        if len(self.ends) > self._sweep_at:
            # A tenant whose end has passed starts at the virtual time either way.
            self.ends = {name: end for name, end in self.ends.items() if end > self.now}
            self._sweep_at = 64 + 2 * len(self.ends)
        return start


_Entry = tuple[int, float, int, Ticket[T, L]]  # priority, tag, arrival, ticket


class _Lane(Generic[T, L]):
    __slots__ = ("heap", "levels", "size")

    def __init__(self) -> None:
        self.heap: list[_Entry[T, L]] = []
        self.levels: dict[int, _Level] = {}
        self.size = 0  # queued tickets; the heap may hold dead ones too


class FairQueue(Generic[T, L]):
    """All that waits for one service. Times are seconds of one clock, given by the caller."""

    def __init__(self) -> None:
        self._lanes: dict[L, _Lane[T, L]] = {}
        self._deadlines: list[tuple[float, int, Ticket[T, L]]] = []
        self._arrivals = count()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Ticket[T, L]]:
        """All that is queued, in no particular order."""
        for lane in self._lanes.values():
            for entry in lane.heap:
                if entry[3].queued:
                    yield entry[3]

    def push(self, ticket: Ticket[T, L]) -> None:
        """Queues a new ticket."""
        lane = self._lanes.get(ticket.lane)
        if lane is None:
            lane = self._lanes[ticket.lane] = _Lane()
        tag = FRONT
        if not ticket.front:
            level = lane.levels.get(ticket.priority)
            if level is None:
                level = lane.levels[ticket.priority] = _Level()
            tag = level.tag(ticket.tenant, ticket.cost)
        arrival = next(self._arrivals)
        heappush(lane.heap, (ticket.priority, tag, arrival, ticket))
        heappush(self._deadlines, (ticket.deadline, arrival, ticket))
        ticket.queued = True
        lane.size += 1
        self._size += 1

    def lanes(self) -> list[L]:
        """Lanes that have something queued, the one with the most urgent head first."""
        heads = [
            (lane.heap[0][0], lane.heap[0][2], name)
            for name, lane in self._lanes.items()
            if self._surface(lane)
        ]
        heads.sort(key=lambda head: head[:2])
        return [name for _, _, name in heads]

    def peek(self, lane: L) -> Ticket[T, L] | None:
        """Who goes next in a lane, without taking it."""
        found = self._lanes.get(lane)
        return found.heap[0][3] if found is not None and self._surface(found) else None

    def take(self, lane: L) -> Ticket[T, L] | None:
        """Takes who goes next in a lane."""
        found = self._lanes.get(lane)
        if found is None or not self._surface(found):
            return None
        priority, tag, _, ticket = heappop(found.heap)
        if tag != FRONT:
            found.levels[priority].now = tag
        self._settle(ticket, found)
        return ticket

    def remove(self, ticket: Ticket[T, L]) -> bool:
        """Cancels a ticket wherever it stands; False if it is not queued."""
        if not ticket.queued:
            return False
        self._settle(ticket, self._lanes[ticket.lane])
        return True

    def expire(self, now: float) -> list[Ticket[T, L]]:
        """Takes out everything whose deadline has come."""
        expired = []
        while self._deadlines and (
            self._deadlines[0][0] <= now or not self._deadlines[0][2].queued
        ):
            ticket = heappop(self._deadlines)[2]
            if ticket.queued:
                self._settle(ticket, self._lanes[ticket.lane])
                expired.append(ticket)
        return expired

    def drain(self) -> list[Ticket[T, L]]:
        """Takes out everything, each lane in its order."""
        tickets = []
        for lane in self.lanes():
            while (ticket := self.take(lane)) is not None:
                tickets.append(ticket)
        return tickets

    def oldest(self) -> float | None:
        """Since when the longest waiting ticket has been queued."""
        return min((ticket.since for ticket in self), default=None)

    def _settle(self, ticket: Ticket[T, L], lane: _Lane[T, L]) -> None:
        ticket.queued = False
        lane.size -= 1
        self._size -= 1
        if not lane.size:
            del self._lanes[ticket.lane]
        elif len(lane.heap) > 64 and len(lane.heap) > 2 * lane.size:
            lane.heap = [entry for entry in lane.heap if entry[3].queued]
            heapify(lane.heap)
        if len(self._deadlines) > 64 and len(self._deadlines) > 2 * self._size:
            self._deadlines = [entry for entry in self._deadlines if entry[2].queued]
            heapify(self._deadlines)

    @staticmethod
    def _surface(lane: _Lane[T, L]) -> bool:
        """Drops dead entries from the head of the heap; False if nothing is left."""
        heap = lane.heap
        while heap and not heap[0][3].queued:
            heappop(heap)
        return bool(heap)


def retry_after(queued: int, started_per_second: float) -> float:
    """Seconds until a queue of this length will have moved on: between 1 and 60."""
    if started_per_second <= 0:
        return 5.0
    return min(60.0, max(1.0, queued / started_per_second))
