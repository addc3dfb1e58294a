"""Sums, gathers and messages through shared memory, between threads that stand for processes."""

import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.kernels.shared import Mailbox, Meeting, PeerMissing, Segment, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

SLOT = 64  # bytes: messages go in many parts


@pytest.fixture
def name(tmp_path: Path) -> Iterator[str]:
    name = f"shoal-test-{uuid.uuid4().hex}"
    yield name
    Segment(name, 1).unlink()


def together(members: int, work: Callable[[int], Any]) -> list[Any]:
    """`work` of every member, each on a thread of its own."""
    results: list[Any] = [None] * members

    def run(member: int) -> None:
        results[member] = work(member)

    threads = [threading.Thread(target=run, args=(member,)) for member in range(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def meeting(name: str, members: int, me: int, seconds: float = 30.0) -> Meeting:
    segment = Segment(name, Meeting.size(members, SLOT))
    return Meeting(segment, members, me, SLOT, seconds)


def test_no_name_is_left_of_memory_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is too small: a group that begins again and again must not fill it."""

    def full(handle: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        Segment("shoal-full", 100, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("members", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_those_of_torch_and_the_same_for_all(
    name: str, members: int, dtype: torch.dtype
) -> None:
    """Of every length around the size of a slot, many in a row; added in float32 in the members'
    order, not-a-number and infinity included."""
    generator = torch.Generator().manual_seed(members)
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, 100, 1] * 3
    parts = [
        [torch.randn(length, generator=generator).to(dtype) for length in lengths]
        for _ in range(members)
    ]
    parts[0][4][0], parts[1][5][1], parts[0][6][2] = torch.nan, torch.inf, -torch.inf
    wanted = []
    for place in range(len(lengths)):
        total = parts[0][place].float()
        for member in range(1, members):
            total = total + parts[member][place].float()
        wanted.append(total.to(dtype))

    def work(me: int) -> list[torch.Tensor]:
        found = [part.clone() for part in parts[me]]
        ours = meeting(name, members, me)
        for values in found:
            ours.add_(values)
        return found

    for found in together(members, work):
        for values, want in zip(found, wanted, strict=True):
            assert torch.equal(values.nan_to_num(7.0), want.nan_to_num(7.0))
            assert torch.equal(values.isnan(), want.isnan())


def test_gathers_columns_at_the_root(name: str) -> None:
    """Parts of different widths, more rows than a slot holds."""
    sizes = [3, 5, 2]
    parts = [torch.arange(7 * size).view(7, size) + 100.0 * me for me, size in enumerate(sizes)]
    found = together(3, lambda me: meeting(name, 3, me).gather(parts[me], 1, sizes))
    assert found[0] is None and found[2] is None
    assert torch.equal(found[1], torch.cat(parts, dim=1))


def test_a_member_that_does_not_come_is_named(name: str) -> None:
    """After the time given, not for ever."""
    with pytest.raises(PeerMissing, match=r"member 1 did not come within 0\.05 s"):
        meeting(name, 2, 0, seconds=0.05).add_(torch.ones(3))


def test_messages_arrive_in_order_and_wait_for_room(name: str) -> None:
    """More of them than the box holds, each larger than a slot."""
    sent = [torch.full((50,), float(number)) for number in range(20)]

    def box() -> Mailbox:
        return Mailbox(Segment(name, Mailbox.size(3, SLOT)), 3, SLOT, 30.0)

    def work(me: int) -> list[torch.Tensor]:
        ours = box()
        if me:
            return [ours.receive(torch.empty(50)) for _ in sent]
        for message in sent:
            ours.send(message)
        return []

    assert all(map(torch.equal, together(2, work)[1], sent))


def test_nobody_waits_for_ever_at_a_mailbox(name: str) -> None:
    """Neither for a message nor for room."""
    box = Mailbox(Segment(name, Mailbox.size(2, SLOT)), 2, SLOT, 0.05)
    with pytest.raises(PeerMissing):
        box.receive(torch.empty(1))
    with pytest.raises(PeerMissing):
        box.send(torch.ones(1000))


def test_what_cannot_be_summed_is_refused(name: str) -> None:
    """Other types, and views with gaps."""
    ours = meeting(name, 2, 0)
    with pytest.raises(ValueError, match="cannot sum"):
        ours.add_(torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="cannot sum"):
        ours.add_(torch.ones(4, 4)[:, ::2])
    with pytest.raises(ValueError, match="a row of 400 bytes"):
        ours.gather(torch.ones(1, 100), 0, [100, 100])
