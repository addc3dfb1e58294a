"""Evidence that one revision is worse than another, to be looked at as often as wished. Pure.

Requests of the stable revision (a) and of the new one (b) end in one of several outcomes, listed
from the best to the worst: buckets of a duration, or answered and failed. A bet, made before a
look, says for each outcome x how many times likelier it is for b than for a: r(x). A look with `na`
and `nb` requests is then worth

    E = prod_a f(x)  prod_b f(x) r(x)        f(x) = (na + nb) / (na + nb r(x))

the two-stream e-variable of Turner, Ly and Grünwald, "Generic E-variables for exact sequential
k-sample tests that allow for optional stopping" (2024), written with likelihood ratios. Where both
have one distribution P, whichever it is, na E_P[f] + nb E_P[f r] = na + nb, so by the inequality
of the arithmetic and geometric means the expectation of E, E_P[f]^na E_P[f r]^nb, is at most 1.
r rises with x, so f r does too, and a new revision whose outcomes are better (stochastically)
only lowers it. So the product over looks is a supermartingale, and by Ville's inequality (1939) it
ever reaches 1/alpha with probability alpha at most: however many looks, steps and weights, and also
if the load changes between looks, since both are compared within each. Several bets are averaged,
which keeps all this.

A bet tilts the outcomes of the stable revision: r(x) = exp(t s(x)) / E_a[exp(t s)], as far as
earlier looks know them, for a score s that rises with x. Two are of use:

    normal scores   s(x) = the normal quantile of x's rank: a shift of the whole distribution, which
                    for lognormal times loses nothing against knowing the distribution (Chernoff
                    and Savage, "Asymptotic normality and efficiency of certain nonparametric test
                    statistics", 1958)
    beyond          s(x) = 1 beyond a threshold, else 0: a tail that grows, or failures; exp(t) is
                    an odds ratio

Requests in a look are not independent where they wait behind each other. A power E^(1/f), f >= 1,
is an e-variable still; f is what the difference between the two varies more from look to look
than independent requests would (the design effect), as far as earlier looks show it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import NormalDist

LEAST_RATE = 1e-3  # guesses stay clear of certainty, so that no single outcome decides alone
ASSUMED_VARIANCE = 0.25  # of a score at least: that of one request in two beyond a threshold
PRIOR_LOOKS = 4.0  # as many looks of independent requests are assumed beforehand
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What happened in one look: requests by outcome, both listed from the best to the worst."""

    stable: tuple[int, ...]
    canary: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """How bad each outcome is, never falling, and how likely each is for the stable revision."""

    values: tuple[float, ...]
    shares: tuple[float, ...]  # in sum 1

    @classmethod
    def normal(cls, known: Sequence[int]) -> "Score":
        """Normal scores of the outcomes' ranks among `known` earlier ones."""
        total, below = sum(known), 0
        values = []
        for count in known:
            values.append(_NORMAL.inv_cdf((below + count / 2 + 0.5) / (total + 1)))
            below += count
        return cls(tuple(values), tuple(count / total for count in known))

    @classmethod
    def beyond(cls, last: int, rate: float, outcomes: int = 2) -> "Score":
        """1 for the outcomes after number `last`, which the stable one meets at this rate."""
        rate = min(max(rate, LEAST_RATE), 1 - LEAST_RATE)
        values = tuple(float(number > last) for number in range(outcomes))
        # Only the sums on both sides of the threshold are of consequence.
        shares = [0.0] * outcomes
        shares[min(last, outcomes - 1)] += 1 - rate
        shares[-1] += rate
        return cls(values, tuple(shares))

    @property
    def variance(self) -> float:
        """Of the stable revision's scores."""
        mean = sum(s * v for s, v in zip(self.shares, self.values, strict=True))
        return sum(s * (v - mean) ** 2 for s, v in zip(self.shares, self.values, strict=True))

    def bet(self, tilt: float) -> tuple[float, ...]:
        """How many times likelier each outcome is for a new revision that is worse by `tilt`."""
        weights = [exp(tilt * value) for value in self.values]
        mean = sum(w * share for w, share in zip(weights, self.shares, strict=True))
        return tuple(weight / mean for weight in weights)


