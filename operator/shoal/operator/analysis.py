"""Is the new revision worse than the stable one? From what routers count, look by look. Pure.

A look fails where one of three figures is both of consequence and proven:

    of consequence   the figure is beyond its limit: the share of failed requests beyond
                     maxErrorRate, or p95 of TTFT or ITL beyond the stable one's times its ratio
    proven           a sequential test (analysis_evidence) has rejected that the new revision is
                     no worse; at no difference that ever happens with probability FALSE_ALARM at
                     most, over all three figures, all looks and all steps

`maxFailures` failed looks in a row end the canary. The first `minRequests` requests of the new
revision are its warm-up: they count as requests and as errors, but their times do not, since caches
begin empty. It is healthy once as many again were compared and it was not proven to be worse. Times
between tokens share a request's fate, so a look's tokens count for as much as its requests. At
weight 100 nothing is left to compare with: times are then not judged, and errors are tested against
maxErrorRate itself.
"""

from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import log
from typing import Final

from shoal.api.rollout import CanaryAnalysis
from shoal.operator.analysis_counts import Counts
from shoal.operator.analysis_evidence import Evidence, Outcomes, log_e_alone
from shoal.operator.durations import Durations

FALSE_ALARM: Final = 0.01
FIGURES: Final = 3
QUANTILES: Final = (0.5, 0.8, 0.95)  # thresholds, of the stable revision's earlier times
SLOWER: Final = (1.6, 2.5, 5.0, 15.0)  # odds ratios that are guessed
FAILING: Final = (3.0, 10.0, 50.0, 1000.0)
ENOUGH: Final = 20  # earlier times of the stable revision, before a threshold is taken from them
PROOF: Final = log(FIGURES / FALSE_ALARM)


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

    @property
    def ratio(self) -> float | None:
        """p95 of the new revision over that of the stable one; None: not known."""
        stable, canary = self.stable.quantile(0.95), self.canary.quantile(0.95)
        return canary / stable if stable and canary else None


def _latency_evidence() -> Evidence:
    return Evidence.none(len(QUANTILES), len(SLOWER))


@dataclass(frozen=True, slots=True)
class Analysis:
    """What is known of a canary. Evidence, requests and failed looks must survive a restart;
    figures and thresholds are seen anew."""

    requests: int = 0  # of the new revision, and of these failed
    failures: int = 0
    judged: int = 0  # of the new revision's times, since the warm-up
    failed_looks: int = 0  # in a row
    errors: Evidence = field(default_factory=lambda: Evidence.none(1, len(FAILING)))
    errors_alone: tuple[float, ...] = (0.0,) * len(FAILING)
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


def look(spec: CanaryAnalysis, before: Analysis, stable: Counts, canary: Counts) -> Look:
    """Judges what both revisions' requests met since the last look."""
    warm = before.requests >= spec.min_requests
    after = replace(
        before,
        requests=before.requests + canary.requests,
        failures=before.failures + canary.failures,
        stable_requests=before.stable_requests + stable.requests,
        stable_failures=before.stable_failures + stable.failures,
        errors=_errors(before, stable, canary),
        errors_alone=tuple(
            value + log_e_alone(canary.requests, canary.failures, spec.max_error_rate, odds)
            for value, odds in zip(before.errors_alone, FAILING, strict=True)
        ),
    )
    if warm:
        requests = stable.ttft.total + canary.ttft.total
        tokens = stable.itl.total + canary.itl.total
        weight = min(1.0, requests / tokens) if tokens and requests else 1.0
        after = replace(
            after,
            judged=before.judged + _judged(before, stable, canary),
            ttft=_times(before.ttft, before.ttft_seen, stable.ttft, canary.ttft, 1.0),
            itl=_times(before.itl, before.itl_seen, stable.itl, canary.itl, weight),
            ttft_seen=before.ttft_seen.and_also(stable.ttft, canary.ttft),
            itl_seen=before.itl_seen.and_also(stable.itl, canary.itl),
        )
    figures = _figures(after)
    if after.requests < spec.min_requests:
        message = f"{after.requests} of {spec.min_requests} requests (minRequests); {figures}"
        return Look(Verdict.WAITING, message, after)
    faults = _faults(spec, after, compared=stable.requests > 0)
    if not faults and after.judged < spec.min_requests:
        message = f"{after.judged} of {spec.min_requests} requests judged; {figures}"
        return Look(Verdict.WAITING, message, replace(after, failed_looks=0))
    if not faults:
        return Look(Verdict.HEALTHY, figures, replace(after, failed_looks=0))
    after = replace(after, failed_looks=after.failed_looks + 1)
    failed = after.failed_looks >= spec.max_failures
    message = f"{'; '.join(faults)}; {figures}"
    return Look(Verdict.FAILED if failed else Verdict.FAILING, message, after)


def _judged(before: Analysis, stable: Counts, canary: Counts) -> int:
    """How many of the look's times count: those that could be compared, or where nothing can be."""
    compared = before.ttft_seen.stable.total >= ENOUGH or not stable.ttft.total
    return canary.ttft.total if compared else 0


def _faults(spec: CanaryAnalysis, found: Analysis, *, compared: bool) -> list[str]:
    faults = []
    rate = found.failures / found.requests if found.requests else 0.0
    alone = Evidence(found.errors_alone, ())
    proof = found.errors if compared else alone
    if rate > spec.max_error_rate and proof.log >= PROOF:
        faults.append(f"{rate:.1%} of requests failed (maxErrorRate {spec.max_error_rate:.1%})")
    for name, evidence, seen, limit, key in (
        ("TTFT", found.ttft, found.ttft_seen, spec.max_ttft_p95_ratio, "maxTtftP95Ratio"),
        ("ITL", found.itl, found.itl_seen, spec.max_itl_p95_ratio, "maxItlP95Ratio"),
    ):
        ratio = seen.ratio
        if compared and ratio is not None and ratio > limit and evidence.log >= PROOF:
            faults.append(f"{name} p95 is {ratio:.2f} times the stable one ({key} {limit:g})")
    return faults


def _figures(found: Analysis) -> str:
    """The figures of both revisions, for people."""
    parts = [f"{found.requests} requests, {found.failures} failed"]
    for name, seen in (("TTFT", found.ttft_seen), ("ITL", found.itl_seen)):
        stable, canary = seen.stable.quantile(0.95), seen.canary.quantile(0.95)
        if stable is not None and canary is not None:
            parts.append(f"{name} p95 {_milliseconds(canary)} to {_milliseconds(stable)}")
    return ", ".join(parts)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms"


def _errors(before: Analysis, stable: Counts, canary: Counts) -> Evidence:
    found = Outcomes(stable.requests, stable.failures, canary.requests, canary.failures)
    rate = (before.stable_failures + 0.5) / (before.stable_requests + 100)
    return before.errors.after([found], [rate], FAILING)


def _times(
    evidence: Evidence, seen: Seen, stable: Durations, canary: Durations, weight: float
) -> Evidence:
    """`evidence` with one look's times, against thresholds from earlier ones."""
    if (known := seen.stable.total) < ENOUGH:
        return evidence
    looks: list[Outcomes | None] = []
    rates = []
    for share in QUANTILES:
        bucket = seen.stable.bucket_at(share)
        assert bucket is not None
        looks.append(
            Outcomes(stable.total, stable.above(bucket), canary.total, canary.above(bucket))
        )
        rates.append((seen.stable.above(bucket) + 0.5) / (known + 1))
    return evidence.after(looks, rates, SLOWER, weight)
