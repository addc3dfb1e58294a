"""Whom to ask what when, and what an answer changes. Pure: clocks and answers are arguments.

Each router is asked often while something is under way, about those services alone where they
are few, seldom else. One that has not answered for a while is left out, so that a dead one holds
nothing up. One that has just come up counts after a moment: until it has connected to all
replicas, services would seem to be served less.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

from shoal.operator.autoscale_load import FORGOTTEN_SECONDS
from shoal.operator.observe import RouterView

_FEW: Final = 4  # services that are asked about by name

Views = Mapping[str, RouterView]  # by service


@dataclass(frozen=True, slots=True)
class RouterPace:
    """Seconds."""

    few: float = 0.25  # between two questions while few services are under way
    eager: float = 1.0  # while many are
    scaled: float = 2.0  # while any scales by its load
    idle: float = 5.0  # else
    find: float = 1.0  # between two lists of the router pods, at least
    settle: float = 3.0  # from ready until it counts
    answer: float = 3.0  # longest wait for one answer
    silence: float = 5.0  # without an answer for so long: left out
    forgotten: float = FORGOTTEN_SECONDS  # and for so long: nobody waits for it any more


PACE: Final = RouterPace()


@dataclass(frozen=True, slots=True)
class Question:
    """The services that routers are asked about."""

    services: tuple[str, ...] = ()  # (): all

    def concerns(self, *views: Views) -> Collection[str]:
        """The services of which an answer tells something new, at most."""
        return self.services or {name for view in views for name in view}


@dataclass(frozen=True, slots=True)
class Interest:
    """The services that wait for what routers say."""

    under_way: frozenset[str] = frozenset()
    scaled: frozenset[str] = frozenset()  # their replicas, or a trial, follow the load

    def with_under_way(self, service: str, busy: bool) -> "Interest":
        return replace(self, under_way=_with(self.under_way, service, busy))

    def with_scaled(self, service: str, by_load: bool) -> "Interest":
        return replace(self, scaled=_with(self.scaled, service, by_load))

    def question(self, asked_all: float | None, now: float, pace: RouterPace) -> Question:
        """What to ask a router next; `asked_all` is when it was asked about all services last."""
        recent = asked_all is not None and now - asked_all < self._all_seconds(pace)
        if recent and 0 < len(self.under_way) <= _FEW:
            return Question(tuple(sorted(self.under_way)))
        return Question()

    def rest(self, pace: RouterPace) -> float:
        """Seconds for which nobody need be asked, unless something gets under way."""
        return 0.0 if self.under_way else self._all_seconds(pace)

    def step(self, pace: RouterPace) -> float:
        """Seconds between two questions; what has just begun is not known to routers yet."""
        return pace.few if len(self.under_way) <= _FEW else pace.eager

    def differs(self, service: str, before: RouterView | None, after: RouterView | None) -> bool:
        """Whether an answer is news. Requests come and go all the time; their number matters
        while a pod drains, and a first one that waits while nobody serves."""
        if service in self.scaled and _waits(after) and not _waits(before):
            return True
        if service in self.under_way or before is None or after is None:
            return before != after
        return before.generation != after.generation or _admissions(before) != _admissions(after)

    def _all_seconds(self, pace: RouterPace) -> float:
        return pace.scaled if self.scaled else pace.idle


@dataclass(frozen=True, slots=True)
class Hearing:
    """What is known of one router."""

    ready: bool = False  # says its pod
    counts_from: float | None = None  # None: it was never ready
    answered: bool = False  # at least once
    silent_since: float | None = None  # when it was first asked without an answer
    asked_all: float | None = None  # when it was last asked about all services, and answered
    views: Views = field(default_factory=lambda: MappingProxyType({}))

    def found(self, ready: bool, counts_from: float) -> "Hearing":
        """Its pod was listed; it counts from then on if it is ready for the first time."""
        if not ready or self.counts_from is not None:
            return replace(self, ready=ready)
        return replace(self, ready=True, counts_from=counts_from)

    def heard(self, question: Question, said: Views, asked: float) -> "Hearing":
        """It answered what it was asked then; of other services it says what it said before."""
        others = {
            name: view
            for name, view in self.views.items()
            if question.services and name not in question.services
        }
        views = MappingProxyType({**others, **said})
        asked_all = self.asked_all if question.services else asked
        return replace(self, answered=True, silent_since=None, asked_all=asked_all, views=views)

    def unheard(self, asked: float) -> "Hearing":
        """It did not answer what it was asked then."""
        since = asked if self.silent_since is None else self.silent_since
        return replace(self, silent_since=since)

    def counts(self, now: float, pace: RouterPace) -> bool:
        """Whether plans depend on what it says."""
        if not self.answered or not self._settled(now):
            return False
        return self.silent_since is None or now - self.silent_since < pace.silence

    def mute(self, now: float, pace: RouterPace) -> bool:
        """Whether it takes requests but has not answered for a while. One that has been silent
        for longer than that holds no request that anybody waits for."""
        if not self.ready or not self._settled(now) or self.counts(now, pace):
            return False
        return self.silent_since is None or now - self.silent_since < pace.forgotten

    def _settled(self, now: float) -> bool:
        return self.counts_from is not None and now >= self.counts_from


def news(interest: Interest, question: Question, before: Hearing, after: Hearing) -> Iterator[str]:
    """Services of which an answer to the question said something new."""
    for name in question.concerns(before.views, after.views):
        if interest.differs(name, before.views.get(name), after.views.get(name)):
            yield name


def _with(names: frozenset[str], name: str, wanted: bool) -> frozenset[str]:
    if (name in names) is wanted:
        return names
    return names | {name} if wanted else names - {name}


def _waits(view: RouterView | None) -> bool:
    """Whether any request waits in this router's queue."""
    return view is not None and view.report is not None and view.report.queued > 0


def _admissions(view: RouterView) -> dict[str, tuple[str, bool]]:
    return {name: (found.address, found.admitted) for name, found in view.endpoints.items()}
