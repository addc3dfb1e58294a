"""Leadership: one at a time, whatever the API server and the scheduler of the host do."""

import asyncio
import copy
import heapq
import itertools
from collections.abc import Mapping
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.operator.kube.errors import ApiError
from shoal.operator.kube.lease import Leadership, LeaseTimes

Json = dict[str, Any]
TIMES = LeaseTimes()


class Time:
    """A clock that jumps to the next sleeper when nobody has anything to do."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now + seconds, next(self._order), woken))
        await woken

    async def run_until(self, end: float) -> None:
        while True:
            for _ in range(20):
                await asyncio.sleep(0)
            if not self._sleepers or self._sleepers[0][0] > end:
                self.now = end
                return
            at, _, woken = heapq.heappop(self._sleepers)
            self.now = max(self.now, at)
            if not woken.done():
                woken.set_result(None)


class Server:
    """One lease, with optimistic locking."""

    def __init__(self) -> None:
        self.lease: Json | None = None
        self.version = 0
        self.away = False
        self.loses_answers = False
        self.writes = 0

    async def read(self, path: str, within: float) -> Json:
        self._reach()
        if self.lease is None:
            raise ApiError(404, "NotFound", path)
        return copy.deepcopy(self.lease)

    async def replace_lease(
        self, path: str, document: Mapping[str, Any], *, new: bool, within: float
    ) -> Json:
        self._reach()
        if new and self.lease is not None:
            raise ApiError(409, "AlreadyExists", path)
        if not new and (
            self.lease is None
            or document["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]
        ):
            raise ApiError(409, "Conflict", path)
        self.version += 1
        self.writes += 1
        self.lease = copy.deepcopy(dict(document))
        self.lease["metadata"]["resourceVersion"] = str(self.version)
        if self.loses_answers:
            raise ApiError(0, "Unreachable", path)
        return copy.deepcopy(self.lease)

    def _reach(self) -> None:
        if self.away:
            raise ApiError(0, "Unreachable", "away")

    @property
    def holder(self) -> str:
        return self.lease["spec"]["holderIdentity"] if self.lease else ""


class Candidate:
    """An operator that leads whenever it may."""

    def __init__(
        self, name: str, server: Server, time: Time, predecessors: str | None = None
    ) -> None:
        self.leadership = Leadership(
            server,
            namespace="ns",
            name="lease",
            identity=name,
            predecessors=predecessors,
            monotonic=time.monotonic,
            wall=lambda: 1_800_000_000 + time.now,
            sleep=time.sleep,
            times=TIMES,
        )
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            await self.leadership.acquire()
            await self.leadership.keep()

    @property
    def leads(self) -> bool:
        return self.leadership.holds()

    async def end(self) -> None:
        """As on SIGTERM."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.leadership.release()

    def kill(self) -> None:
        """As on SIGKILL: nothing is released."""
        self.task.cancel()


def two() -> tuple[Time, Server, Candidate, Candidate]:
    time, server = Time(), Server()
    return time, server, Candidate("one", server, time), Candidate("two", server, time)


def test_one_of_two_leads() -> None:
    """The first takes the lease, and the second waits for as long as it is renewed."""

    async def check() -> None:
        time, server, one, two_ = two()
        await time.run_until(1060.0)
        assert (one.leads, two_.leads) == (True, False)
        assert server.holder == "one"
        assert server.lease is not None and server.lease["spec"]["leaseTransitions"] == 1

    asyncio.run(check())


def test_after_sigterm_the_other_leads_within_two_seconds() -> None:
    """The lease is released, and the other looks every second."""

    async def check() -> None:
        time, _, one, two_ = two()
        await time.run_until(1010.3)
        await one.end()
        await time.run_until(1011.4)
        assert two_.leads and not one.leads

    asyncio.run(check())


