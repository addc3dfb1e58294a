"""The canary analysis: its test's guarantees, its rates by seeded simulation, its counting."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.api.rollout import CanaryAnalysis
from shoal.api.v1 import router_pb2
from shoal.operator.analysis import PROOF, Analysis, Seen, Verdict, look
from shoal.operator.analysis_counts import Counts, Tally
from shoal.operator.analysis_evidence import Outcomes, Score, Spread, log_e, log_e_alone
from shoal.operator.durations import Durations, bucket_of

shares = st.floats(0, 1)
odds = st.floats(1.01, 1000)


def chances(requests, share):
    """Probability of each number of hits."""
    return [
        math.comb(requests, hits) * share**hits * (1 - share) ** (requests - hits)
        for hits in range(requests + 1)
    ]


def ways(requests, shares):
    """Every way in which requests may end in three outcomes, and its probability."""
    for first in range(requests + 1):
        for second in range(requests - first + 1):
            counts = (first, second, requests - first - second)
            number = math.comb(requests, first) * math.comb(requests - first, second)
            yield counts, number * math.prod(p**n for p, n in zip(shares, counts, strict=True))


cuts = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)  # below each, a share of requests


def outcome_shares(below):
    return (below[0], below[1] - below[0], 1 - below[1])


@settings(deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    cuts,
    cuts,
    st.lists(st.floats(0.01, 100), min_size=3, max_size=3).map(sorted),
)
def test_a_look_expects_no_evidence_where_the_canary_is_no_worse(na, nb, first, second, bet):
    """The e-variable's mean is at most 1 whatever the bet, where the new revision's outcomes are
    stochastically no worse: bets against no difference lose."""
    stable = outcome_shares([min(pair) for pair in zip(first, second, strict=True)])
    canary = outcome_shares([max(pair) for pair in zip(first, second, strict=True)])
    mean = sum(
        chance_a * chance_b * math.exp(log_e(Outcomes(of_a, of_b), bet))
        for of_a, chance_a in ways(na, stable)
        for of_b, chance_b in ways(nb, canary)
    )
    assert mean <= 1 + 1e-9


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=60).filter(any), st.floats(0.01, 4))
def test_a_bet_by_ranks_never_falls_and_is_about_the_stable_one(known, tilt):
    """What log_e asks of a bet holds for every history; the stable revision's mean ratio is 1."""
    score = Score.normal(known)
    bet = score.bet(tilt)
    assert all(before <= after for before, after in pairwise(bet))
    assert sum(s * r for s, r in zip(score.shares, bet, strict=True)) == pytest.approx(1)


@settings(deadline=None)
@given(st.integers(2, 30), st.integers(0, 29), st.floats(0, 1), st.floats(1.01, 1000))
def test_a_bet_on_a_tail_is_an_odds_ratio(outcomes, last, rate, odds):
    """Beyond a threshold the ratio is `odds` times that before it."""
    bet = Score.beyond(last, rate, outcomes).bet(math.log(odds))
    assert all(before <= after for before, after in pairwise(bet))
    if last < outcomes - 1:
        assert bet[-1] / bet[0] == pytest.approx(odds)


