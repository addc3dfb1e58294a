"""The choice of a replica, from a snapshot alone."""

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from shoal.api.routes import RoutingPolicy
from shoal.router.pick import (
    Candidate,
    Demand,
    PickSettings,
    draw_revision,
    has_room,
    pick,
    predicted_ttft,
    share_of,
)


def replica(name: str = "a", **fields: object) -> Candidate:
    defaults: dict[str, object] = {
        "revision": "r",
        "slots": 64,
        "prefill_tokens_per_second": 1000.0,
        "step_seconds": 0.01,
    }
    return Candidate(name, **(defaults | fields))


def chosen(
    candidates: list[Candidate],
    demand: Demand | None = None,
    cached: dict[str, int] | None = None,
    policy: RoutingPolicy = RoutingPolicy.PREFIX_AWARE,
    times: int = 200,
) -> Counter[str]:
    rng = random.Random(0)
    settings = PickSettings(policy)
    picks: Counter[str] = Counter()
    for turn in range(times):
        choice = pick(candidates, demand or Demand(1000), cached or {}, settings, rng, turn)
        picks[choice.name if choice else ""] += 1
    return picks


def test_a_prefix_attracts():
    """The replica that holds the prefix is chosen over an equal one."""
    assert chosen([replica("a"), replica("b")], cached={"b": 900}) == {"b": 200}


def test_a_hot_prefix_spreads():
    """Where the holder is later by more than affinity may cost, load decides."""
    busy = replica("b", queued_prefill_tokens=5000)
    assert chosen([replica("a"), busy], cached={"b": 900}) == {"a": 200}


def test_a_small_prefix_does_not_hold_on_to_a_busy_replica():
    """A prefix that saves little is worth little waiting."""
    busy = replica("b", queued_prefill_tokens=300)
    assert chosen([replica("a"), busy], cached={"b": 16}) == {"a": 200}
    assert chosen([replica("a"), busy], cached={"b": 800}) == {"b": 200}


def test_nearly_equal_prefixes_compete_by_load():
    """Holders of about the longest prefix share by load; one with half of it does not."""
    candidates = [replica("a"), replica("b"), replica("c", in_flight=30)]
    picks = chosen(candidates, cached={"a": 450, "b": 895, "c": 900})
    assert picks == {"b": 200}


def test_misses_spread_at_random():
    """With nothing cached and equal load every replica gets about its share."""
    picks = chosen([replica(name) for name in "abcd"], times=400)
    assert set(picks) == set("abcd")
    assert min(picks.values()) > 60


def test_equal_predictions_go_to_the_fewest_in_flight():
    """Between predictions that tie, fewer requests win."""
    assert chosen([replica("a", in_flight=3), replica("b", in_flight=1)]) == {"b": 200}


def test_round_robin_takes_turns():
    """Three replicas get a third each, in order."""
    candidates = [replica(name) for name in "cab"]
    assert chosen(candidates, policy=RoutingPolicy.ROUND_ROBIN, times=9) == {"a": 3, "b": 3, "c": 3}


def test_least_requests_ignores_prefixes():
    """LeastRequests counts requests and nothing else."""
    candidates = [replica("a", in_flight=2), replica("b", in_flight=5)]
    picks = chosen(candidates, cached={"b": 900}, policy=RoutingPolicy.LEAST_REQUESTS)
    assert picks == {"a": 200}


def test_a_session_has_a_home_unless_it_is_late():
    """The session's replica is kept while it costs less than the load limit."""
    candidates = [replica(name) for name in "abc"]
    (home,) = chosen(candidates, Demand(10, session="s"))
    late = [c._replace(queued_prefill_tokens=9000 * (c.name == home)) for c in candidates]
    assert home not in chosen(late, Demand(10, session="s"))


def test_a_session_moves_only_from_what_went():
    """When another replica leaves, a session stays where it is."""
    candidates = [replica(name) for name in "abcdef"]
    for session in map(str, range(20)):
        (home,) = chosen(candidates, Demand(10, session=session), times=1)
        rest = [c for c in candidates if c.name == home or c.name in "ace"]
        assert chosen(rest, Demand(10, session=session), times=1) == {home: 1}


