"""Is the new revision worse than the stable one? From what routers count, look by look. Pure.

A look fails where one of three figures is both of consequence and proven:

    of consequence   the figure is beyond its limit: the share of failed requests beyond
                     maxErrorRate, or p95 of TTFT or ITL beyond the stable one's times its ratio,
                     or those of the slowest fifth together, of which a few hundred requests
                     say more than of p95
    proven           a sequential test (analysis_evidence) has rejected that the new revision is
                     no worse; at no difference that ever happens with probability FALSE_ALARM at
                     most, over all tests, all looks and all steps, for independent requests;
                     otherwise as far as the design effect is known

`maxFailures` failed looks in a row end the canary. The first `minRequests` requests of the new
revision are its warm-up: they count as requests and as errors, but their times do not, since caches
begin empty. It is healthy once as many again were compared and it was not proven to be worse. Times
between tokens share a request's fate, so a look's tokens count for as much as its requests.

Revisions are compared look by look, so a look in which either had no request is left out. At weight
100 nothing is left to compare with: times are then not judged, and from there on errors are tested
against maxErrorRate itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import exp, log
from typing import Final

from shoal.api.rollout import CanaryAnalysis
from shoal.operator.analysis_counts import Counts
from shoal.operator.analysis_evidence import Evidence, Outcomes, Score, log_e_alone
from shoal.operator.durations import Durations

FALSE_ALARM: Final = 0.01
TESTS: Final = 4  # errors, compared and alone; TTFT; ITL
SHIFTS: Final = (0.25, 0.5, 1.0, 2.0)  # of normal scores, that are guessed
TAILS: Final = (0.8, 0.95)  # of the stable revision's earlier times: thresholds
LATER: Final = tuple(map(log, (2.5, 5.0, 15.0)))  # guessed for the odds beyond them, as logarithms
SLOWER: Final = (SHIFTS, *(LATER for _ in TAILS))
FAILING: Final = tuple(map(log, (3.0, 10.0, 50.0, 1000.0)))
P95: Final = (0.95,)
SLOWEST: Final = (0.8, 0.85, 0.9, 0.95)  # a fifth of all; varies by less than p95 alone
ENOUGH: Final = 20  # earlier times of the stable revision, before a threshold is taken from them
PROOF: Final = log(TESTS / FALSE_ALARM)


class Verdict(StrEnum):
    """What a look says."""

    WAITING = "Waiting"  # too few requests
    HEALTHY = "Healthy"
    FAILING = "Failing"  # worse, but not for maxFailures looks yet
    FAILED = "Failed"


@dataclass(frozen=True, slots=True)
class Seen:
    """Times of both revisions since the warm-up, as far as this process knows them."""

    stable: Durations = field(default_factory=Durations)
    canary: Durations = field(default_factory=Durations)

    def and_also(self, stable: Durations, canary: Durations) -> "Seen":
        return Seen(
            Durations.merged((self.stable, stable)), Durations.merged((self.canary, canary))
        )

    def ratio(self, shares: Sequence[float]) -> float | None:
        """The new revision's quantiles over the stable one's, their geometric mean; None: not
        known. Where buckets are too coarse for a quantile, the least that it may be."""
        pairs = [(self.canary.between(share), self.stable.between(share)) for share in shares]
        logs = [log(canary[0] / stable[1]) for canary, stable in pairs if canary and stable]
        return exp(sum(logs) / len(logs)) if logs else None


def _latency_evidence() -> Evidence:
    return Evidence.none(SLOWER)


@dataclass(frozen=True, slots=True)
class Analysis:
    """What is known of a canary. Evidence, requests and failed looks must survive a restart;
    figures and thresholds are seen anew."""

    requests: int = 0  # of the new revision, and of these failed
    failures: int = 0
    judged: int = 0  # of the new revision's times, since the warm-up
    failed_looks: int = 0  # in a row
    errors: Evidence = field(default_factory=lambda: Evidence.none([FAILING]))
    errors_alone: tuple[float, ...] = (0.0,) * len(FAILING)  # since weight 100
    ttft: Evidence = field(default_factory=_latency_evidence)
    itl: Evidence = field(default_factory=_latency_evidence)
    stable_requests: int = 0
    stable_failures: int = 0
    ttft_seen: Seen = field(default_factory=Seen)
    itl_seen: Seen = field(default_factory=Seen)


@dataclass(frozen=True, slots=True)
class Look:
    """One look's outcome."""

    verdict: Verdict
    message: str  # a sentence with the figures
    analysis: Analysis


