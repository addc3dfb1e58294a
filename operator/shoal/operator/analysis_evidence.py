"""Evidence that one revision is worse than another, to be looked at as often as wished. Pure.

A test martingale ("e-process") of two streams of yes/no outcomes: how often did requests of the
stable revision (a) and of the new one (b) exceed a threshold, or fail? It is the two-stream
e-variable of Turner, Ly and Grünwald, "Generic E-variables for exact sequential k-sample tests
that allow for optional stopping" (2024): in a look with `na` and `nb` requests, of which `ka` and
`kb` exceeded, for any two guesses pa < pb that were fixed before the look,

    E = (pa/p0)^ka ((1-pa)/(1-p0))^(na-ka) (pb/p0)^kb ((1-pb)/(1-p0))^(nb-kb)
    p0 = (na pa + nb pb) / (na + nb)

Where b exceeds no more often than a in that look, whatever the common rate is, E has an
expectation of at most 1: each factor is 1 + c (rate - p0) with na ca + nb cb = 0, and the logarithm
of the product is at most nb cb (rate_b - rate_a) <= 0. So the product over looks is a
supermartingale, and by Ville's inequality (1939) it ever reaches 1/alpha with probability alpha at
most: however many looks, steps and weights, and also if the load changes between looks, since both
are compared within each. Several guesses and thresholds are averaged, which keeps all this.

Requests in a look are not independent where they wait behind each other. A power E^(1/f), f >= 1,
is an e-variable still; f is what the difference between the two varies more from look to look
than independent requests would (the design effect), as far as earlier looks show it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, log1p

LEAST_RATE = 1e-3  # guesses stay clear of certainty, so that no single outcome decides alone
PRIOR_LOOKS = 4.0  # as many looks of independent requests are assumed beforehand


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What happened in one look, or in several."""

    stable: int  # requests
    stable_hits: int  # of these, above the threshold, or failed
    canary: int
    canary_hits: int


@dataclass(frozen=True, slots=True)
class Spread:
    """How much the difference between the revisions varies from look to look."""

    looks: int = 0
    mean: float = 0.0  # of the difference of the shares
    excess: float = 0.0  # squared deviations over the variance that independence gives, summed

    @property
    def factor(self) -> float:
        """The design effect: 1 for independent requests."""
        return max(1.0, (PRIOR_LOOKS + self.excess) / (PRIOR_LOOKS + max(0, self.looks - 1)))

    def after(self, found: Outcomes) -> "Spread":
        """With one more look; looks without requests on both sides say nothing."""
        if not found.stable or not found.canary:
            return self
        share_a = (found.stable_hits + 0.5) / (found.stable + 1)
        share_b = (found.canary_hits + 0.5) / (found.canary + 1)
        variance = share_a * (1 - share_a) / found.stable + share_b * (1 - share_b) / found.canary
        difference = found.canary_hits / found.canary - found.stable_hits / found.stable
        looks = self.looks + 1
        mean = self.mean + (difference - self.mean) / looks
        excess = self.excess + (difference - self.mean) * (difference - mean) / variance
        return Spread(looks, mean, excess)


@dataclass(frozen=True, slots=True)
class Evidence:
    """Logarithms of the products so far, one a pair of threshold and guess."""

    logs: tuple[float, ...]
    spreads: tuple[Spread, ...]  # one a threshold

    @classmethod
    def none(cls, thresholds: int, guesses: int) -> "Evidence":
        return cls((0.0,) * (thresholds * guesses), (Spread(),) * thresholds)

    @property
    def log(self) -> float:
        """Logarithm of the average product: log(1/alpha) and beyond rejects "no worse"."""
        greatest = max(self.logs)
        return greatest + log(sum(exp(value - greatest) for value in self.logs) / len(self.logs))

    def after(
        self,
        looks: Sequence[Outcomes | None],
        rates: Sequence[float],
        odds: Sequence[float],
        weight: float = 1.0,
    ) -> "Evidence":
        """With one more look: its outcomes by threshold (None: not to be counted).

        `rates` guesses the stable share above each threshold, from earlier looks only; `odds`
        are the odds ratios guessed for the new revision. `weight` in (0, 1] counts a look for
        less, where outcomes come in groups that share a fate.
        """
        logs, spreads = list(self.logs), list(self.spreads)
        for number, (found, rate) in enumerate(zip(looks, rates, strict=True)):
            if found is None:
                continue
            power = weight / spreads[number].factor
            for place, ratio in enumerate(odds):
                logs[number * len(odds) + place] += power * log_e(found, rate, ratio)
            spreads[number] = spreads[number].after(found)
        return Evidence(tuple(logs), tuple(spreads))


def log_e(found: Outcomes, rate: float, odds: float) -> float:
    """Logarithm of one look's e-variable for the guesses `rate` and its odds times `odds`."""
    if not found.stable or not found.canary:
        return 0.0
    low = min(max(rate, LEAST_RATE), 1 - LEAST_RATE)
    high = odds * low / (1 - low + odds * low)
    both = (found.stable * low + found.canary * high) / (found.stable + found.canary)
    return (
        found.stable_hits * log(low / both)
        + (found.stable - found.stable_hits) * (log1p(-low) - log1p(-both))
        + found.canary_hits * log(high / both)
        + (found.canary - found.canary_hits) * (log1p(-high) - log1p(-both))
    )


def log_e_alone(requests: int, hits: int, limit: float, odds: float) -> float:
    """The same for the new revision alone, against a rate of at most `limit`."""
    low = min(max(limit, LEAST_RATE), 1 - LEAST_RATE)
    high = odds * low / (1 - low + odds * low)
    return hits * log(high / low) + (requests - hits) * (log1p(-high) - log1p(-low))
