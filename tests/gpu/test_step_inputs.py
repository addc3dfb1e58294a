"""The state of slots on the device: what a decode step reads of it and leaves in it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.kernels.gpu.step_inputs import (
    DecodeRows,
    SlotRows,
    gather_decode,
    gather_decode_reference,
    relay_drawn,
)


def state(slots: int, positions: int, blocks: int, device: torch.device) -> SlotRows:
    """Random tokens, and tables with entries that tell where they were read."""
    rows = SlotRows.allocate(slots, positions, blocks, device)
    generator = torch.Generator().manual_seed(0)
    rows.tokens[:slots] = torch.randint(1, 9999, (slots, positions), generator=generator).int()
    rows.tables[:slots] = torch.arange(1, slots * blocks + 1).view(slots, blocks).int()
    return rows


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_a_decode_step_reads_its_rows(device: torch.device, data: st.DataObject) -> None:
    """Any slots in any order at any positions, with and without new blocks, and padding; a table
    longer than a program copies."""
    block_size = data.draw(st.sampled_from([4, 16, 32]))
    blocks = data.draw(st.sampled_from([3, 300]))
    slots = data.draw(st.integers(1, 6))
    positions = blocks * block_size
    before = state(slots, positions + 1, blocks, device)
    chosen = data.draw(st.permutations(range(slots)))[: data.draw(st.integers(1, slots))]
    step = [
        [slot, data.draw(st.integers(0, positions - 1)), data.draw(st.sampled_from([0, 7001]))]
        for slot in chosen
    ]
    step += [[before.padding, 0, 0]] * data.draw(st.integers(0, 3))
    rows = torch.tensor(step, device=device).t().contiguous()
    after, wanted = gather_decode_reference(rows, before, block_size)
    found = DecodeRows.allocate(len(step) + 1, blocks, device).first(len(step))
    gather_decode(rows, before, block_size, found)
    for name in ("ids", "places", "lengths", "tables"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    assert torch.equal(before.tables, after.tables)


def test_a_drawn_token_is_read_by_the_next_step(device: torch.device) -> None:
    """Behind the token that the row computed, and nowhere else; padding leaves nothing."""
    before = state(4, 33, 2, device)
    tokens = before.tokens.clone()
    step = torch.tensor([[2, 0, 4], [7, 31, 0], [0, 0, 0]], device=device)
    relay_drawn(step, torch.tensor([50001, 50002, 50003], device=device), before)
    tokens[2, 8], tokens[0, 32] = 50001, 50002
    assert torch.equal(before.tokens, tokens)
    following = torch.tensor([[2, 4], [8, 0], [0, 0]], device=device)
    rows = DecodeRows.allocate(2, 2, device)
    gather_decode(following, before, 16, rows)
    assert rows.ids.tolist() == [50001, 0] and rows.lengths.tolist() == [9, 0]


def test_a_step_of_another_shape_is_refused(device: torch.device) -> None:
    """The message names what does not fit."""
    with pytest.raises(ValueError, match=r"step has shape \[2, 3\], expected \[3, 3\]"):
        gather_decode(
            torch.zeros(2, 3, dtype=torch.int64, device=device),
            state(4, 33, 2, device),
            16,
            DecodeRows.allocate(3, 2, device),
        )
