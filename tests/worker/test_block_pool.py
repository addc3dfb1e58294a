"""The block pool alone."""

import random

import pytest

from shoal.worker.block_pool import BlockPool


def test_the_null_block_is_never_handed_out() -> None:
    """A pool of n blocks has n - 1 to give, and none of them is block 0."""
    pool = BlockPool(8)
    assert sorted(pool.allocate(7)) == list(range(1, 8))
    assert pool.num_free == 0 and pool.num_used == 7


def test_blocks_are_reused_least_recently_freed_first() -> None:
    """What is worth keeping survives longest; what is not goes first."""
    pool = BlockPool(5)
    a, b, c, d = pool.allocate(4)
    for block in (b, a, d):
        pool.release(block, keep=True)
    pool.release(c, keep=False)
    assert pool.free_blocks() == [c, b, a, d]
    assert pool.allocate(4) == [c, b, a, d]


def test_a_block_is_free_when_its_last_holder_leaves() -> None:
    """Reference counts, not owners, decide."""
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.retain(block)
    pool.release(block, keep=True)
    assert pool.holders(block) == 1 and pool.num_free == 1
    pool.release(block, keep=True)
    assert pool.holders(block) == 0 and pool.num_free == 2


def test_a_freed_block_can_be_taken_back_from_the_middle() -> None:
    """A hit on a freed block revives it without disturbing the others' order."""
    pool = BlockPool(5)
    blocks = pool.allocate(4)
    for block in blocks:
        pool.release(block, keep=True)
    pool.retain(blocks[1])
    assert pool.free_blocks() == [blocks[0], *blocks[2:]]
    pool.check_integrity([[blocks[1]]])


@pytest.mark.parametrize("misuse", ["release", "allocate"])
def test_misuse_is_our_bug_and_caught(misuse: str) -> None:
    """Releasing what nobody holds, or taking more than there is, never passes silently."""
    pool = BlockPool(3)
    with pytest.raises(AssertionError):
        if misuse == "release":
            pool.release(1, keep=True)
        else:
            pool.allocate(3)


def test_integrity_check_sees_a_leak() -> None:
    """A held block that no table names is found."""
    pool = BlockPool(4)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="holders"):
        pool.check_integrity([])


def test_a_pool_needs_a_block_beside_the_null_one() -> None:
    """The error names the field and the value."""
    with pytest.raises(ValueError, match=r"num_blocks must be at least 2.*got 1"):
        BlockPool(1)


def test_random_use_conserves_blocks() -> None:
    """Under any order of use, holders and free list stay a partition of the blocks."""
    rng = random.Random(0)
    pool = BlockPool(12)
    tables: list[list[int]] = []
    for _ in range(3000):
        action = rng.random()
        if action < 0.4 and pool.num_free >= 3:
            tables.append(pool.allocate(rng.randrange(4)))
        elif action < 0.6 and tables:
            shared = list(rng.choice(tables))
            for block in shared:
                pool.retain(block)
            tables.append(shared)
        elif tables:
            for block in tables.pop(rng.randrange(len(tables))):
                pool.release(block, keep=rng.random() < 0.5)
        pool.check_integrity(tables)
