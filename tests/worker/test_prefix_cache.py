"""The prefix cache alone: what is found, and what the routers are told."""

from shoal.api.blocks import block_hashes, root_hash
from shoal.worker.prefix_cache import PrefixCache

HASHES = block_hashes(root_hash("r"), range(16), 4)


def test_the_longest_known_prefix_is_found() -> None:
    """A gap ends the prefix, whatever is known behind it."""
    cache = PrefixCache()
    cache.register(5, HASHES[0])
    cache.register(7, HASHES[1])
    cache.register(9, HASHES[3])
    assert cache.find(HASHES, 4) == [5, 7]
    assert cache.find(HASHES, 1) == [5]
    assert cache.find(block_hashes(root_hash("other"), range(16), 4), 4) == []


def test_of_two_equal_blocks_the_first_is_known() -> None:
    """A block computed twice leaves the findable one in place, and the second without a name."""
    cache = PrefixCache()
    cache.register(5, HASHES[0])
    cache.register(6, HASHES[0])
    assert cache.find(HASHES, 4) == [5]
    assert 5 in cache and 6 not in cache
    cache.forget(6)
    assert cache.find(HASHES, 4) == [5]


def test_changes_are_net_and_disjoint() -> None:
    """What came and went between two drains is not worth an event."""
    cache = PrefixCache()
    cache.register(1, HASHES[0])
    cache.register(2, HASHES[1])
    assert cache.drain() == ((HASHES[0], HASHES[1]), ())
    cache.forget(1)  # goes and comes back elsewhere
    cache.register(3, HASHES[0])
    cache.register(4, HASHES[2])  # comes and goes
    cache.forget(4)
    cache.forget(2)
    assert cache.drain() == ((), (HASHES[1],))
    assert cache.drain() == ((), ())
    assert cache.hashes() == [HASHES[0]]


def test_clearing_says_so_to_the_routers() -> None:
    """After a device failure nothing is found, and every hash known before is removed."""
    cache = PrefixCache()
    for block, block_hash in enumerate(HASHES, start=1):
        cache.register(block, block_hash)
    cache.drain()
    cache.clear()
    assert cache.find(HASHES, 4) == []
    assert set(cache.drain().removed) == set(HASHES)
