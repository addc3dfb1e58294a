"""The canary analysis: its test's guarantees, its rates by seeded simulation, its counting."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.api.rollout import CanaryAnalysis
from shoal.api.v1 import router_pb2
from shoal.operator.analysis import PROOF, Analysis, Verdict, look
from shoal.operator.analysis_counts import Counts, Tally
from shoal.operator.analysis_evidence import Outcomes, Spread, log_e, log_e_alone
from shoal.operator.durations import Durations, bucket_of

shares = st.floats(0, 1)
odds = st.floats(1.01, 1000)


def chances(requests, share):
    """Probability of each number of hits."""
    return [
        math.comb(requests, hits) * share**hits * (1 - share) ** (requests - hits)
        for hits in range(requests + 1)
    ]


@given(st.integers(1, 6), st.integers(1, 6), shares, shares, shares, odds)
def test_a_look_expects_no_evidence_where_the_canary_is_no_worse(
    na, nb, first, second, rate, ratio
):
    """The e-variable's mean is at most 1, whatever the guesses: bets against no difference lose."""
    worse, better = max(first, second), min(first, second)
    mean = sum(
        chance_a * chance_b * math.exp(log_e(Outcomes(na, ka, nb, kb), rate, ratio))
        for ka, chance_a in enumerate(chances(na, worse))
        for kb, chance_b in enumerate(chances(nb, better))
    )
    assert mean <= 1 + 1e-9


@given(st.integers(1, 12), shares, st.floats(0.001, 0.999), odds)
def test_a_canary_alone_is_held_to_its_limit(requests, share, limit, ratio):
    """Without a stable revision, a share of failures up to the limit is no evidence on average."""
    mean = sum(
        chance * math.exp(log_e_alone(requests, hits, limit, ratio))
        for hits, chance in enumerate(chances(requests, share * limit))
    )
    assert mean <= 1 + 1e-9


def test_independent_requests_have_no_design_effect_and_bursts_do():
    """Differences that swing more than chance allows weaken what one look may say."""
    rng = np.random.default_rng(3)
    calm = bursty = Spread()
    for _ in range(200):
        calm = calm.after(Outcomes(100, rng.binomial(100, 0.2), 40, rng.binomial(40, 0.2)))
        share = rng.choice([0.05, 0.35])
        bursty = bursty.after(Outcomes(100, rng.binomial(100, 0.2), 40, rng.binomial(40, share)))
    assert 1.0 <= calm.factor < 1.3
    assert bursty.factor > 3


def durations(seconds):
    """Counts of durations, by numpy for speed."""
    if not len(seconds):
        return Durations()
    buckets = np.maximum(0, np.ceil(np.log2(seconds) * 4).astype(int) + 55)
    return Durations(tuple(np.bincount(buckets).tolist()))


def test_the_simulation_counts_as_routers_do():
    """The fast bucketing of these tests is the real one."""
    seconds = np.random.default_rng(0).lognormal(-2, 2, 500)
    found = durations(seconds)
    assert sum(found.counts[:40]) == sum(bucket_of(second) < 40 for second in seconds)


class Canary:
    """A canary with 20 % of 50 requests a look; times are lognormal."""

    def __init__(self, rng, *, sigma=0.5, slower=1.0, errors=0.0, stable_errors=0.0, spec=None):
        self.rng, self.sigma, self.slower = rng, sigma, slower
        self.errors, self.stable_errors = errors, stable_errors
        self.spec = spec or CanaryAnalysis()
        self.analysis = Analysis()
        self.proven = False

    def step(self, requests=50):
        rng = self.rng
        canary = rng.binomial(requests, 0.2)
        stable = requests - canary
        found = look(
            self.spec,
            self.analysis,
            Counts(
                stable,
                rng.binomial(stable, self.stable_errors),
                durations(rng.lognormal(-1, self.sigma, stable)),
            ),
            Counts(
                canary,
                rng.binomial(canary, self.errors),
                durations(self.slower * rng.lognormal(-1, self.sigma, canary)),
            ),
        )
        self.analysis = found.analysis
        self.proven |= max(self.analysis.ttft.log, self.analysis.errors.log) >= PROOF
        return found

    def run(self, requests):
        """The verdict after so many requests of the canary."""
        while self.analysis.requests < requests:
            found = self.step()
            if found.verdict is Verdict.FAILED:
                break
        return found.verdict


def share_of(outcomes):
    return sum(outcomes) / len(outcomes)


