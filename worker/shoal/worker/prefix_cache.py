"""Which block holds which prefix: full blocks, found again by their chained hash.

A block is registered when the step that fills it is planned, not when it is done: within a
layer every row stores its KV before any row attends, so the sequences of one step may already
share what is being filled in it. Registered blocks stay findable after their last holder has
left, until the pool hands them out again.
"""

from collections.abc import Sequence
from typing import NamedTuple

from shoal.api.blocks import BlockHash


class CacheChanges(NamedTuple):
    """Hashes that became findable and that ceased to be, disjoint, since the last drain."""

    stored: tuple[BlockHash, ...]
    removed: tuple[BlockHash, ...]


class PrefixCache:
    """A bijection between hashes and blocks, and its net changes for the routers."""

    def __init__(self) -> None:
        self._block_of: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}
        self._stored: dict[BlockHash, None] = {}  # ordered sets
        self._removed: dict[BlockHash, None] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._hash_of

    def find(self, hashes: Sequence[BlockHash], limit: int) -> list[int]:
        """Blocks of the longest known prefix of `hashes`, at most `limit`. Valid until the next
        block is handed out, unless the caller retains them first."""
        blocks = []
        for block_hash in hashes[:limit]:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def register(self, block: int, block_hash: BlockHash) -> None:
        """Makes a block findable. Where an equal one is known already, that one stays."""
        if block_hash in self._block_of:
            return
        self._block_of[block_hash] = block
        self._hash_of[block] = block_hash
        if block_hash in self._removed:
            del self._removed[block_hash]
        else:
            self._stored[block_hash] = None

    def forget(self, block: int) -> None:
        """The block's content is about to change, or cannot be trusted. Unknown blocks are fine."""
        block_hash = self._hash_of.pop(block, None)
        if block_hash is None:
            return
        del self._block_of[block_hash]
        if block_hash in self._stored:
            del self._stored[block_hash]
        else:
            self._removed[block_hash] = None

    def clear(self) -> None:
        """Forgets every block."""
        for block in list(self._hash_of):
            self.forget(block)

    def hashes(self) -> list[BlockHash]:
        """All findable hashes, oldest first."""
        return list(self._block_of)

    def drain(self) -> CacheChanges:
        """The changes since the last call; a hash that came and went is in neither list."""
        changes = CacheChanges(tuple(self._stored), tuple(self._removed))
        self._stored.clear()
        self._removed.clear()
        return changes