def test_the_filter_keeps_revision_and_room():
    """Other revisions and full replicas are out; nothing left means waiting."""
    full = replica("a", in_flight=72)
    other = replica("b", revision="q")
    assert chosen([full, other], Demand(10, revision="r")) == {"": 200}
    assert chosen([full, other, replica("c")], Demand(10, revision="r")) == {"c": 200}


def test_failures_are_avoided_but_not_at_any_price():
    """Ejected and failed replicas are used only where no sound one exists, full or not."""
    ejected, failed = replica("a", ejected=True), replica("b")
    demand = Demand(10, avoid=frozenset("b"))
    assert chosen([ejected, failed, replica("c")], demand) == {"c": 200}
    assert chosen([ejected, failed, replica("c", in_flight=100)], demand) == {"": 200}
    assert chosen([ejected, failed], demand) == {"b": 200}
    assert chosen([ejected], demand) == {"a": 200}


def test_room_is_slots_plus_an_eighth():
    """A replica takes what fits, nothing while its engine lets requests wait, and anything
    when it is idle."""
    assert has_room(replica(in_flight=71), 1)
    assert not has_room(replica(in_flight=72), 1)
    assert not has_room(replica(in_flight=5, waiting=9), 1)
    assert has_room(replica(in_flight=0, slots=4), 16)


def test_many_samples_never_wait_for_an_idle_replica():
    """More samples than slots go where an eighth of the slots fits, as smaller requests do."""
    assert has_room(replica(in_flight=64), 128)
    assert not has_room(replica(in_flight=65), 128)
    assert not has_room(replica(in_flight=1, waiting=9), 128)


def test_the_prediction_counts_queue_own_tokens_and_decoding():
    """The formula of the module's docstring."""
    candidate = replica(queued_prefill_tokens=500, in_flight=32)
    assert abs(predicted_ttft(candidate, 1500, 1.0) - (2.0 + 0.015)) < 1e-9


def test_an_unmeasured_rate_is_the_peers_mean():
    """A fresh replica is neither avoided nor flooded for want of a measured rate."""
    fresh = replica("a", prefill_tokens_per_second=0.0)
    assert set(chosen([fresh, replica("b")])) == {"a", "b"}


def test_draw_revision_follows_the_weights():
    """Shares in [0, 1) fall to revisions in proportion, zero weights never."""
    draws = Counter(draw_revision({"a": 90, "b": 10, "c": 0}, i / 1000) for i in range(1000))
    assert draws == {"a": 900, "b": 100}
    assert draw_revision({}, 0.5) is None
    assert draw_revision({"a": 0}, 0.5) is None


@given(st.text())
def test_share_of_a_session_is_fixed(session: str):
    """A session's share is in [0, 1) and always the same."""
    assert 0 <= share_of(session) < 1
    assert share_of(session) == share_of(session)


candidates_strategy = st.lists(
    st.builds(
        Candidate,
        name=st.sampled_from("abcdefgh"),
        revision=st.sampled_from("rq"),
        in_flight=st.integers(0, 80),
        slots=st.integers(1, 64),
        waiting=st.integers(0, 20),
        queued_prefill_tokens=st.integers(0, 10**6),
        prefill_tokens_per_second=st.sampled_from([0.0, 10.0, 1e5]),
        step_seconds=st.floats(0, 1),
        ejected=st.booleans(),
    ),
    unique_by=lambda c: c.name,
)


@given(
    candidates_strategy,
    st.integers(1, 5000),
    st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 5000)),
    st.sampled_from(RoutingPolicy),
    st.sampled_from([None, "s"]),
    st.sampled_from([None, "r"]),
)
def test_a_choice_is_always_allowed(candidates, tokens, cached, policy, session, revision):
    """Whatever the snapshot: the choice has room and the right revision, and there is one
    wherever a sound candidate has room."""
    demand = Demand(tokens, revision=revision, session=session)
    choice = pick(candidates, demand, cached, PickSettings(policy), random.Random(0))
    allowed = [
        c for c in candidates if has_room(c, 1) and (revision is None or c.revision == revision)
    ]
    if choice is not None:
        assert choice in allowed
        assert not (choice.ejected and any(not c.ejected for c in allowed))
    else:
        assert not any(not c.ejected for c in allowed)
