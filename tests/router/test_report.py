"""What a router reports for the autoscaler and the canary analysis."""

from hypothesis import given
from hypothesis import strategies as st

from shoal.operator.durations import Durations, bucket_of
from shoal.router.histogram import Histogram


@given(
    st.lists(st.tuples(st.floats(1e-4, 900), st.integers(1, 4)), max_size=40), st.floats(0, 5000)
)
def test_counts_hold_everything_since_the_start(observations, later):
    """Windows that close take nothing away, and no empty bucket stands at either end."""
    histogram = Histogram()
    for seconds, count in observations:
        histogram.add(seconds, count)
        histogram.tick(seconds)
    histogram.tick(later)
    first, counts = histogram.counts()
    assert sum(counts) == sum(count for _, count in observations)
    if counts:
        assert counts[0] and counts[-1]
        assert first == min(bucket_of(seconds) for seconds, _ in observations)


def test_buckets_are_the_operators():
    """Both sides read one bucket as the same times, without a common module."""
    for octave in range(-12, 9):
        for factor in (1.0, 1.1, 1.3, 1.6, 1.9):
            histogram = Histogram()
            histogram.add(2.0**octave * factor)
            first, counts = histogram.counts()
            found = Durations((*[0] * first, *counts))
            assert found.bucket_at(0.5) == bucket_of(2.0**octave * factor)