@dataclass(frozen=True, slots=True)
class Opinion:
    """What a webhook says of the new revision."""

    healthy: bool
    message: str = ""


def with_opinion(
    spec: CanaryAnalysis, before: Analysis, found: Look, opinion: Opinion | None
) -> Look:
    """The look with somebody else's judgement. No answer promotes nobody, and fails nobody."""
    if found.verdict not in (Verdict.HEALTHY, Verdict.FAILING):
        return found
    if opinion is None:
        if found.verdict is Verdict.FAILING:
            return found
        message = f"the webhook has not answered; {found.message}"
        return replace(found, verdict=Verdict.WAITING, message=message)
    if opinion.healthy:
        return found
    analysis = replace(found.analysis, failed_looks=before.failed_looks + 1)
    failed = analysis.failed_looks >= spec.max_failures
    said = f"the webhook says no{': ' if opinion.message else ''}{opinion.message}"
    return Look(Verdict.FAILED if failed else Verdict.FAILING, f"{said}; {found.message}", analysis)


def look(
    spec: CanaryAnalysis, before: Analysis, stable: Counts, canary: Counts, *, alone: bool = False
) -> Look | None:
    """Judges what both revisions' requests met since the last look. `alone`: the new one has all
    weight. None: nothing to judge, so what the last look found stands, in a row or not."""
    if canary.idle or (stable.idle and not alone):
        return None
    warm = before.requests >= spec.min_requests
    after = replace(
        before,
        requests=before.requests + canary.requests,
        failures=before.failures + canary.failures,
        stable_requests=before.stable_requests + stable.requests,
        stable_failures=before.stable_failures + stable.failures,
        errors=_errors(before, stable, canary),
    )
    if alone:
        gains = (
            log_e_alone(canary.requests, canary.failures, spec.max_error_rate, exp(tilt))
            for tilt in FAILING
        )
        pairs = zip(before.errors_alone, gains, strict=True)
        after = replace(after, errors_alone=tuple(value + gain for value, gain in pairs))
    if warm:
        requests = stable.ttft.total + canary.ttft.total
        tokens = stable.itl.total + canary.itl.total
        weight = min(1.0, requests / tokens) if tokens and requests else 1.0
        after = replace(
            after,
            judged=before.judged + _judged(before, stable, canary, alone),
            ttft=_times(before.ttft, before.ttft_seen, stable.ttft, canary.ttft, 1.0),
            itl=_times(before.itl, before.itl_seen, stable.itl, canary.itl, weight),
            ttft_seen=before.ttft_seen.and_also(stable.ttft, canary.ttft),
            itl_seen=before.itl_seen.and_also(stable.itl, canary.itl),
        )
    figures = _figures(after)
    if after.requests < spec.min_requests:
        message = f"{after.requests} of {spec.min_requests} requests (minRequests); {figures}"
        return Look(Verdict.WAITING, message, after)
    faults = _faults(spec, after, alone)
    if not faults and after.judged < spec.min_requests:
        message = f"{after.judged} of {spec.min_requests} requests judged; {figures}"
        return Look(Verdict.WAITING, message, replace(after, failed_looks=0))
    if not faults:
        return Look(Verdict.HEALTHY, figures, replace(after, failed_looks=0))
    after = replace(after, failed_looks=after.failed_looks + 1)
    failed = after.failed_looks >= spec.max_failures
    message = f"{'; '.join(faults)}; {figures}"
    return Look(Verdict.FAILED if failed else Verdict.FAILING, message, after)


