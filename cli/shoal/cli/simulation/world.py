"""A service on a virtual clock: the router's queue and pick, the operator's autoscaler, and
simulated replicas between them.

What decides is the code that decides in production: `router.queue.FairQueue`, `router.pick.pick`,
`operator.autoscale.decide` over reports as routers give them. What is simulated is time: engine
steps (replica), the start of a replica, and the two seconds between looks. One router, no failures,
no shared prefixes.

Beyond `POOL` replicas with room, `pick` chooses among that many of them, drawn at random: so many
choices balance as well as all (Mitzenmacher, "The power of two choices", 2001), and a choice among
a thousand would take most of the simulation's time.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush

from shoal.api.types import InferenceService
from shoal.cli.simulation.arrivals import Arrival
from shoal.cli.simulation.replica import Replica, ReplicaSettings, Request
from shoal.operator.autoscale import Decision, Scaling, decide
from shoal.operator.autoscale_behavior import Memory
from shoal.operator.autoscale_load import RouterReport, TtftHistory, total_load
from shoal.operator.autoscale_metrics import Replicas
from shoal.operator.durations import Durations
from shoal.router.histogram import Histogram
from shoal.router.pick import Demand, PickSettings, has_room, pick
from shoal.router.queue import FairQueue, Ticket

TICK_SECONDS = 0.1  # deadlines in the queue, ends of drains
LOOK_TICKS = 20  # from one look of the autoscaler to the next
POOL = 16
ROUTER = "router"
_PATIENCE = 600.0  # after the last arrival, for what is still under way


@dataclass(frozen=True, slots=True)
class Settings:
    """What is simulated around the service's own spec."""

    replica: ReplicaSettings
    start_seconds: float = 20.0  # from the decision to the first request
    duration: float = 600.0


@dataclass(slots=True)
class Sample:
    """The state at one look, and what happened since the one before."""

    at: float
    wanted: int
    ready: int
    existing: int
    queued: int
    in_flight: int
    reason: str
    arrived: int = 0
    first_tokens: list[float] = field(default_factory=list)  # seconds from arrival


@dataclass(slots=True)
class Outcome:
    """Everything that a run leaves."""

    samples: list[Sample] = field(default_factory=list)
    finished: int = 0
    refused: int = 0  # 429: the queue was full
    timed_out: int = 0  # 503: no replica had room in time
    continued: int = 0  # requests whose replica was stopped at the end of its drain
    first_tokens: list[float] = field(default_factory=list)
    between_tokens: list[float] = field(default_factory=list)  # mean of each request
    output_tokens: int = 0
    replica_seconds: float = 0.0
    seconds: float = 0.0


