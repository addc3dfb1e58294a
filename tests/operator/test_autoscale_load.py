"""Load as several routers report it: sums, silence, merged percentiles."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.api.v1 import router_pb2
from shoal.operator.autoscale_load import RouterReport, TtftHistory, report_of, total_load
from shoal.operator.durations import Durations, bucket_of
from shoal.router.histogram import Histogram


def durations(*seconds):
    """Counts as a router makes them."""
    histogram = Histogram()
    for second in seconds:
        histogram.add(second)
    first, counts = histogram.counts()
    return Durations.of(router_pb2.Durations(first=first, counts=counts))


def test_queues_add_up_and_the_fullest_cache_counts():
    """Each router counts its own requests; KV use is the engine's one figure."""
    reports = {
        "a": RouterReport(100.0, queued=3, in_flight={"r0": 2}, kv={"r0": 0.5}, idle_seconds=9),
        "b": RouterReport(101.0, queued=4, in_flight={"r0": 1, "r1": 5}, kv={"r0": 0.6}),
    }
    load = total_load(reports, {"a", "b"}, TtftHistory(), 102.0)
    assert (load.queued, load.in_flight, load.kv) == (7, {"r0": 3, "r1": 5}, {"r0": 0.6})
    assert (load.idle_seconds, load.complete) == (0.0, True)
    assert load.busy(10) == pytest.approx(0.6 + 0.5)


def test_a_silent_router_makes_the_load_incomplete_until_it_is_forgotten():
    """Its last figures are not counted, and nothing may go, for a minute."""
    reports = {"a": RouterReport(200.0, queued=1), "b": RouterReport(190.0, queued=9)}
    load = total_load(reports, {"a", "b"}, TtftHistory(), 200.0)
    assert (load.queued, load.complete) == (1, False)
    reports["a"] = RouterReport(250.0, queued=1)
    assert total_load(reports, {"a", "b"}, TtftHistory(), 250.0).complete
    assert total_load(reports, {"a"}, TtftHistory(), 250.0).complete
    assert not total_load(reports, {"a", "new"}, TtftHistory(), 250.0).complete


def test_no_answer_is_no_load():
    """Nobody reports: nothing is known, which is not the same as nothing to do."""
    assert total_load({}, {"a"}, TtftHistory(), 0.0) is None
    assert total_load({"a": RouterReport(10.0)}, {"a"}, TtftHistory(), 16.0) is None


def test_ttft_is_the_percentile_of_recent_requests_of_all_routers():
    """Old requests and other routers' shares are weighed by their counts."""
    then = {"a": RouterReport(0.0, ttft=durations(*[9.0] * 100)), "b": RouterReport(0.0)}
    history = TtftHistory().followed_by(then, 0.0)
    now = {
        "a": RouterReport(20.0, ttft=durations(*[9.0] * 100, *[0.1] * 90)),
        "b": RouterReport(20.0, ttft=durations(*[2.0] * 10)),
    }
    load = total_load(now, {"a", "b"}, history, 20.0)
    assert load.ttft_p95 == pytest.approx(2.0, rel=0.2)


def test_ttft_is_zero_without_work_and_unknown_without_enough():
    """An idle service has no slow requests; a few requests prove nothing."""
    idle = {"a": RouterReport(0.0)}
    history = TtftHistory().followed_by(idle, 0.0)
    assert total_load(idle, {"a"}, history, 1.0).ttft_p95 == 0.0
    busy = {"a": RouterReport(1.0, in_flight={"r0": 1}, ttft=durations(5.0))}
    assert total_load(busy, {"a"}, history, 1.0).ttft_p95 is None
    assert total_load(idle, {"a"}, TtftHistory(), 1.0).ttft_p95 is None


def test_history_keeps_one_window():
    """Snapshots are due every few seconds, and only a window of them is kept."""
    history = TtftHistory()
    for second in range(200):
        history = history.followed_by({"a": RouterReport(float(second))}, float(second))
    times = [at for at, _ in history.snapshots]
    assert times[0] >= 199 - 35
    assert len(times) <= 8


def test_a_restarted_router_counts_from_zero():
    """Where counts fell, all that is there is new."""
    assert durations(1.0).since(durations(1.0, 1.0, 3.0)) == durations(1.0)
    assert durations(1.0, 1.0, 3.0).since(durations(1.0)).total == 2


def test_reports_are_read_from_the_wire():
    """Only admitted endpoints count; revisions' times are one."""
    load = router_pb2.ServiceLoad(queued=2, idle_seconds=1.5)
    for name, admitted in (("r0", True), ("r1", False)):
        endpoint = load.endpoints.add(name=name, admitted=admitted, in_flight=3)
        endpoint.load.blocks_used, endpoint.load.blocks_total = 10, 40
    for revision in ("x", "y"):
        load.revisions.add(revision=revision, ttft=router_pb2.Durations(first=5, counts=[1, 2]))
    report = report_of(load, 7.0)
    assert (report.at, report.queued, report.idle_seconds) == (7.0, 2, 1.5)
    assert (report.in_flight, report.kv) == ({"r0": 3.0}, {"r0": 0.25})
    assert report.ttft.counts == (0, 0, 0, 0, 0, 2, 4)


@given(st.lists(st.floats(0.0001, 500), min_size=1, max_size=50), st.floats(0.01, 1))
def test_quantiles_lie_in_the_bucket_of_the_exact_one(seconds, share):
    """A quantile is off by no more than its bucket is wide, and the routers' buckets are ours."""
    counted = durations(*seconds)
    rank = max(1, -(-share * len(seconds) // 1))
    exact = sorted(seconds)[min(len(seconds), int(rank)) - 1]
    assert counted.bucket_at(share) == bucket_of(exact)
    assert counted.quantile(share) == pytest.approx(exact, rel=0.2)
    assert counted.total == len(seconds)
    assert counted.above(bucket_of(exact)) <= len(seconds) - rank
