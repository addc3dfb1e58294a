"""Heartbeats of a group: who is lost, when it is said, and what an orphan does."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.worker.parallel.auth import AuthError, admit, introduce, new_key
from shoal.worker.parallel.pulse import ORPHANED, Hello, Progress, Pulse, Watch, frame, mismatch
from shoal.worker.parallel.vitals import SERVING, Loss, Patience, Vitals

KEY = new_key()
SHORT = Patience(join=20.0, starting=20.0, serving=0.6)


@dataclass
class Group:
    """A watch of two ranks, and what it said."""

    patience: Patience = SHORT
    losses: list[Loss] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.watch = Watch(
            2, KEY, self.losses.append, patience=self.patience, on_progress=self.progress.append
        )

    def rank(self, number: int, **same: str) -> Pulse:
        hello = Hello(number, f"host-{number}", 100 + number, same)
        pulse = Pulse(self.watch.address, KEY, hello, end=self.ended.append, silence_seconds=0.8)
        pulse.start()
        return pulse


@pytest.fixture
def group() -> Iterator[Group]:
    made = Group()
    yield made
    made.watch.close()


def until(check: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


def test_ranks_join_and_say_how_far_they_are(group: Group) -> None:
    """The driver learns who is where and what they load."""
    first, second = group.rank(0), group.rank(1, model="abc")
    hellos = group.watch.wait_joined()
    assert [hellos[rank].host for rank in (0, 1)] == ["host-0", "host-1"]
    second.say("loading", "weights", 0.41)
    until(lambda: group.progress)
    assert Progress(1, "host-1", "loading", "weights", 0.41) in group.progress
    assert group.watch.loss is None
    for pulse in (first, second):
        pulse.close()


def test_a_rank_that_hangs_up_is_lost_at_once(group: Group) -> None:
    """With its number, host and phase, once."""
    first, second = group.rank(0), group.rank(1)
    group.watch.wait_joined()
    first.say(SERVING)
    second.say("loading")
    until(lambda: any(said.phase == "loading" for said in group.progress))
    second.close()
    until(lambda: group.losses)
    first.close()
    assert str(group.losses[0]) == "rank 1 on host-1 is lost while loading: its process ended"
    assert len(group.losses) == 1


def test_a_ranks_own_last_word_is_the_reason(group: Group) -> None:
    """What the rank says of its end comes before the end of its connection."""
    pulse = group.rank(0)
    pulse.fail("no room for the weights")
    until(lambda: group.losses)
    assert group.losses[0].why == "no room for the weights"


def test_a_rank_that_ends_without_a_word_is_the_reason(group: Group) -> None:
    """Its peers say at once that it is gone, and may be heard first."""
    first, second = group.rank(0), group.rank(1)
    group.watch.wait_joined()
    first.fail("connection reset by peer")
    time.sleep(0.1)
    second.close()
    until(lambda: group.losses)
    assert str(group.losses[0]) == "rank 1 on host-1 is lost while starting: its process ended"


def test_a_silent_rank_is_lost_while_it_serves(group: Group) -> None:
    """A process that is stopped keeps its connections: only silence tells."""
    with socket.create_connection(group.watch.address) as mute:
        introduce(mute, KEY)
        mute.sendall(frame({"rank": 0, "host": "a", "pid": 1, "same": {}}))
        mute.sendall(frame({"phase": SERVING, "what": "", "share": None}))
        until(lambda: group.losses)
    assert group.losses[0].phase == SERVING
    assert "nothing was heard" in group.losses[0].why


def test_a_rank_ends_when_its_driver_is_gone(group: Group) -> None:
    """Whether the driver hangs up or falls silent."""
    group.rank(0)
    until(lambda: 0 in group.watch.hellos)
    group.watch.close()
    until(lambda: group.ended)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        accepted = threading.Thread(target=lambda: admit(silent.accept()[0], KEY))
        accepted.start()
        orphan = Pulse(
            silent.getsockname()[:2],
            KEY,
            Hello(0, "a", 1, {}),
            end=group.ended.append,
            silence_seconds=0.3,
        )
        orphan.start()
        accepted.join()
        until(lambda: len(group.ended) == 2)
    assert group.ended == [ORPHANED, ORPHANED]


def test_strangers_are_not_heard(group: Group) -> None:
    """Neither with another key, nor with none, nor with nonsense after the right one."""
    with socket.create_connection(group.watch.address) as stranger, pytest.raises(AuthError):
        introduce(stranger, new_key())
    with socket.create_connection(group.watch.address) as noisy:
        introduce(noisy, KEY)
        noisy.sendall(b"\xff" * 64)
        assert noisy.recv(1024).strip(b"\0") == b""
    with socket.create_connection(group.watch.address) as eager:
        introduce(eager, KEY)
        eager.sendall(frame({"phase": SERVING, "what": "", "share": None}))
        while eager.recv(1024):
            pass  # until it is hung up on
    assert not group.losses and not group.watch.hellos


def test_a_driver_without_the_key_is_not_believed() -> None:
    """A rank proves itself to nobody who cannot do the same."""
    rank, driver = socket.socketpair()
    with rank, driver:
        other = threading.Thread(target=lambda: driver.sendall(b"n" * 64))
        other.start()
        with pytest.raises(AuthError, match="does not hold"):
            introduce(rank, KEY)
        other.join()


def test_what_must_be_the_same_is_compared() -> None:
    """The sentence names both ranks, their hosts and both values."""
    hellos = {
        0: Hello(0, "a", 1, {"torch": "2.15.0"}),
        1: Hello(1, "b", 1, {"torch": "2.14.1"}),
    }
    assert mismatch({0: hellos[0]}) is None
    said = mismatch(hellos)
    assert said is not None
    assert "rank 0 on a has torch 2.15.0, but rank 1 on b has 2.14.1" in said


def test_the_driver_waits_for_a_rank_that_never_comes_only_so_long() -> None:
    """Without a first word the group ends, and the sentence says who is missing."""
    group = Group(Patience(join=0.3))
    time.sleep(0.6)
    assert group.watch.loss is None  # nobody was launched yet
    group.watch.launched()
    group.watch.wait_joined()
    assert str(group.watch.loss) == ("rank 0 is lost while joining: it did not join within 0.3 s")
    group.watch.close()


words = st.tuples(
    st.integers(0, 2), st.floats(0.0, 40.0), st.sampled_from(["starting", "loading", SERVING])
)


@given(st.lists(words, max_size=30), st.floats(0.0, 200.0))
def test_nobody_who_speaks_in_time_is_lost(said: list[tuple[int, float, str]], wait: float) -> None:
    """A loss is the silence of the rank that was silent first, and it is final."""
    patience = Patience()
    now, vitals = 0.0, Vitals.of(3).launched(0.0)
    for rank, pause, phase in said:
        now += pause
        vitals = vitals.judged(now, patience)
        if vitals.loss is not None:
            break
        vitals = vitals.heard(rank, now, phase=phase)
    vitals = vitals.judged(now + wait, patience)
    if vitals.loss is None:
        silence = {r.rank: now + wait - r.heard for r in vitals.ranks.values()}
        assert all(silence[r.rank] < 2.0 for r in vitals.ranks.values() if r.phase == SERVING)
        assert max(silence.values()) < patience.join
    else:
        assert vitals.lost(2, "later").loss == vitals.loss
        assert vitals.ranks[vitals.loss.rank].phase == vitals.loss.phase
