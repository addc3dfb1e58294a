"""KV blocks move between stores, all layers in one launch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.kernels.gpu.block_copy import BlockStore, copy_blocks, copy_blocks_reference


def store_of(device: torch.device, blocks: int, seed: int) -> BlockStore:
    """Keys and values of two layers, interleaved in one tensor, and scales beside them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for words in (24, 2100):
        both = torch.randn(blocks, 2, words, 4, generator=generator).half().to(device)
        tensors += [both[:, 0], both[:, 1]]
        tensors.append(torch.randn(blocks, 6, generator=generator).to(device))
    return BlockStore.of(tensors, device)


def contents(store: BlockStore) -> list[torch.Tensor]:
    return [tensor.cpu().clone() for tensor in store.tensors]


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_listed_blocks_move_and_no_other_changes(device: torch.device, data: st.DataObject) -> None:
    """Any list of pairs, some skipped, between stores of other lengths."""
    sources = data.draw(st.lists(st.integers(-1, 4), max_size=6))
    targets = data.draw(st.permutations(range(7)))[: len(sources)]
    pairs = torch.tensor(list(zip(sources, targets, strict=True)), dtype=torch.int64).view(-1, 2)
    source, target, wanted = store_of(device, 5, 1), store_of(device, 7, 2), store_of(device, 7, 2)
    copy_blocks_reference(source, wanted, pairs)
    copy_blocks(source, target, pairs.to(device))
    for have, want in zip(contents(target), contents(wanted), strict=True):
        assert torch.equal(have, want)


def test_blocks_come_back_from_the_host(device: torch.device) -> None:
    """Out to pinned memory and into other blocks of the device, all parts unchanged."""
    store = store_of(device, 6, 3)
    before = contents(store)
    host = store.on_host(2)
    copy_blocks(store, host, torch.tensor([[4, 0], [1, 1]], device=device))
    copy_blocks(host, store, torch.tensor([[0, 2], [1, 5]], device=device))
    for old, new in zip(before, contents(store), strict=True):
        assert torch.equal(new[[2, 5]], old[[4, 1]])
        assert torch.equal(new[[0, 1, 3, 4]], old[[0, 1, 3, 4]])


def test_stores_that_cannot_be_copied_are_named(device: torch.device) -> None:
    """Gaps within a block, odd sizes, other layouts and other devices."""
    with pytest.raises(ValueError, match=r"tensors\[0\] has strides .* without gaps"):
        BlockStore.of([torch.zeros(3, 4, 8, device=device)[:, :2, :4]], device)
    with pytest.raises(ValueError, match="a part of a block of 4 bytes, no multiple of 8"):
        BlockStore.of([torch.zeros(3, 1, device=device)], device)
    with pytest.raises(ValueError, match="is on meta"):
        BlockStore.of([torch.zeros(3, 4, device="meta")], device)
    one, other = (BlockStore.of([torch.zeros(3, n, device=device)], device) for n in (4, 8))
    with pytest.raises(ValueError, match=r"parts of \[16\] bytes, of the target \[32\]"):
        copy_blocks(one, other, torch.zeros(1, 2, dtype=torch.int64, device=device))