@settings(deadline=None)
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
    score = Score.beyond(0, 0.2)

    def look(share):
        slow_a, slow_b = int(rng.binomial(100, 0.2)), int(rng.binomial(40, share))
        return Outcomes((100 - slow_a, slow_a), (40 - slow_b, slow_b))

    for _ in range(200):
        calm = calm.after(look(0.2), score)
        bursty = bursty.after(look(rng.choice([0.05, 0.35])), score)
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
    """A canary with a share of 50 requests a look; times are lognormal."""

    def __init__(
        self,
        rng,
        *,
        sigma=0.5,
        slower=1.0,
        tail=1.0,  # share of requests that are slower
        errors=0.0,
        stable_errors=0.0,
        share=0.2,
        spec=None,
        a_look=50,  # requests of both
    ):
        self.rng, self.sigma, self.slower, self.share = rng, sigma, slower, share
        self.tail, self.errors, self.stable_errors = tail, errors, stable_errors
        self.spec, self.a_look = spec or CanaryAnalysis(), a_look
        self.found = None
        self.analysis = Analysis()
        self.proven = False

    def step(self, requests=None):
        """What stands after one more look."""
        rng, requests = self.rng, requests or self.a_look
        canary = int(rng.binomial(requests, self.share))
        stable = requests - canary
        slowed = np.where(rng.random(canary) < self.tail, self.slower, 1.0)
        found = look(
            self.spec,
            self.analysis,
            Counts(
                stable,
                int(rng.binomial(stable, self.stable_errors)),
                durations(rng.lognormal(-1, self.sigma, stable)),
            ),
            Counts(
                canary,
                int(rng.binomial(canary, self.errors)),
                durations(slowed * rng.lognormal(-1, self.sigma, canary)),
            ),
        )
        if found is None:
            return self.found
        self.found, self.analysis = found, found.analysis
        self.proven |= max(self.analysis.ttft.log, self.analysis.errors.log) >= PROOF
        return found

    def run(self, requests):
        """The verdict after so many requests of the canary."""
        while self.analysis.requests < requests:
            found = self.step()
            if found is not None and found.verdict is Verdict.FAILED:
                break
        return found.verdict


def share_of(outcomes):
    return sum(outcomes) / len(outcomes)


def test_no_difference_is_no_alarm():
    """Over a whole canary of 1,000 requests, at most 1 % are proven worse that are not."""
    rng = np.random.default_rng(11)
    canaries = [Canary(rng, sigma=sigma) for sigma in (0.35, 0.8) for _ in range(60)]
    failed = [canary.run(1000) is Verdict.FAILED for canary in canaries]
    assert share_of(failed) <= 0.01
    assert share_of([canary.proven for canary in canaries]) <= 0.01


def test_errors_of_both_revisions_are_no_fault_of_the_new_one():
    """Where something else breaks requests of both alike, going back would not help."""
    rng = np.random.default_rng(12)
    canaries = [Canary(rng, errors=0.05, stable_errors=0.05) for _ in range(100)]
    assert share_of([canary.run(600) is Verdict.FAILED for canary in canaries]) <= 0.01


def test_errors_of_both_are_no_fault_where_looks_have_hardly_a_request():
    """A look that happens to have none of the stable revision's requests does not hold the new one
    to maxErrorRate: below weight 100 that would give up one that is no different."""
    rng = np.random.default_rng(18)
    canaries = [
        Canary(rng, errors=0.05, stable_errors=0.05, share=0.5, a_look=2) for _ in range(12)
    ]
    assert not any(canary.run(150) is Verdict.FAILED for canary in canaries)
    assert all(canary.analysis.errors_alone == Analysis().errors_alone for canary in canaries)


def test_a_look_without_a_stable_request_says_nothing_below_weight_100():
    """Nothing was compared, so neither a verdict nor the count of failed looks changes."""
    before = Analysis(requests=100, judged=100, failed_looks=2)
    slow = Counts(10, 5, durations(np.full(10, 30.0)))
    assert look(CanaryAnalysis(), before, Counts(), slow) is None
    assert look(CanaryAnalysis(), before, slow, Counts()) is None
    assert look(CanaryAnalysis(), before, Counts(), slow, alone=True) is not None


def test_a_fix_of_a_revision_that_answers_nobody_is_judged():
    """Where the stable revision fails every request there is no time to compare with."""
    analysis, spec = Analysis(), CanaryAnalysis()
    for _ in range(2):
        found = look(spec, analysis, Counts(50, 50), Counts(50, 0, durations(np.full(50, 0.2))))
        analysis = found.analysis
    assert found.verdict is Verdict.HEALTHY