def test_after_sigkill_the_other_leads_within_eight_seconds() -> None:
    """Not before the lease has run out, and not long after."""

    async def check() -> None:
        time, _, one, two_ = two()
        await time.run_until(1010.01)
        one.kill()
        await time.run_until(1014.0)
        assert not two_.leads
        await time.run_until(1018.0)
        assert two_.leads

    asyncio.run(check())


def test_a_successor_in_the_same_pod_does_not_wait() -> None:
    """Its predecessor's process is gone; another pod's is not known to be."""

    async def check() -> None:
        time, server = Time(), Server()
        one = Candidate("pod_1a_x", server, time, "pod_1a_")
        await time.run_until(1010.0)
        one.kill()
        other = Candidate("pod_2b_y", server, time, "pod_2b_")
        again = Candidate("pod_1a_z", server, time, "pod_1a_")
        await time.run_until(1011.2)
        assert (again.leads, other.leads) == (True, False)

    asyncio.run(check())


def test_a_leader_that_loses_the_api_server_stops_by_itself() -> None:
    """Well before the lease runs out; and it leads again a second after the server is back."""

    async def check() -> None:
        time, server, one, _ = two()
        await time.run_until(1010.5)
        server.away = True
        await time.run_until(1010.5 + TIMES.renew)
        assert not one.leads
        await time.run_until(1040.0)
        server.away = False
        await time.run_until(1041.2)
        assert one.leads

    asyncio.run(check())


def test_a_renewal_whose_answer_is_lost_does_not_end_the_leadership() -> None:
    """The conflict that follows shows its own name in the lease."""

    async def check() -> None:
        time, server, one, two_ = two()
        await time.run_until(1010.5)
        server.loses_answers = True
        await time.run_until(1012.0)
        server.loses_answers = False
        await time.run_until(1030.0)
        assert one.leads and not two_.leads

    asyncio.run(check())


def test_a_frozen_leader_knows_when_it_wakes() -> None:
    """SIGSTOP for long: its time is over before it does anything."""

    async def check() -> None:
        time, _, one, _ = two()
        await time.run_until(1010.0)
        assert one.leads
        time.now += 30.0
        assert not one.leads

    asyncio.run(check())


def test_a_lease_that_somebody_deleted_is_made_again() -> None:
    """By whoever comes first; the other does not lead."""

    async def check() -> None:
        time, server, one, two_ = two()
        await time.run_until(1010.0)
        server.lease = None
        await time.run_until(1020.0)
        assert one.leads != two_.leads

    asyncio.run(check())


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["away", "back", "lose", "answer", "kill", "delete", "pass"]),
        st.floats(0.01, 7.0),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(EVENTS)
def test_never_do_two_lead(events: list[tuple[str, float]]) -> None:
    """Outages, lost answers and kills in any order: at most one holds at any moment.

    A lease that a person deletes is the exception that no lease protocol covers; it is left out
    while somebody leads.
    """

    async def check() -> None:
        time, server = Time(), Server()
        names = itertools.count()
        there = [Candidate(f"c{next(names)}", server, time) for _ in range(3)]
        for what, wait in events:
            match what:
                case "away" | "back":
                    server.away = what == "away"
                case "lose" | "answer":
                    server.loses_answers = what == "lose"
                case "kill":
                    there.pop(0).kill()
                    there.append(Candidate(f"c{next(names)}", server, time))
                case "delete" if not any(c.leads for c in there):
                    server.lease = None
            end = time.now + wait
            while time.now < end:
                await time.run_until(min(end, time.now + 0.25))
                assert sum(c.leads for c in there) <= 1
        server.away = server.loses_answers = False
        await time.run_until(time.now + TIMES.lease + 3 * TIMES.retry)
        assert sum(c.leads for c in there) == 1

    asyncio.run(check())


def test_the_times_leave_room() -> None:
    """A holder must have stopped before its lease can be anybody else's."""
    assert TIMES.renew < TIMES.lease
    assert TIMES.retry + TIMES.call < TIMES.renew
