"""Whom the operator asks what when, and what of an answer is news."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.operator.autoscale_load import RouterReport
from shoal.operator.kube.asking import PACE, Hearing, Interest, Question, news
from shoal.operator.observe import EndpointView, RouterView

CHAT, OTHER = "default/chat", "default/other"
BUSY = Interest().with_under_way(CHAT, True)


def view(generation: int = 7, in_flight: int = 0, *, admitted: bool = True) -> RouterView:
    return RouterView(generation, {"p": EndpointView("10.1.0.1:9000", admitted, in_flight)})


def queued(count: int) -> RouterView:
    return RouterView(7, report=RouterReport(0.0, count))


@pytest.mark.parametrize(
    ("interest", "rest", "step"),
    [
        (Interest(), PACE.idle, PACE.few),
        (Interest().with_scaled(CHAT, True), PACE.scaled, PACE.few),
        (BUSY, 0.0, PACE.few),
        (Interest(under_way=frozenset(map(str, range(9)))), 0.0, PACE.eager),
    ],
    ids=["rest", "scaling", "few", "many"],
)
def test_the_pace_follows_what_is_under_way(interest: Interest, rest: float, step: float) -> None:
    """Often for few, less often for many, seldom for nobody."""
    assert (interest.rest(PACE), interest.step(PACE)) == (rest, step)


def test_few_services_are_asked_about_by_name_between_two_questions_about_all() -> None:
    """With a thousand services an answer about all is large; nobody is forgotten over a few."""
    assert BUSY.question(None, 100.0, PACE) == Question(), "never asked about all"
    assert BUSY.question(100.0, 101.0, PACE) == Question((CHAT,))
    assert BUSY.question(100.0, 100.0 + PACE.idle, PACE) == Question()
    many = Interest(under_way=frozenset(map(str, range(9))))
    assert many.question(100.0, 101.0, PACE) == Question()
    assert Interest().question(100.0, 101.0, PACE) == Question()


def test_interest_is_dropped_as_it_was_shown() -> None:
    """Saying so again changes nothing, and is no reason to hurry."""
    assert BUSY.with_under_way(CHAT, True) == BUSY
    assert BUSY.with_under_way(OTHER, False) == BUSY
    assert BUSY.with_under_way(CHAT, False) == Interest()


def test_a_router_counts_a_moment_after_it_is_ready() -> None:
    """Not before it answers, and from its first readiness on however often its pod flaps."""
    router = Hearing().found(False, 10.0)
    assert router.counts_from is None
    router = router.found(True, 13.0).found(False, 20.0).found(True, 25.0)
    assert router.counts_from == 13.0
    assert not router.counts(14.0, PACE), "it has not answered yet"
    router = router.heard(Question(), {}, 0.0)
    assert not router.counts(12.9, PACE)
    assert router.counts(13.0, PACE)


def test_a_silent_router_is_left_out_until_it_answers() -> None:
    """Silence begins with the first question that had no answer; a ready one is then mute."""
    router = Hearing().found(True, 0.0).heard(Question(), {}, 0.0)
    silent = router.unheard(50.0).unheard(52.0)
    assert silent.counts(50.0 + PACE.silence - 0.1, PACE)
    assert not silent.mute(50.0 + PACE.silence - 0.1, PACE)
    assert not silent.counts(50.0 + PACE.silence, PACE)
    assert silent.mute(50.0 + PACE.silence, PACE)
    assert not silent.found(False, 60.0).mute(60.0, PACE), "it takes no requests"
    assert silent.heard(Question(), {}, 0.0).counts(60.0, PACE)


def test_an_answer_about_some_leaves_the_others_as_they_were() -> None:
    """And an answer about all forgets who is not in it."""
    router = Hearing().heard(Question(), {CHAT: view(1), OTHER: view(1)}, 10.0)
    router = router.heard(Question((CHAT,)), {CHAT: view(2)}, 12.0)
    assert {name: found.generation for name, found in router.views.items()} == {CHAT: 2, OTHER: 1}
    assert router.asked_all == 10.0, "nobody asked about all since"
    assert CHAT not in router.heard(Question((CHAT,)), {}, 13.0).views
    assert router.heard(Question(), {}, 0.0).views == {}


def test_requests_that_come_and_go_are_news_only_while_routers_are_waited_for() -> None:
    """Admissions and tables always are."""
    assert not Interest().differs(CHAT, view(in_flight=1), view(in_flight=5))
    assert BUSY.differs(CHAT, view(in_flight=1), view(in_flight=5))
    assert Interest().differs(CHAT, view(), view(admitted=False))
    assert Interest().differs(CHAT, view(7), view(8))
    assert Interest().differs(CHAT, None, view())
    assert Interest().differs(CHAT, view(), None)


def test_the_first_request_that_waits_is_news_where_load_decides() -> None:
    """More of them are not, nor are those of services with a fixed size."""
    scaled = Interest().with_scaled(CHAT, True)
    assert scaled.differs(CHAT, queued(0), queued(1))
    assert not scaled.differs(CHAT, queued(1), queued(9))
    assert not Interest().differs(CHAT, queued(0), queued(1))


views = st.dictionaries(
    st.sampled_from([CHAT, OTHER]), st.builds(view, st.integers(0, 3), st.integers(0, 3))
)


@given(views, views, st.sampled_from([Question(), Question((CHAT,)), Question((OTHER,))]))
def test_news_are_of_what_was_asked(
    before: dict[str, RouterView], said: dict[str, RouterView], question: Question
) -> None:
    """An answer tells nothing of other services, and equal views are never news."""
    said = {
        n: found for n, found in said.items() if not question.services or n in question.services
    }
    first = Hearing().heard(Question(), before, 1.0)
    second = first.heard(question, said, 2.0)
    told = set(news(BUSY, question, first, second))
    assert told <= set(question.services or (CHAT, OTHER))
    assert all(first.views.get(name) != second.views.get(name) for name in told)


def test_a_silent_router_is_waited_for_a_minute() -> None:
    """It is mute from when it has not answered for a while until it is forgotten; an answer makes
    it count again."""
    found = Hearing().found(True, 100.0).heard(Question(), {}, 0.0)
    assert not found.mute(101.0, PACE)
    silent = found.unheard(110.0).unheard(112.0)
    assert not silent.mute(114.0, PACE)
    assert silent.mute(116.0, PACE)
    assert silent.mute(169.0, PACE)
    assert not silent.mute(171.0, PACE)
    assert not silent.counts(171.0, PACE)
    assert silent.heard(Question(), {}, 0.0).counts(172.0, PACE)


def test_a_router_that_never_answered_is_forgotten_too() -> None:
    """One whose pod is ready but that nobody reaches must not keep replicas for ever."""
    new = Hearing().found(True, 100.0).unheard(101.0)
    assert new.mute(102.0, PACE)
    assert not new.mute(162.0, PACE)
    assert not Hearing().found(False, 100.0).unheard(101.0).mute(102.0, PACE)
