"""Histograms and ejection: small pure pieces with a clock of their own."""

import math

from hypothesis import given
from hypothesis import strategies as st

from shoal.router.histogram import Histogram
from shoal.router.outlier import FIRST_SECONDS, THRESHOLD, Outlier


@given(st.lists(st.floats(1e-4, 500), min_size=1, max_size=200), st.floats(0.01, 1))
def test_quantiles_are_upper_bounds_within_a_fifth(values, share):
    """A quantile is at least the true one and at most a bucket above."""
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    true = sorted(values)[math.ceil(share * len(values)) - 1]
    (found,) = histogram.quantiles(share)
    assert true * 0.999999 <= found <= true * 2**0.25 * 1.000001


@given(st.lists(st.tuples(st.floats(0, 5000), st.integers(1, 5)), max_size=50))
def test_prometheus_buckets_count_everything(observations):
    """Cumulative counts rise to the total, and each bound holds what lies below it."""
    histogram = Histogram()
    for at, (value, count) in enumerate(observations):
        histogram.add(value, count)
        histogram.tick(float(at))
    rows = histogram.cumulative()
    total = sum(count for _, count in observations)
    assert rows[-1] == ("+Inf", total)
    for bound, number in rows[:-1]:
        assert number == sum(count for value, count in observations if value <= float(bound))
    assert math.isclose(histogram.sum, sum(v * c for v, c in observations))


def test_quantiles_forget_after_a_minute():
    """Only the last minute counts, also where nothing came for long."""
    histogram = Histogram()
    histogram.tick(100.0)
    histogram.add(1.0)
    for now in range(101, 150):
        histogram.tick(float(now))
    assert histogram.quantiles(0.5) == (1.0,)
    for now in range(150, 180):
        histogram.tick(float(now))
    assert histogram.quantiles(0.5) == (0.0,)
    histogram.add(1.0)
    histogram.tick(1000.0)
    histogram.tick(1000.5)
    histogram.tick(2000.0)
    assert histogram.quantiles(0.5) == (0.0,)


def test_ejection_grows_and_ends():
    """Three failures eject, one more after the rest doubles it, one success clears."""
    outlier = Outlier()
    for _ in range(THRESHOLD):
        assert not outlier.ejected(0.0)
        outlier.failed(0.0)
    assert outlier.ejected(FIRST_SECONDS - 0.01)
    assert not outlier.ejected(FIRST_SECONDS)
    outlier.failed(FIRST_SECONDS)
    assert outlier.ejected(FIRST_SECONDS + 1.99)
    assert not outlier.ejected(FIRST_SECONDS + 2.0)
    outlier.succeeded()
    outlier.failed(10.0)
    assert not outlier.ejected(10.0)
