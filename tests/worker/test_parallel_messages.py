"""Plans and results on the wire, and the tokens that travel with them."""

import socket
import threading
from types import MappingProxyType

import pytest

from shoal.worker.config import EngineConfig
from shoal.worker.parallel.channel import Channel, ChannelClosed
from shoal.worker.parallel.invitation import Invitation, Order
from shoal.worker.parallel.messages import (
    Drawn,
    Relay,
    StepFailed,
    pack_plan,
    pack_result,
    unpack_plan,
    unpack_result,
)
from shoal.worker.request import SamplingParams
from shoal.worker.step import (
    PromptLogprobs,
    Row,
    Sampled,
    SlotBlocks,
    SlotInit,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

SAMPLING = SamplingParams(
    temperature=0.7, logit_bias=MappingProxyType({5: -2.5}), stop_token_ids=(7, 9), seed=2**63
)


def plan(*rows: Row, init: tuple[SlotInit, ...] = ()) -> StepPlan:
    return StepPlan(3, init, (SlotBlocks(2, (7, 8)),), rows)


def connected() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        left = socket.create_connection(listener.getsockname())
        return left, listener.accept()[0]


def entry(slot: int) -> SlotInit:
    return SlotInit(slot, (1, 2, 3), 2, SAMPLING, 2**64 - 1, (4, 5), 1)


def test_plans_and_results_arrive_as_they_were() -> None:
    """Every field, with 64-bit seeds and the types that the engine uses."""
    sent = plan(Row(0, 0, 3, True), Row(2, 9, 1, False), init=(entry(0),))
    drawn = (Drawn(2, 9, 77),)
    assert unpack_plan(pack_plan(sent, drawn)) == (sent, drawn)
    logprobs = TokenLogprobs((4, 5), (-0.5, -1.0), 1)
    result = StepResult(
        (Sampled(0, 4, logprobs), Sampled(1, 0, None, "not finite")),
        (PromptLogprobs(0, 1, (logprobs, logprobs)),),
    )
    assert unpack_result(pack_result(result)) == result
    assert unpack_result(pack_result(StepFailed("on fire"))) == StepFailed("on fire")


def test_an_invitation_arrives_as_it_was() -> None:
    """With the engine's settings."""
    order = Order("/m", "hf://m", None, "/c", EngineConfig(max_num_seqs=3))
    invitation = Invitation(("a", 1), ("b", 2), b"\0key", 2, 3, order)
    assert Invitation.unpack(invitation.pack()) == invitation
    assert invitation.world == 6


def test_ranks_learn_the_newest_token_of_a_row_with_the_plan_that_computes_it() -> None:
    """Tokens drawn elsewhere come with the row that begins at them, those of the slot's own
    beginning do not."""
    relay = Relay()
    assert relay.submitted(plan(Row(0, 0, 3, True), init=(entry(0),))) == ()
    relay.collected(StepResult((Sampled(0, 42),)))
    assert relay.submitted(plan(Row(0, 3, 1, True))) == (Drawn(0, 3, 42),)


def test_a_token_of_an_earlier_occupant_is_dropped() -> None:
    """The slot is entered anew while a plan that draws for its last occupant is under way."""
    relay = Relay()
    relay.submitted(plan(Row(0, 0, 3, True), init=(entry(0),)))
    relay.submitted(plan(Row(0, 0, 2, False), init=(entry(0),)))
    relay.collected(StepResult((Sampled(0, 42),)))
    assert relay.submitted(plan(Row(0, 2, 2, True))) == ()
    relay.collected(StepResult(()))
    relay.collected(StepResult((Sampled(0, 0, error="not finite"),)))
    assert relay.submitted(plan(Row(0, 4, 1, True))) == ()


def test_a_channel_carries_frames_of_any_size_and_ends_for_both() -> None:
    """Also one that is larger than any buffer; closing one end wakes the other."""
    left, right = connected()
    ours, theirs = Channel(left), Channel(right)
    bodies = [b"", b"x", bytes(3_000_000)]
    sender = threading.Thread(target=lambda: [ours.send(body) for body in bodies])
    sender.start()
    assert [theirs.receive(10.0) for _ in bodies] == bodies
    sender.join()
    with pytest.raises(TimeoutError):
        theirs.receive(0.01)
    ours.close()
    with pytest.raises(ChannelClosed):
        theirs.receive(10.0)
    with pytest.raises(ChannelClosed):
        ours.send(b"x")
    theirs.close()


def test_a_frame_beyond_the_limit_ends_the_connection() -> None:
    """A stranger's bytes are no length to allocate."""
    left, right = connected()
    left.sendall(b"GET / HTTP/1.1")
    with pytest.raises(ChannelClosed, match="a frame of"):
        Channel(right).receive(10.0)
    left.close()
    right.close()
