"""Paged attention against one softmax a query, at odd shapes and mixes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.kernels.attention import paged_attention, store_kv_
from shoal.kernels.paged import CacheShape, flat_order, plan_batch

SCALE = 0.3


def naive(queries: Tensor, kv: Tensor, start: int, kv_heads: int, window: int | None) -> Tensor:
    """queries [n, heads, dim] at positions start.., kv [start + n, 2 * kv_heads, dim]."""
    count, heads, _ = queries.shape
    out = torch.empty_like(queries)
    for row in range(count):
        end = start + row + 1
        seen = slice(0 if window is None else max(0, end - window), end)
        for head in range(heads):
            key_head = head * kv_heads // heads
            scores = kv[seen, key_head] @ queries[row, head] * SCALE
            out[row, head] = scores.softmax(0) @ kv[seen, kv_heads + key_head]
    return out.view(count, -1)


class Case:
    """Sequences in one cache with shuffled blocks, each with some history and some new tokens."""

    def __init__(self, seed: int, starts: list[int], counts: list[int], block_size: int) -> None:
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        order = flat_order(np.array(starts), np.array(counts))
        self.starts, self.counts = np.array(starts)[order], np.array(counts)[order]
        kv_heads, self.group, dim = 1 + seed % 3, 1 + seed % 4, 16
        blocks = -(-(self.starts + self.counts) // block_size)
        self.shape = CacheShape(int(blocks.sum()) + 1, block_size, kv_heads, dim)
        ids = rng.permutation(int(blocks.sum())) + 1
        self.tables = np.zeros((len(starts), int(blocks.max())), np.int64)
        for row, (end, count) in enumerate(zip(np.cumsum(blocks), blocks, strict=True)):
            self.tables[row, :count] = ids[end - count : end]
        self.kv = [
            torch.randn(int(total), 2 * kv_heads, dim) for total in self.starts + self.counts
        ]
        self.queries = torch.randn(int(self.counts.sum()), kv_heads * self.group, dim)

    def run(self, dtype: torch.dtype, window: int | None) -> Tensor:
        cache = self.shape.allocate(dtype)
        for row, start in enumerate(self.starts):
            if start:
                history = plan_batch(
                    np.array([0]), np.array([start]), self.tables[row][None], self.shape, dtype
                )
                store_kv_(cache, self.kv[row][:start].to(dtype), history, self.shape)
        batch = plan_batch(self.starts, self.counts, self.tables, self.shape, dtype, window)
        new = [kv[start:] for kv, start in zip(self.kv, self.starts, strict=True)]
        store_kv_(cache, torch.cat(new).to(dtype), batch, self.shape)
        return paged_attention(self.queries.to(dtype), cache, batch, self.shape, SCALE).float()

    def oracle(self, window: int | None) -> Tensor:
        parts = self.queries.split(self.counts.tolist())
        return torch.cat(
            [
                naive(queries, kv, int(start), self.shape.kv_heads, window)
                for queries, kv, start in zip(parts, self.kv, self.starts, strict=True)
            ]
        )


def mixed(seed: int, sequences: int) -> tuple[list[int], list[int]]:
    """Random histories and counts, most of them decoding."""
    rng = np.random.default_rng(seed)
    counts = np.where(rng.random(sequences) < 0.6, 1, rng.integers(1, 150, sequences))
    return rng.integers(0, 260, sequences).tolist(), counts.tolist()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("window", [None, 1, 37, 150])
def test_mixed_batches_equal_the_naive_oracle(seed: int, window: int | None) -> None:
    """Decode rows of uneven length beside prefill chunks, any block size, with a window or not."""
    starts, counts = mixed(seed, 3 + 2 * seed)
    case = Case(seed, starts, counts, block_size=(4, 16, 32)[seed % 3])
    torch.testing.assert_close(
        case.run(torch.float32, window), case.oracle(window), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize(
    ("starts", "counts"),
    [
        ([0], [1]),
        ([15], [1]),
        ([16], [1]),
        ([511, 3, 0], [1, 1, 1]),
        ([0], [64]),
        ([0], [65]),
        ([63], [2]),
        ([700] * 8 + [9] * 24, [1] * 32),
    ],
)
def test_borders_of_blocks_tiles_and_groups(starts: list[int], counts: list[int]) -> None:
    """Lengths at the edges where a block, a tile of queries or a decode group begins."""
    case = Case(1, starts, counts, block_size=16)
    torch.testing.assert_close(case.run(torch.float32, None), case.oracle(None), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_low_precision_stays_within_its_rounding(dtype: torch.dtype) -> None:
    """The same mix in bfloat16: values of order one, so an error of a few of its steps."""
    starts, counts = mixed(3, 12)
    case = Case(3, starts, counts, block_size=16)
    error = (case.run(dtype, None) - case.oracle(None)).abs()
    assert error.mean() < 2 * torch.finfo(dtype).eps
    assert error.max() < 16 * torch.finfo(dtype).eps


def test_what_is_masked_does_not_matter() -> None:
    """Garbage in the null block and behind each sequence's end changes no bit of the result."""
    case = Case(2, [5, 40, 0], [1, 1, 20], block_size=16)
    expected = case.run(torch.float32, None)
    allocate = CacheShape.allocate

    def littered(shape: CacheShape, dtype: torch.dtype) -> Tensor:
        return allocate(shape, dtype).fill_(1e4)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheShape, "allocate", littered)
        assert torch.equal(case.run(torch.float32, None), expected)


def test_sequences_share_blocks_filled_in_the_same_step() -> None:
    """A row may read a block that another row of the step stores: stores come first."""
    shape = CacheShape(4, 16, 1, 8)
    torch.manual_seed(0)
    kv, queries = torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    tables = np.array([[1, 2], [1, 3]])
    # The second sequence computes only tokens 16..17 of its 18; block 1 is the first's.
    starts, counts = np.array([0, 16]), np.array([18, 2])
    batch = plan_batch(starts, counts, tables, shape, torch.float32)
    cache = shape.allocate(torch.float32)
    store_kv_(cache, torch.cat((kv[:18], kv[18:])), batch, shape)
    out = paged_attention(queries, cache, batch, shape, SCALE)
    second = torch.cat((kv[:16], kv[18:]))
    torch.testing.assert_close(out[:18], naive(queries[:18], kv[:18], 0, 1, None))
    torch.testing.assert_close(out[18:], naive(queries[18:], second, 16, 1, None))


def test_a_float16_cache_saturates() -> None:
    """A key beyond float16's range is stored as its largest value, never as infinity."""
    shape = CacheShape(2, 4, 1, 2)
    cache = shape.allocate(torch.float16)
    batch = plan_batch(np.array([0]), np.array([1]), np.array([[1]]), shape, torch.float32)
    store_kv_(cache, torch.tensor([[[1e6, -1e6], [1.0, 2.0]]]), batch, shape)
    assert cache.isfinite().all()
    assert cache.max() == torch.finfo(torch.float16).max


def test_sequences_out_of_order_are_refused() -> None:
    """`plan_batch` wants decoding sequences first, longest context first."""
    shape = CacheShape(4, 16, 1, 8)
    for starts, counts in (([0, 4], [3, 1]), ([4, 9], [1, 1])):
        with pytest.raises(ValueError, match="flat_order"):
            plan_batch(
                np.array(starts), np.array(counts), np.ones((2, 1), np.int64), shape, torch.float32
            )
