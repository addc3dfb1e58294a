"""Filter, score, pick: the choice of a replica, as a pure function of a frozen snapshot.

Filter: admitted replicas that have room, of an allowed revision, not excluded by an earlier
attempt (unless all are). Score: the time to first token predicted for each,

    (queued prefill tokens + own uncached tokens) / prefill rate      the work ahead of it
    + step seconds * (1 + in flight / slots)                          what decoding adds

Pick, by policy. `PrefixAware`: among the replicas that hold (nearly) the longest prefix, the one
predicted soonest, unless it is later than the soonest of all by more than twice what the cached
prefix saves, or than `load_limit_seconds`: a hot prefix then spreads instead of melting one.
`LeastRequests` and `RoundRobin` are what they say. Ties break at random, by the injected
generator.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

from shoal.api.routes import RoutingPolicy

DEFAULT_PREFILL_RATE = 2000.0  # tokens per second, until a replica has measured its own
DEFAULT_STEP_SECONDS = 0.02
TIE_SECONDS = 0.001  # predictions closer than this, or than TIE_RATIO, are equal
TIE_RATIO = 0.05


class Candidate(NamedTuple):
    """What is known of one replica at the moment of the choice."""

    name: str
    revision: str
    in_flight: int = 0  # sequences of this router
    slots: int = 1  # sequences it runs at once, at least 1
    waiting: int = 0  # sequences its engine has not started, as last reported
    queued_prefill_tokens: int = 0
    prefill_tokens_per_second: float = 0.0  # 0: not measured yet
    step_seconds: float = 0.0  # 0: not measured yet
    ejected: bool = False  # failed lately; taken only where every other is too


class Demand(NamedTuple):
    """What the choice needs to know of one request."""

    tokens: int  # to prefill, where nothing is cached
    sequences: int = 1
    revision: str | None = None  # only this one
    session: str | None = None
    avoid: frozenset[str] = frozenset()  # replicas that failed this very request


@dataclass(frozen=True, slots=True)
class PickSettings:
    policy: RoutingPolicy = RoutingPolicy.PREFIX_AWARE
    load_limit_seconds: float = 0.5  # later than the soonest, for affinity's sake, at most
    affinity_share: float = 0.8  # of the longest match that still counts as holding the prefix


def has_room(candidate: Candidate, sequences: int) -> bool:
    """The rule of late binding: a replica is handed what fits its slots plus an eighth of them
    (so that a slot that frees is filled without a round trip), and nothing while its engine
    reports more than that eighth waiting (its cache is full). An idle one takes any request.

    Of many samples no more than that eighth has to fit: they share one prompt and stay together,
    and a head of the queue that waited for an idle replica would hold up all behind it."""
    in_flight = candidate.in_flight
    if not in_flight:
        return True
    spare = candidate.slots // 8 or 1
    return in_flight + min(sequences, spare) <= candidate.slots + spare and (
        candidate.waiting <= spare
    )


def predicted_ttft(candidate: Candidate, tokens: int, fallback_rate: float) -> float:
    """Seconds until a request with this many uncached tokens would see its first token."""
    rate = candidate.prefill_tokens_per_second or fallback_rate
    step = candidate.step_seconds or DEFAULT_STEP_SECONDS
    pressure = 1.0 + candidate.in_flight / candidate.slots
    return (candidate.queued_prefill_tokens + tokens) / rate + step * pressure


def eligible(candidates: Sequence[Candidate], demand: Demand) -> Sequence[Candidate]:
    """The filter. Ejected and avoided replicas come back where nothing sound is left, but not
    where it is merely full: that is worth waiting for."""
    revision = demand.revision
    if revision is not None:
        candidates = [c for c in candidates if c.revision == revision]
    avoid = demand.avoid
    sound = [c for c in candidates if not (c.ejected or c.name in avoid)]
    fits = [c for c in sound or candidates if has_room(c, demand.sequences)]
    return fits if sound else [c for c in fits if not c.ejected] or fits


def pick(
    candidates: Sequence[Candidate],
    demand: Demand,
    cached_tokens: Mapping[str, int],
    settings: PickSettings,
    rng: random.Random,
    turn: int = 0,
) -> Candidate | None:
    """The replica to use, or None where the request had better wait.

    `cached_tokens` says how many of the demand's tokens each replica holds (absent: none);
    `turn` counts picks and drives round robin.
    """
    choice = eligible(candidates, demand)
    if len(choice) <= 1:
        return choice[0] if choice else None
    cached = [cached_tokens.get(c.name, 0) for c in choice]
    if demand.session is not None:
        session = demand.session
        home = max(range(len(choice)), key=lambda k: _rendezvous(session, choice[k].name))
        seconds, _ = _soonest(choice, demand.tokens, cached)
        if seconds[home] <= min(seconds) + settings.load_limit_seconds:
            return choice[home]
    match settings.policy:
        case RoutingPolicy.ROUND_ROBIN:
            return sorted(choice)[turn % len(choice)]
        case RoutingPolicy.LEAST_REQUESTS:
            return _least_in_flight(choice, rng)
        case RoutingPolicy.PREFIX_AWARE:
            return _prefix_aware(choice, demand.tokens, cached, settings, rng)


def draw_revision(weights: Mapping[str, int], share: float) -> str | None:
    """The revision whose part of [0, 1) holds `share`; None where nothing has a weight."""
    if len(weights) == 1:
        ((revision, weight),) = weights.items()
        return revision if weight > 0 else None
    total = sum(weight for weight in weights.values() if weight > 0)
    if not total:
        return None
    point = share * total
    for revision in sorted(weights):
        point -= max(0, weights[revision])
        if point < 0:
            return revision
    return max(revision for revision in weights if weights[revision] > 0)


def share_of(session: str) -> float:
    """A session's fixed place in [0, 1), so that it keeps its revision."""
    digest = blake2b(session.encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _soonest(
    choice: Sequence[Candidate], tokens: int, cached: Sequence[int]
) -> tuple[list[float], float]:
    """Predicted seconds of each, `cached` beside them, and the prefill rate of those that have
    measured none."""
    rates = [c.prefill_tokens_per_second for c in choice]
    measured = len(rates) - rates.count(0.0)
    rate = sum(rates) / measured if measured else DEFAULT_PREFILL_RATE
    seconds = [
        predicted_ttft(c, tokens - held, rate) for c, held in zip(choice, cached, strict=True)
    ]
    return seconds, rate


def _prefix_aware(
    choice: Sequence[Candidate],
    tokens: int,
    cached: Sequence[int],
    settings: PickSettings,
    rng: random.Random,
) -> Candidate:
    seconds, rate = _soonest(choice, tokens, cached)
    least = min(seconds)
    ranked = list(zip(seconds, cached, choice, strict=True))
    longest = max(cached)
    if longest:
        saved = longest / rate
        limit = least + min(settings.load_limit_seconds, 2 * saved)
        enough = settings.affinity_share * longest
        near = [entry for entry in ranked if entry[1] >= enough and entry[0] <= limit]
        if near:
            ranked, least = near, min(near)[0]
    tie = least + max(TIE_SECONDS, TIE_RATIO * least)
    return _least_in_flight([c for when, _, c in ranked if when <= tie], rng)


def _least_in_flight(choice: Sequence[Candidate], rng: random.Random) -> Candidate:
    if len(choice) == 1:
        return choice[0]
    least = min([c.in_flight for c in choice])
    return rng.choice([c for c in choice if c.in_flight == least])


def _rendezvous(session: str, name: str) -> bytes:
    return blake2b(f"{session}\0{name}".encode(), digest_size=8).digest()