def _judged(before: Analysis, stable: Counts, canary: Counts, alone: bool) -> int:
    """How many of the look's times count: those that could be compared, or where nothing can be:
    alone, and beside a stable revision that answers nobody."""
    compared = before.ttft_seen.stable.total >= ENOUGH and stable.ttft.total > 0
    silent = not stable.ttft.total and 0 < stable.requests <= stable.failures
    return canary.ttft.total if alone or compared or silent else 0


def _faults(spec: CanaryAnalysis, found: Analysis, alone: bool) -> list[str]:
    faults = []
    rate = found.failures / found.requests if found.requests else 0.0
    proof = Evidence(found.errors_alone, ()) if alone else found.errors
    if rate > spec.max_error_rate and proof.log >= PROOF:
        faults.append(f"{rate:.1%} of requests failed (maxErrorRate {spec.max_error_rate:.1%})")
    for name, evidence, seen, limit, key in (
        ("TTFT", found.ttft, found.ttft_seen, spec.max_ttft_p95_ratio, "maxTtftP95Ratio"),
        ("ITL", found.itl, found.itl_seen, spec.max_itl_p95_ratio, "maxItlP95Ratio"),
    ):
        p95, slowest = seen.ratio(P95), seen.ratio(SLOWEST)
        if alone or p95 is None or slowest is None or evidence.log < PROOF:
            continue
        if max(p95, slowest) > limit:
            both = f"{p95:.2f} times the stable one, the slowest fifth {slowest:.2f} times"
            faults.append(f"{name} p95 is {both} ({key} {limit:g})")
    return faults


def _figures(found: Analysis) -> str:
    """The figures of both revisions, for people."""
    parts = [f"{found.requests} requests, {found.failures} failed"]
    for name, seen in (("TTFT", found.ttft_seen), ("ITL", found.itl_seen)):
        stable, canary = seen.stable.quantile(*P95), seen.canary.quantile(*P95)
        if stable is not None and canary is not None:
            parts.append(f"{name} p95 {_milliseconds(canary)} to {_milliseconds(stable)}")
    return ", ".join(parts)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms"


def _errors(before: Analysis, stable: Counts, canary: Counts) -> Evidence:
    found = Outcomes(_answered_and_failed(stable), _answered_and_failed(canary))
    rate = (before.stable_failures + 0.5) / (before.stable_requests + 100)
    return before.errors.after(found, [Score.beyond(0, rate)], [FAILING])


def _answered_and_failed(counts: Counts) -> tuple[int, int]:
    failed = min(counts.failures, counts.requests)
    return counts.requests - failed, failed


def _times(
    evidence: Evidence, seen: Seen, stable: Durations, canary: Durations, weight: float
) -> Evidence:
    """`evidence` with one look's times, by what earlier ones of the stable revision were like."""
    if (known := seen.stable.total) < ENOUGH:
        return evidence
    first = next(bucket for bucket, count in enumerate(seen.stable.counts) if count)
    buckets = range(first, len(seen.stable.counts))
    ranks = _outcomes(seen.stable, buckets)
    scores = [Score.normal(ranks)]
    for share in TAILS:
        last = seen.stable.bucket_at(share)
        assert last is not None
        rate = (seen.stable.above(last) + 0.5) / (known + 1)
        scores.append(Score.beyond(last - first + 1, rate, len(ranks)))
    found = Outcomes(_outcomes(stable, buckets), _outcomes(canary, buckets))
    return evidence.after(found, scores, SLOWER, weight)


def _outcomes(times: Durations, buckets: range) -> tuple[int, ...]:
    """Times by bucket, with one outcome for all below `buckets` and one for all beyond. A bet must
    not depend on the look itself, so `buckets` are those that earlier looks have met."""
    some = times.counts[buckets.start : buckets.stop]
    missing = len(buckets) - len(some)
    return (sum(times.counts[: buckets.start]), *some, *[0] * missing, times.above(buckets[-1]))