class Simulation:
    """One run; `run` may be called once. All randomness comes from `rng`."""

    def __init__(self, service: InferenceService, settings: Settings, rng: random.Random) -> None:
        spec = service.spec
        self._settings = settings
        self._rng = rng
        self._scaling = (
            Scaling(spec.autoscaling, settings.replica.slots) if spec.autoscaling else None
        )
        self._drain_seconds = float(spec.rollout.drain_seconds)
        waiting = spec.autoscaling and spec.autoscaling.scale_to_zero
        self._max_queued = waiting.max_queued if waiting else 1000
        self._queue_timeout = float(waiting.queue_timeout_seconds) if waiting else 120.0
        self._pick = PickSettings(spec.routing.policy)
        self._queue: FairQueue[Request, str] = FairQueue()
        self._replicas: list[Replica] = []
        self._roomy: list[Replica] = []  # ready, not draining, with room
        self._events: list[tuple[float, int, Replica]] = []
        self._numbers = 0
        self._turn = 0
        self._in_flight = 0
        self._arrived = 0
        self._last_activity = 0.0
        self._ttft = Histogram()
        self._history = TtftHistory()
        self._recent: list[float] = []
        self._outcome = Outcome()
        self._wanted = spec.replicas
        if spec.autoscaling:
            bounds = spec.autoscaling
            self._wanted = min(max(spec.replicas, bounds.min_replicas), bounds.max_replicas)
        self._memory = Memory.began(self._wanted, (), 0.0)
        for _ in range(self._wanted):
            self._create(0.0, 0.0)

    def run(self, arrivals: Iterator[Arrival]) -> Outcome:
        """Plays all arrivals until everything has ended, or nothing will any more."""
        events = self._events
        upcoming = next(arrivals, None)
        ticks, tick, now = 0, 0.0, 0.0
        ends = self._settings.duration
        while True:
            at = upcoming.at if upcoming is not None else float("inf")
            if tick <= at and (not events or tick <= events[0][0]):
                now = tick
                self._tick(now)
                if not ticks % LOOK_TICKS:
                    self._look(now)
                ticks += 1
                tick = ticks * TICK_SECONDS
                over = upcoming is None and now >= ends
                if over and (not (self._in_flight or len(self._queue)) or now > ends + _PATIENCE):
                    break
            elif events and events[0][0] <= at:
                now, _, replica = heappop(events)
                if replica.wakes == now:
                    self._fire(replica, now)
            else:
                assert upcoming is not None
                now = at
                self._arrive(upcoming)
                upcoming = next(arrivals, None)
        for replica in self._replicas:
            self._outcome.replica_seconds += now - replica.created
        self._outcome.seconds = now
        return self._outcome

    # Requests

    def _arrive(self, arrival: Arrival) -> None:
        now = self._last_activity = arrival.at
        self._arrived += 1
        overhead = self._settings.replica.model.overhead
        request = Request(now - overhead, arrival.prompt_tokens, arrival.output_tokens)
        if not len(self._queue) and self._dispatch(request, now):
            return
        if len(self._queue) >= self._max_queued:
            self._outcome.refused += 1
            return
        self._enqueue(request, now)

    def _enqueue(self, request: Request, now: float, *, front: bool = False) -> None:
        self._queue.push(
            Ticket(
                request,
                since=now,
                deadline=now + self._queue_timeout,
                lane="",
                cost=float(request.prompt_tokens + request.output_tokens),
                front=front,
            )
        )

    def _dispatch(self, request: Request, now: float) -> bool:
        roomy = self._roomy
        if not roomy:
            return False
        pool = roomy if len(roomy) <= POOL else self._rng.sample(roomy, POOL)
        choice = pick(
            [replica.candidate() for replica in pool],
            Demand(request.prompt_tokens),
            {},
            self._pick,
            self._rng,
            self._turn,
        )
        if choice is None:
            return False
        self._turn += 1
        replica = next(replica for replica in pool if replica.name == choice.name)
        self._in_flight += 1
        replica.take(request, now)
        self._schedule(replica)
        self._file(replica)
        return True

    def _fire(self, replica: Replica, now: float) -> None:
        completing = replica.completing
        ended = replica.fire(now)
        for request in completing:
            if request.first == now:
                self._ttft.add(now - request.arrived)
                self._recent.append(now - request.arrived)
        outcome = self._outcome
        for request in ended:
            outcome.finished += 1
            outcome.output_tokens += request.generated
            if request.generated > 1:
                outcome.between_tokens.append((now - request.first) / (request.generated - 1))
        if ended:
            self._in_flight -= len(ended)
            self._last_activity = now
        self._schedule(replica)
        self._file(replica)
        if ended and len(self._queue):
            self._pump(now)

    def _pump(self, now: float) -> None:
        while self._roomy and (ticket := self._queue.peek("")) is not None:
            if not self._dispatch(ticket.item, now):
                return
            self._queue.take("")

    def _schedule(self, replica: Replica) -> None:
        if replica.wakes is not None:
            self._numbers += 1
            heappush(self._events, (replica.wakes, self._numbers, replica))

    # Replicas

    def _file(self, replica: Replica) -> None:
        """Keeps the list of replicas with room."""
        open_now = replica.drained_at is None and replica.ready and has_room(replica.candidate(), 1)
        roomy = self._roomy
        if open_now and replica.place < 0:
            replica.place = len(roomy)
            roomy.append(replica)
        elif not open_now and replica.place >= 0:
            last = roomy.pop()
            if last is not replica:
                roomy[replica.place] = last
                last.place = replica.place
            replica.place = -1

    def _create(self, now: float, start_seconds: float) -> None:
        self._numbers += 1
        name = f"r{self._numbers}"
        replica = Replica(name, self._settings.replica, now, now + start_seconds)
        self._replicas.append(replica)

    def _tick(self, now: float) -> None:
        """Replicas that have started, deadlines that have come, drains that are over."""
        self._ttft.tick(now)
        gone = []
        for replica in self._replicas:
            if replica.drained_at is not None:
                if not replica.in_flight or now >= replica.drained_at + self._drain_seconds:
                    gone.append(replica)
            elif not replica.ready and now >= replica.ready_at:
                replica.ready = True
                self._file(replica)
        for replica in gone:
            held = replica.stop()
            self._in_flight -= len(held)
            self._outcome.continued += len(held)
            self._outcome.replica_seconds += now - replica.created
            self._replicas.remove(replica)
            for request in held:
                self._enqueue(request, now, front=True)
        self._outcome.timed_out += len(self._queue.expire(now))
        self._pump(now)

    # Scaling

    def _look(self, now: float) -> None:
        staying = [replica for replica in self._replicas if replica.drained_at is None]
        ready = [replica for replica in staying if replica.ready]
        reason = ""
        if self._scaling is not None:
            decision = self._decide(self._scaling, staying, ready, now)
            self._memory, self._wanted, reason = decision.memory, decision.wanted, decision.reason
            self._follow(staying, now)
        self._outcome.samples.append(
            Sample(
                at=now,
                wanted=self._wanted,
                ready=len(ready),
                existing=len(self._replicas),
                queued=len(self._queue),
                in_flight=self._in_flight,
                reason=reason,
                arrived=self._arrived,
                first_tokens=self._recent,
            )
        )
        self._outcome.first_tokens += self._recent
        self._recent, self._arrived = [], 0

    def _decide(
        self, scaling: Scaling, staying: list[Replica], ready: list[Replica], now: float
    ) -> Decision:
        first, counts = self._ttft.counts()
        busy = self._in_flight or len(self._queue)
        report = RouterReport(
            at=now,
            queued=len(self._queue),
            idle_seconds=0.0 if busy else now - self._last_activity,
            in_flight={replica.name: float(replica.in_flight) for replica in ready},
            kv={replica.name: replica.kv for replica in ready},
            ttft=Durations((*[0] * first, *counts)),
        )
        reports = {ROUTER: report}
        load = total_load(reports, reports, self._history, now)
        self._history = self._history.followed_by(reports, now)
        starting = [replica.name for replica in staying if not replica.ready]
        replicas = Replicas(self._wanted, list(report.in_flight), starting)
        return decide(scaling, replicas, load, self._memory, now)

    def _follow(self, staying: list[Replica], now: float) -> None:
        """Makes and drains replicas as the planner does: whose loss costs least goes first."""
        for _ in range(self._wanted - len(staying)):
            self._create(now, self._settings.start_seconds)
        surplus = len(staying) - self._wanted
        if surplus > 0:
            staying.sort(key=lambda r: (r.ready, r.in_flight, -r.created))
            for replica in staying[:surplus]:
                replica.drained_at = now
                self._file(replica)