def test_no_difference_is_no_alarm():
    """Over a whole canary of 1,000 requests, at most 1 % are proven worse that are not."""
    rng = np.random.default_rng(11)
    canaries = [Canary(rng, sigma=sigma) for sigma in (0.35, 0.8) for _ in range(100)]
    failed = [canary.run(1000) is Verdict.FAILED for canary in canaries]
    assert share_of(failed) <= 0.01
    assert share_of([canary.proven for canary in canaries]) <= 0.01


def test_errors_of_both_revisions_are_no_fault_of_the_new_one():
    """Where something else breaks requests of both alike, going back would not help."""
    rng = np.random.default_rng(12)
    canaries = [Canary(rng, errors=0.05, stable_errors=0.05) for _ in range(100)]
    assert share_of([canary.run(600) is Verdict.FAILED for canary in canaries]) <= 0.01


@pytest.mark.parametrize("sigma", [0.35, 0.5, 0.8])
def test_a_ttft_of_half_as_much_again_is_found_within_500_requests(sigma):
    """95 % at least, from narrow to wide distributions of times."""
    rng = np.random.default_rng(13)
    canaries = [Canary(rng, sigma=sigma, slower=1.5) for _ in range(100)]
    assert share_of([canary.run(500) is Verdict.FAILED for canary in canaries]) >= 0.95


def test_a_revision_that_fails_is_found_as_soon_as_looks_allow():
    """Three looks that fail in a row, once there are minRequests."""
    rng = np.random.default_rng(14)
    broken = [Canary(rng, errors=1.0) for _ in range(50)]
    assert all(canary.run(500) is Verdict.FAILED for canary in broken)
    assert max(canary.analysis.requests for canary in broken) < 120
    flaky = [Canary(rng, errors=0.05) for _ in range(50)]
    assert share_of([canary.run(500) is Verdict.FAILED for canary in flaky]) >= 0.95


def test_a_slower_revision_within_its_limit_is_kept():
    """What is proven but of no consequence ends no canary."""
    rng = np.random.default_rng(15)
    spec = CanaryAnalysis(max_ttft_p95_ratio=3.0)
    canary = Canary(rng, slower=1.5, spec=spec)
    assert canary.run(500) is Verdict.HEALTHY
    assert canary.proven


def test_nothing_is_judged_before_the_minimum():
    """Too few requests are waited for, and their times are warm-up."""
    canary = Canary(np.random.default_rng(16), slower=10.0, errors=1.0)
    assert canary.step(20).verdict is Verdict.WAITING
    assert canary.analysis.ttft_seen.canary.total == 0


def test_alone_only_errors_are_judged():
    """At weight 100 there is no stable request to compare with."""
    analysis, spec = Analysis(), CanaryAnalysis()
    slow = Counts(100, 0, durations(np.full(100, 30.0)))
    for number in range(5):
        found = look(spec, analysis, Counts(), slow)
        analysis = found.analysis
        assert found.verdict is (Verdict.HEALTHY if number else Verdict.WAITING)
    verdicts = []
    for _ in range(3):
        found = look(spec, analysis, Counts(), Counts(100, 50))
        analysis = found.analysis
        verdicts.append(found.verdict)
    assert verdicts == [Verdict.FAILING, Verdict.FAILING, Verdict.FAILED]


def answer(**revisions):
    load = router_pb2.ServiceLoad()
    for name, (requests, errors, broken) in revisions.items():
        load.revisions.add(
            revision=name,
            requests=requests,
            errors=errors,
            broken=broken,
            ttft=router_pb2.Durations(first=40, counts=[requests]),
        )
    return load


def test_looks_are_differences_over_all_routers():
    """Counts of routers add up; a new router begins, a restarted one begins again."""
    tally, stable, canary = Tally().next({"a": answer(old=(100, 5, 0))}, "old", "new")
    assert (stable, canary) == (Counts(), Counts())
    both = {"a": answer(old=(130, 6, 0), new=(10, 1, 2)), "b": answer(old=(50, 0, 0))}
    tally, stable, canary = tally.next(both, "old", "new")
    assert (stable.requests, stable.failures, stable.ttft.total) == (30, 1, 30)
    assert (canary.requests, canary.failures) == (12, 3)
    tally, stable, canary = tally.next({"b": answer(old=(60, 0, 0))}, "old", "new")
    assert (stable.requests, canary.requests) == (10, 0)
    tally, stable, canary = tally.next({"a": answer(old=(7, 0, 0))}, "old", "new")
    assert (stable.requests, canary.requests) == (7, 0)