@settings(deadline=None, max_examples=40)  # each enumerates up to a hundred looks
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=3).filter(lambda known: sum(known) >= 20),
    st.integers(1, 3),
    st.integers(1, 3),
    cuts,
)
@example([20], 3, 3, [0.0, 0.9])
def test_a_look_at_times_expects_no_evidence_whatever_earlier_looks_had(known, na, nb, below):
    """The bet on times is made before the look: also where it meets buckets beyond those known, or
    none of them, the mean over all ways in which its requests may end is at most 1."""
    before = Analysis(requests=1, ttft_seen=Seen(Durations((0, 0, *known))))
    spec, chances = CanaryAnalysis(min_requests=1), outcome_shares(below)
    means = np.zeros(len(before.ttft.logs))
    for of_a, chance_a in ways(na, chances):
        for of_b, chance_b in ways(nb, chances):
            # One bucket below those known, the last of these, and one beyond.
            stable, canary = (
                Counts(n, 0, Durations((0, first, *[0] * (len(known) - 1), last, beyond)))
                for n, (first, last, beyond) in ((na, of_a), (nb, of_b))
            )
            found = look(spec, before, stable, canary)
            means += chance_a * chance_b * np.exp(found.analysis.ttft.logs)
    assert max(means) <= 1 + 1e-9


def steady(slower, position):
    """The last verdict on a canary whose times are all the same; `position` in octaves moves the
    edges of the buckets."""
    analysis, verdict = Analysis(), None
    for _ in range(20):
        stable, canary = (
            Counts(25, 0, durations(np.full(25, 0.2 * 2**position * factor)))
            for factor in (1.0, slower)
        )
        found = look(CanaryAnalysis(), analysis, stable, canary)
        analysis, verdict = found.analysis, found.verdict
        if verdict is Verdict.FAILED:
            break
    return verdict


@pytest.mark.parametrize(
    ("slower", "verdicts"),
    [
        (1.196, {Verdict.HEALTHY}),
        (1.29, {Verdict.HEALTHY}),
        (1.41, {Verdict.HEALTHY}),
        (1.5, {Verdict.HEALTHY, Verdict.FAILED}),
        (1.69, {Verdict.FAILED}),
    ],
)
def test_times_that_are_all_alike_are_held_to_what_their_buckets_prove(slower, verdicts):
    """Within its limit of 1.3 no canary is given up, wherever the edges of the buckets lie."""
    assert {steady(slower, position / 48) for position in range(12)} == verdicts


def test_a_quantile_is_interpolated_where_times_spread_and_a_bucket_where_not():
    """Few buckets with most of the times say nothing of where inside a bucket they lie."""
    wide = Durations((0, 10, 20, 40, 20, 10))
    assert wide.between(0.8) == (wide.quantile(0.8),) * 2
    narrow = Durations((0, 0, 84, 16))
    least, most = narrow.between(0.95)
    assert most / least == pytest.approx(2**0.25)
    assert least < narrow.quantile(0.95) < most
    assert Durations().between(0.5) is None


@pytest.mark.parametrize(
    ("share", "sigma"), [(0.2, 0.35), (0.2, 0.8), (0.5, 0.8)], ids=["narrow", "wide", "half"]
)
def test_a_ttft_of_half_as_much_again_is_found_within_500_requests(share, sigma):
    """95 % at least, from narrow to wide distributions of times, and where few of the stable
    revision's requests are left to compare with."""
    rng = np.random.default_rng(13)
    canaries = [Canary(rng, sigma=sigma, share=share, slower=1.5) for _ in range(100)]
    assert share_of([canary.run(500) is Verdict.FAILED for canary in canaries]) >= 0.95


def test_a_tail_that_grows_is_found():
    """One request in five takes four times as long: the median hardly tells, the tail does."""
    rng = np.random.default_rng(17)
    canaries = [Canary(rng, tail=0.2, slower=4.0) for _ in range(30)]
    assert share_of([canary.run(500) is Verdict.FAILED for canary in canaries]) >= 0.9


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
        found = look(spec, analysis, Counts(), slow, alone=True)
        analysis = found.analysis
        assert found.verdict is (Verdict.HEALTHY if number else Verdict.WAITING)
    verdicts = []
    for _ in range(3):
        found = look(spec, analysis, Counts(), Counts(100, 50), alone=True)
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
