"""The queue: priorities, fairness, deadlines, cancel anywhere."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.router.queue import FairQueue, Ticket, retry_after


def ticket(item: object = None, **fields: object) -> Ticket[object, str]:
    defaults: dict[str, object] = {"since": 0.0, "deadline": 100.0, "lane": ""}
    return Ticket(item, **(defaults | fields))


def items(queue: FairQueue[object, str], lane: str = "") -> list[object]:
    taken = []
    while (found := queue.take(lane)) is not None:
        taken.append(found.item)
    return taken


def fill(*tickets: Ticket[object, str]) -> FairQueue[object, str]:
    queue: FairQueue[object, str] = FairQueue()
    for one in tickets:
        queue.push(one)
    return queue


def test_one_tenant_is_served_in_order():
    """Without priorities and other tenants the queue is first in, first out."""
    assert items(fill(*(ticket(i, cost=i % 3 + 1) for i in range(20)))) == list(range(20))


def test_priorities_are_strict():
    """Smaller goes first, whatever came before."""
    queue = fill(*(ticket(p, priority=p) for p in (3, 1, 2, -1)))
    assert items(queue) == [-1, 1, 2, 3]


def test_a_flood_of_one_tenant_does_not_hold_up_another():
    """A tenant with one request waits for one of the flood, not for all."""
    queue = fill(*(ticket(f"flood {i}", tenant="a") for i in range(100)), ticket("one", tenant="b"))
    assert items(queue).index("one") <= 1


def test_tenants_share_by_cost():
    """Where one tenant's requests cost four times as much, it gets a fourth as many."""
    queue = fill(
        *(ticket("big", tenant="a", cost=400) for _ in range(100)),
        *(ticket("small", tenant="b", cost=100) for _ in range(100)),
    )
    first = Counter(items(queue)[:100])
    assert 18 <= first["big"] <= 22


def test_an_idle_tenant_saves_up_nothing():
    """Who comes late shares from then on, and does not catch up what it never asked for."""
    queue = fill(*(ticket("a", tenant="a") for _ in range(60)))
    for _ in range(20):
        queue.take("")
    for _ in range(40):
        queue.push(ticket("b", tenant="b"))
    first = Counter(item.item for item in (queue.take("") for _ in range(20)) if item)
    assert 9 <= first["b"] <= 11


def test_what_comes_back_goes_first():
    """A ticket for the front passes its priority, but no higher one."""
    queue = fill(ticket("old"), ticket("back", front=True), ticket("urgent", priority=-1))
    assert items(queue) == ["urgent", "back", "old"]


def test_lanes_are_apart():
    """A lane is taken without touching the other; the more urgent head comes first."""
    queue = fill(ticket(1, lane="x"), ticket(2, lane="y", priority=-1), ticket(3, lane="x"))
    assert queue.lanes() == ["y", "x"]
    assert items(queue, "x") == [1, 3]
    assert queue.lanes() == ["y"]
    assert len(queue) == 1


def test_deadlines_take_out_exactly_what_is_due():
    """Expired tickets leave wherever they stand, the others stay in order."""
    tickets = [ticket(i, deadline=float(i % 5)) for i in range(20)]
    queue = fill(*tickets)
    assert sorted(t.item for t in queue.expire(2.0)) == [i for i in range(20) if i % 5 <= 2]
    assert queue.expire(2.0) == []
    assert items(queue) == [i for i in range(20) if i % 5 > 2]


def test_moved_tickets_keep_everything_else():
    """A drained queue put into other lanes keeps order, deadline and place."""
    queue = fill(*(ticket(i, lane="x", since=float(i), deadline=9.0) for i in range(5)))
    for one in queue.drain():
        queue.push(one.moved("y"))
    assert queue.oldest() == 0.0
    assert len(queue.expire(9.0)) == 5
    assert len(queue) == 0


def test_cancelled_tickets_do_not_pile_up():
    """Pushing and cancelling for ever keeps the heaps small."""
    queue = fill(ticket("stays", deadline=1e9))
    for _ in range(10_000):
        one = ticket("goes", deadline=1e6, tenant="t")
        queue.push(one)
        assert queue.remove(one)
        assert not queue.remove(one)
    lane = queue._lanes[""]
    assert len(lane.heap) < 200
    assert len(queue._deadlines) < 200


def test_retry_after_is_bounded():
    """The estimate is queue over rate, between one second and a minute."""
    assert retry_after(100, 10.0) == 10.0
    assert retry_after(0, 10.0) == 1.0
    assert retry_after(10**6, 1.0) == 60.0
    assert 1 <= retry_after(100, 0.0) <= 60


operation = st.one_of(
    st.tuples(
        st.just("push"),
        st.tuples(
            st.integers(-1, 1),
            st.sampled_from("abc"),
            st.sampled_from("xy"),
            st.integers(0, 50),
            st.integers(1, 20),
            st.booleans(),
        ),
    ),
    st.tuples(st.just("take"), st.sampled_from("xy")),
    st.tuples(st.just("cancel"), st.integers(0, 100)),
    st.tuples(st.just("expire"), st.integers(0, 5)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(operation, max_size=80))
def test_nothing_is_lost_doubled_or_overtaken(operations):
    """Any story: each ticket leaves once; takes respect priority, and order within a tenant."""
    queue: FairQueue[object, str] = FairQueue()
    waiting: list[Ticket[object, str]] = []
    now = 0.0
    for number, (name, argument) in enumerate(operations):
        if name == "push":
            priority, tenant, lane, deadline, cost, front = argument
            one = ticket(
                number,
                since=now,
                deadline=now + deadline,
                lane=lane,
                priority=priority,
                tenant=tenant,
                cost=float(cost),
                front=front,
            )
            queue.push(one)
            waiting.append(one)
        elif name == "take":
            taken = queue.take(argument)
            lane = [t for t in waiting if t.lane == argument]
            assert (taken is None) == (not lane)
            if taken is not None:
                waiting.remove(taken)
                assert taken.priority == min(t.priority for t in lane)
                same = [t for t in lane if (t.priority, t.front) == (taken.priority, taken.front)]
                assert taken is next(t for t in same if taken.front or t.tenant == taken.tenant)
                assert taken.front or not any(t.front for t in lane if t.priority == taken.priority)
        elif name == "cancel":
            if waiting:
                one = waiting.pop(argument % len(waiting))
                assert queue.remove(one)
        else:
            now += argument
            due = [t for t in waiting if t.deadline <= now]
            assert {t.item for t in queue.expire(now)} == {t.item for t in due}
            waiting = [t for t in waiting if t.deadline > now]
        assert len(queue) == len(waiting)
        assert {t.item for t in queue} == {t.item for t in waiting}
        assert queue.oldest() == min((t.since for t in waiting), default=None)
