"""The driver of a group beside ranks and strangers that this test plays itself."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgpack
import pytest

from shoal.worker.executor import DeviceLost
from shoal.worker.parallel import auth
from shoal.worker.parallel.auth import AuthError, admit, introduce, new_key
from shoal.worker.parallel.channel import Channel, ChannelClosed
from shoal.worker.parallel.driver import GroupExecutor
from shoal.worker.parallel.invitation import Invitation, Order
from shoal.worker.parallel.part import digest_of
from shoal.worker.parallel.pulse import Hello, Pulse
from shoal.worker.request import SamplingParams
from shoal.worker.step import Row, SlotInit, StepPlan

INFO = {
    "architecture": "Made",
    "vocab_size": 9,
    "max_model_len": 100,
    "eos_token_ids": [],
    "bos_token_id": None,
    "dtype": "float32",
}
OPENED = {"digest": "d", "blocks": 10, "native": False, "info": INFO, "port": 0}


class OneRank:
    """A launcher whose rank says what is right until it serves, and then answers `answer`."""

    host = "127.0.0.1"

    def __init__(self, answer: bytes, strangers: bool = False) -> None:
        self._answer, self._strangers = answer, strangers
        self._thread: threading.Thread | None = None
        self.silent: list[socket.socket] = []

    def start(self, invitation: bytes) -> None:
        asked = Invitation.unpack(invitation)
        if self._strangers:
            # One never says a word, one shows the key and then says nothing.
            self.silent = [socket.create_connection(asked.work) for _ in range(2)]
        self._thread = threading.Thread(target=self._run, args=(asked,), daemon=True)
        self._thread.start()

    def failure(self) -> str | None:
        return None

    def stop(self) -> None:
        assert self._thread is not None
        self._thread.join(10)
        for connection in self.silent:
            connection.close()

    def _run(self, asked: Invitation) -> None:
        pulse = Pulse(asked.pulse, asked.key, Hello(0, "here", 1, {}), end=lambda code: None)
        pulse.start()
        if self._strangers:
            introduce(self.silent[1], asked.key)
        connection = socket.create_connection(asked.work)
        introduce(connection, asked.key)
        channel = Channel(connection)
        says: list[dict[str, Any]] = [
            {"rank": 0, "node": "here"},
            OPENED,
            {"open": True},
            {"backend": "none", "bytes": 0, "seconds": 0.0},
            {"rate": 1.0},
        ]
        try:
            for message in says:
                channel.send(msgpack.packb(message))
                channel.receive()
            channel.send(self._answer)
            channel.receive()
        except ChannelClosed:
            pass
        finally:
            pulse.close()
            channel.close()


def made(launcher: OneRank, groups: ModuleType) -> GroupExecutor:
    order = Order("nowhere", "nowhere", None, None, groups.settings())
    return GroupExecutor(order, 1, 1, launcher, lambda phase, seconds: None, depth=2)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ends = socket.socketpair()
    yield ends
    for end in ends:
        end.close()


def test_strangers_that_stay_silent_hold_up_nobody(
    groups: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one without the key nor one that has it: both were there before the rank was."""
    monkeypatch.setattr(auth, "HANDSHAKE_SECONDS", 60.0)
    executor = made(OneRank(b"", strangers=True), groups)
    assert executor.num_blocks == 10
    executor.close()


@pytest.mark.parametrize(
    "answer", [b"\xc1", msgpack.packb(5), msgpack.packb(([], [])), msgpack.packb([1, 2, 3])]
)
def test_an_answer_that_does_not_fit_ends_the_group(answer: bytes, groups: ModuleType) -> None:
    """Answers of other plans may be on the way: none may be taken for that of another plan."""
    executor = made(OneRank(answer), groups)
    init = SlotInit(0, (1, 2), 2, SamplingParams(), 0, (1,))
    executor.submit(StepPlan(1, (init,), (), (Row(0, 0, 2, True),)))
    with pytest.raises(DeviceLost, match="the answer of rank 0 does not fit its plan"):
        executor.collect()
    assert executor.lost is not None and "does not fit" in executor.lost
    executor.close()


def test_a_handshake_has_one_deadline(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who sends a byte now and then does not prolong it."""
    monkeypatch.setattr(auth, "HANDSHAKE_SECONDS", 0.3)
    ours, theirs = pair
    over = threading.Event()

    def drip() -> None:
        for _ in range(60):
            theirs.send(b"x")
            if over.wait(0.05):
                return

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        with pytest.raises(AuthError):
            admit(ours, new_key())
    finally:
        received = not thread.is_alive()
        over.set()
        thread.join()
    assert not received, "it went on until all bytes were there"


def test_files_of_one_shape_with_other_weights_have_another_digest(tmp_path: Path) -> None:
    """Also where only a stretch in the middle differs, or only the end."""
    file = tmp_path / "model.safetensors"
    size = 1 << 20
    digests = []
    for start, end in ((0, 0), (size // 2, size // 2 + size // 16), (size - 1, size)):
        content = bytearray(size)
        content[start:end] = b"\1" * (end - start)
        file.write_bytes(content)
        digests.append(digest_of(tmp_path))
    assert len(set(digests)) == 3 and digest_of(tmp_path) == digests[-1]
    file.write_bytes(b"short")
    assert digest_of(tmp_path) not in digests
