"""A service's load as all its routers report it together. Pure.

Every router counts its own requests, so queues and sequences in flight add up; KV use is the
engine's own figure, of which the fullest counts (reports differ by their age alone); a service
has been idle for as long as the router that worked last. Times to the first token are merged as
counts in buckets, which gives the quantile of all requests; quantiles of quantiles mean nothing.

A router that stops answering may still hold requests. Going up, its silence counts as no load;
going down, it forbids every step until it answers or has been silent for `FORGOTTEN_SECONDS`:
by then it is out of the load balancer too, and what waited there has timed out elsewhere.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from shoal.api.v1 import router_pb2
from shoal.operator.durations import Durations

LATE_SECONDS = 5.0  # without an answer: the router counts as silent
FORGOTTEN_SECONDS = 60.0
TTFT_WINDOW_SECONDS = 30.0
TTFT_SNAPSHOT_SECONDS = 5.0
TTFT_SAMPLES = 5  # fewer say nothing about a 95th percentile


def _no_figures() -> Mapping[str, float]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class RouterReport:
    """What one router said about one service, and when (Unix seconds)."""

    at: float
    queued: int = 0
    idle_seconds: float = 0.0  # since it last had a request; 0 while it has any
    in_flight: Mapping[str, float] = field(default_factory=_no_figures)  # sequences, by replica
    kv: Mapping[str, float] = field(
        default_factory=_no_figures
    )  # share of KV blocks in use, by replica
    ttft: Durations = field(default_factory=Durations)  # since the router started


@dataclass(frozen=True, slots=True)
class TtftHistory:
    """Snapshots of every router's counts, so that a recent window is a difference. Not worth
    keeping over a restart: until the window has been seen again, TtftP95 is not known."""

    snapshots: tuple[tuple[float, Mapping[str, Durations]], ...] = ()  # oldest first

    def followed_by(self, reports: Mapping[str, RouterReport], now: float) -> "TtftHistory":
        """With a snapshot of `reports`, if one is due."""
        if self.snapshots and now - self.snapshots[-1][0] < TTFT_SNAPSHOT_SECONDS:
            return self
        kept = [s for s in self.snapshots if s[0] >= now - TTFT_WINDOW_SECONDS]
        current = {name: report.ttft for name, report in reports.items()}
        return TtftHistory((*kept, (now, current)))

    def recent(self, reports: Mapping[str, RouterReport]) -> Durations:
        """What was counted since the oldest snapshot, at all routers that were there then."""
        if not self.snapshots:
            return Durations()
        _, before = self.snapshots[0]
        return Durations.merged(
            report.ttft.since(before[name]) for name, report in reports.items() if name in before
        )


@dataclass(frozen=True, slots=True)
class Load:
    """The service's load, of the routers that answered lately."""

    queued: int
    in_flight: Mapping[str, float]  # sequences, by replica that any router has admitted
    kv: Mapping[str, float]
    ttft_p95: float | None  # seconds; 0 where nothing is under way, None: not known
    idle_seconds: float  # of the router that worked last
    complete: bool  # no router is silent, so that this is all

    def busy(self, slots: int) -> float:
        """The present work in full replicas, where one runs `slots` sequences at a time."""
        names = {*self.in_flight, *self.kv}
        return sum(
            min(1.0, max(self.in_flight.get(name, 0.0) / slots, self.kv.get(name, 0.0)))
            for name in names
        )


def report_of(load: router_pb2.ServiceLoad, at: float) -> RouterReport:
    """The report in a router's answer to GetLoad."""
    admitted = [e for e in load.endpoints if e.admitted]
    return RouterReport(
        at=at,
        queued=load.queued,
        idle_seconds=load.idle_seconds,
        in_flight={e.name: float(e.in_flight) for e in admitted},
        kv={
            e.name: e.load.blocks_used / e.load.blocks_total
            for e in admitted
            if e.load.blocks_total
        },
        ttft=Durations.merged(Durations.of(revision.ttft) for revision in load.revisions),
    )


def total_load(
    reports: Mapping[str, RouterReport],
    routers: Collection[str],
    history: TtftHistory,
    now: float,
) -> Load | None:
    """The load of a service; None where no router says anything about it.

    `reports` holds the last report of every router, `routers` names those that take requests
    (their pods are ready): one of them that never answered is as silent as one that stopped, for
    as long as it is named.
    """
    fresh = {n: r for n, r in reports.items() if n in routers and r.at > now - LATE_SECONDS}
    if not fresh:
        return None
    last_heard = {n: reports[n].at for n in routers if n in reports}
    silent = [
        n for n in routers if n not in fresh and last_heard.get(n, now) > now - FORGOTTEN_SECONDS
    ]
    in_flight = _summed(report.in_flight for report in fresh.values())
    queued = sum(report.queued for report in fresh.values())
    recent = history.recent(fresh)
    if recent.total >= TTFT_SAMPLES:
        ttft: float | None = recent.quantile(0.95)
    else:
        ttft = 0.0 if history.snapshots and not queued and not any(in_flight.values()) else None
    return Load(
        queued=queued,
        in_flight=in_flight,
        kv=_greatest(report.kv for report in fresh.values()),
        ttft_p95=ttft,
        idle_seconds=min(report.idle_seconds for report in fresh.values()),
        complete=not silent,
    )


def _summed(figures: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for mapping in figures:
        for name, value in mapping.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _greatest(figures: Iterable[Mapping[str, float]]) -> dict[str, float]:
    greatest: dict[str, float] = {}
    for mapping in figures:
        for name, value in mapping.items():
            greatest[name] = max(greatest.get(name, 0.0), value)
    return greatest
