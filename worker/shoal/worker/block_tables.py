"""Block tables of running sequences over one pool and one prefix cache.

Rules that keep shared blocks right: a sequence writes only at `num_computed` and beyond, in
blocks that it alone holds; a block is registered, and so shareable, only once it is full.
"""

from collections.abc import Iterable

from shoal.api.blocks import BlockHash, block_hashes
from shoal.worker.block_pool import BlockPool
from shoal.worker.prefix_cache import PrefixCache
from shoal.worker.sequence import Sequence


class BlockTables:
    """Gives sequences their blocks, finds those that they can share, and takes them back."""

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool) -> None:
        self.block_size = block_size
        self.caching = caching
        self.pool = BlockPool(num_blocks)
        self.cache = PrefixCache()
        # Blocks that running prefills are going to fill: who needs one of them next waits for it
        # rather than computing it a second time.
        self._promised: set[BlockHash] = set()

    def find_shared(self, seq: Sequence) -> list[int]:
        """Cached blocks of the sequence's prefix; its last token is always computed."""
        if not seq.may_share:
            return []
        return self.cache.find(seq.hashes, self._shareable(seq))

    def next_is_promised(self, seq: Sequence, num_shared: int) -> bool:
        """Whether a running sequence is about to fill the first block that is not shared yet."""
        return (
            seq.may_share
            and num_shared < min(self._shareable(seq), len(seq.hashes))
            and seq.hashes[num_shared] in self._promised
        )

    def fits(self, seq: Sequence, shared: list[int], headroom: int) -> bool:
        """Whether all tokens of a waiting sequence find room and leave `headroom` blocks free."""
        needed = self._num_blocks(len(seq.tokens)) - len(shared)
        revived = sum(self.pool.holders(block) == 0 for block in shared)
        return self.pool.num_free - needed - revived >= headroom

    def enter(self, seq: Sequence, shared: list[int]) -> None:
        """Gives a sequence without blocks those for all its tokens. It `fits`."""
        for block in shared:
            self.pool.retain(block)
        seq.block_ids = list(shared)
        seq.capacity = seq.num_computed = len(shared) * self.block_size
        seq.num_registered = len(shared)
        self.grow(seq, self._num_blocks(len(seq.tokens)) - len(shared))
        self._promised.update(seq.hashes[len(shared) :])

    def grow(self, seq: Sequence, count: int) -> tuple[int, ...]:
        """Adds `count` blocks to the sequence's table. The pool has that many free."""
        blocks = self.pool.allocate(count)
        for block in blocks:
            self.cache.forget(block)
        seq.block_ids += blocks
        seq.capacity += count * self.block_size
        return tuple(blocks)

    def register(self, seq: Sequence) -> None:
        """Makes the full blocks up to `num_computed` findable whose tokens are known."""
        full = min(seq.num_computed, len(seq.tokens)) // self.block_size
        if not self.caching or full == seq.num_registered:
            return
        known = len(seq.hashes)
        if known < full:
            parent = seq.hashes[-1] if known else seq.root
            tokens = seq.tokens[known * self.block_size : full * self.block_size]
            seq.hashes += block_hashes(parent, tokens, self.block_size)
        for place in range(seq.num_registered, full):
            self.cache.register(seq.block_ids[place], seq.hashes[place])
            self._promised.discard(seq.hashes[place])
        seq.num_registered = full

    def leave(self, seq: Sequence) -> None:
        """Takes the sequence's blocks back. They go last first, so that of a prefix the end is
        reused before the beginning; registered ones stay findable until then."""
        self._promised.difference_update(seq.hashes[seq.num_registered :])
        for block in reversed(seq.block_ids):
            self.pool.release(block, keep=block in self.cache)
        seq.block_ids = []
        seq.num_computed = seq.num_registered = seq.capacity = 0

    def distrust(self, seq: Sequence) -> None:
        """What the sequence's blocks store is not to be found by anyone else."""
        for block in seq.block_ids:
            self.cache.forget(block)

    def loss(self, seq: Sequence) -> float:
        """Tokens to compute again for each block that preempting the sequence frees. Blocks that
        others hold too are neither freed nor lost."""
        freed = lost = 0
        for place, block in enumerate(seq.block_ids):
            if self.pool.holders(block) == 1:
                freed += 1
                lost += min(max(seq.num_computed - place * self.block_size, 0), self.block_size)
        return lost / freed if freed else float("inf")

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Asserts that the running sequences, and they alone, hold blocks. O(blocks)."""
        running = list(running)
        self.pool.check_integrity(seq.block_ids for seq in running)
        assert running or not self._promised, "blocks promised by nobody"

    def _shareable(self, seq: Sequence) -> int:
        return (len(seq.tokens) - 1) // self.block_size

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)