@dataclass(frozen=True, slots=True)
class Spread:
    """How much the difference between the revisions varies from look to look."""

    looks: int = 0
    mean: float = 0.0  # of the difference of the mean scores
    excess: float = 0.0  # squared deviations over the variance that independence gives, summed

    @property
    def factor(self) -> float:
        """The design effect: 1 for independent requests."""
        return max(1.0, (PRIOR_LOOKS + self.excess) / (PRIOR_LOOKS + max(0, self.looks - 1)))

    def after(self, found: Outcomes, score: Score) -> "Spread":
        """With one more look; looks without requests on both sides say nothing."""
        stable, canary = sum(found.stable), sum(found.canary)
        if not stable or not canary:
            return self
        mean_a, mean_b = _mean(found.stable, score.values), _mean(found.canary, score.values)
        variance = _variance(found.stable, score, mean_a) + _variance(found.canary, score, mean_b)
        difference = mean_b - mean_a
        looks = self.looks + 1
        mean = self.mean + (difference - self.mean) / looks
        excess = self.excess + (difference - self.mean) * (difference - mean) / variance
        return Spread(looks, mean, excess)


def _mean(counts: Sequence[int], values: Sequence[float]) -> float:
    return sum(n * v for n, v in zip(counts, values, strict=True)) / sum(counts)


def _variance(counts: Sequence[int], score: Score, mean: float) -> float:
    """Of the mean score, were requests independent. One more request is assumed, since outcomes
    that are all the same say little about those to come."""
    squares = sum(n * (v - mean) ** 2 for n, v in zip(counts, score.values, strict=True))
    return (squares + max(ASSUMED_VARIANCE, score.variance)) / (sum(counts) + 1) / sum(counts)


@dataclass(frozen=True, slots=True)
class Evidence:
    """Logarithms of the products so far, one a pair of score and tilt."""

    logs: tuple[float, ...]
    spreads: tuple[Spread, ...]  # one a score

    @classmethod
    def none(cls, tilts: Sequence[Sequence[float]]) -> "Evidence":
        """Before the first look, for scores that are tilted so."""
        return cls((0.0,) * sum(map(len, tilts)), (Spread(),) * len(tilts))

    @property
    def log(self) -> float:
        """Logarithm of the average product: log(1/alpha) and beyond rejects "no worse"."""
        greatest = max(self.logs)
        return greatest + log(sum(exp(value - greatest) for value in self.logs) / len(self.logs))

    def after(
        self,
        found: Outcomes,
        scores: Sequence[Score],
        tilts: Sequence[Sequence[float]],
        weight: float = 1.0,
    ) -> "Evidence":
        """With one more look, on bets by scores from earlier looks only, and their tilts.

        `weight` in (0, 1] counts a look for less, where outcomes come in groups that share a fate.
        """
        gains: list[float] = []
        for score, some, spread in zip(scores, tilts, self.spreads, strict=True):
            power = weight / spread.factor
            gains += [power * log_e(found, score.bet(tilt)) for tilt in some]
        logs = tuple(old + gain for old, gain in zip(self.logs, gains, strict=True))
        pairs = zip(self.spreads, scores, strict=True)
        return Evidence(logs, tuple(spread.after(found, score) for spread, score in pairs))


def log_e(found: Outcomes, bet: Sequence[float]) -> float:
    """Logarithm of one look's e-variable for a bet, whose ratios are positive and never fall."""
    stable, canary = sum(found.stable), sum(found.canary)
    if not stable or not canary:
        return 0.0
    total, value = stable + canary, 0.0
    for a, b, ratio in zip(found.stable, found.canary, bet, strict=True):
        if a or b:
            value += (a + b) * log(total / (stable + canary * ratio)) + b * log(ratio)
    return value


def log_e_alone(requests: int, hits: int, limit: float, odds: float) -> float:
    """The same for the new revision alone: of `requests`, `hits` failed, against a rate of at most
    `limit`."""
    passes, fails = Score.beyond(0, limit).bet(log(odds))
    return (requests - hits) * log(passes) + hits * log(fails)
