"""The queue of services: nothing is lost, nothing is done twice at a time, failures wait."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.operator.kube.workqueue import Pace, WorkQueue

KEYS = st.sampled_from(["a", "b", "c"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), KEYS, st.floats(0, 3)),
        st.tuples(st.just("take"), st.none(), st.just(0.0)),
        st.tuples(st.just("done"), KEYS, st.just(0.0)),
        st.tuples(st.just("failed"), KEYS, st.floats(0, 5)),
        st.tuples(st.just("wait"), st.none(), st.floats(0, 40)),
    ),
    max_size=60,
)


def queue(first: float = 0.2, longest: float = 30.0) -> WorkQueue:
    return WorkQueue(Pace(first, longest), jitter=lambda: 0.0)


def test_a_key_that_is_asked_for_often_is_worked_on_once() -> None:
    """Ten events of one service are one look."""
    q = queue()
    for _ in range(10):
        q.add("a", 1.0)
    assert (q.take(1.0), q.take(1.0)) == ("a", None)


def test_what_is_asked_during_the_work_is_done_after_it() -> None:
    """News that come while a service is looked at lead to another look, not to two at a time."""
    q = queue()
    q.add("a", 1.0)
    assert q.take(1.0) == "a"
    q.add("a", 2.0)
    assert q.take(2.0) is None
    q.done("a", 3.0)
    assert q.take(3.0) == "a"


def test_the_earlier_of_two_times_counts() -> None:
    """A later wish does not put an earlier one off."""
    q = queue()
    q.add("a", 0.0, delay=5.0)
    q.add("a", 0.0, delay=1.0)
    q.add("a", 0.0, delay=9.0)
    assert q.take(0.9) is None
    assert q.take(1.0) == "a"
    q.done("a", 1.0)
    assert q.next_due() is None


def test_keys_are_taken_in_the_order_in_which_they_are_due() -> None:
    """Who waits longest is first."""
    q = queue()
    q.add("b", 0.0, delay=2.0)
    q.add("a", 0.0, delay=3.0)
    q.add("c", 0.0, delay=1.0)
    assert [q.take(5.0) for _ in range(4)] == ["c", "b", "a", None]


def test_failures_in_a_row_wait_longer_and_longer() -> None:
    """0.2, 0.4, 0.8 ... up to the bound; one success makes up for all of them."""
    q, now, waits = queue(longest=1.0), 0.0, []
    for _ in range(5):
        q.add("a", now)
        now = q.next_due() or now
        assert q.take(now) == "a"
        waits.append(q.failed("a", now))
    assert waits == pytest.approx([0.2, 0.4, 0.8, 1.0, 1.0])
    now = q.next_due() or now
    assert q.take(now) == "a"
    q.done("a", now)
    q.add("a", now)
    assert q.take(now) == "a"
    assert q.failed("a", now) == pytest.approx(0.2)


def test_news_shorten_a_long_wait_to_a_second() -> None:
    """A service that waits for half a minute is looked at soon after its spec was mended."""
    q = queue(first=30.0)
    q.add("a", 0.0)
    q.take(0.0)
    q.failed("a", 0.0)
    q.add("a", 5.0)
    assert q.next_due() == pytest.approx(6.0)


def test_a_pause_that_the_server_asked_for_is_kept() -> None:
    """Retry-After is the least wait, also where news came during the work."""
    q = queue()
    q.add("a", 0.0)
    q.take(0.0)
    q.add("a", 0.0)
    q.failed("a", 0.0, at_least=7.0)
    assert q.next_due() == pytest.approx(7.0)


@given(STEPS)
def test_nothing_is_lost_and_nothing_runs_twice(steps: list[tuple[str, str | None, float]]) -> None:
    """Whatever happens: one worker a key, and every wish is followed by a look."""
    q, now = queue(), 0.0
    working: set[str] = set()
    wished: set[str] = set()
    for what, key, number in steps:
        if what == "add":
            q.add(str(key), now, number)
            wished.add(str(key))
        elif what == "take":
            if (taken := q.take(now)) is not None:
                assert taken not in working
                working.add(taken)
                wished.discard(taken)
        elif what in ("done", "failed") and key in working:
            working.discard(key)
            if what == "done":
                q.done(key, now)
            else:
                assert q.failed(key, now, number) >= number
                wished.add(key)
        elif what == "wait":
            now += number
    for key in sorted(working):
        q.done(key, now)
    seen = set()
    while (due := q.next_due()) is not None:
        now = max(now, due)
        taken = q.take(now)
        assert taken is not None
        seen.add(taken)
        q.done(taken, now)
    assert wished <= seen
    assert (len(q), q.working) == (0, 0)
