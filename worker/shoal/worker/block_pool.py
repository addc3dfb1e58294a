"""KV blocks: who holds which, and which to hand out next.

Blocks are the integers `1 .. num_blocks - 1`; block 0 is null and never handed out. Free blocks
form a circular doubly linked list threaded through two arrays, with block 0 as its anchor: a
block leaves from the middle in O(1), which a deque cannot do, and that is what a hit on a freed
block of the prefix cache needs. The list is in order of reuse, least recently freed first.
"""

from collections.abc import Iterable


class BlockPool:
    """Reference counts and the free list. A block is free exactly while nobody holds it; what it
    stores stays intact until it is handed out again."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks must be at least 2 (one is null), got {num_blocks}")
        self._next = [(block + 1) % num_blocks for block in range(num_blocks)]
        self._prev = [(block - 1) % num_blocks for block in range(num_blocks)]
        self._holders = [0] * num_blocks
        self.num_free = num_blocks - 1
        self.num_blocks = num_blocks

    @property
    def num_usable(self) -> int:
        """All blocks but the null one."""
        return self.num_blocks - 1

    @property
    def num_used(self) -> int:
        return self.num_usable - self.num_free

    def holders(self, block: int) -> int:
        """How many sequences hold the block; 0 is free."""
        return self._holders[block]

    def allocate(self, count: int) -> list[int]:
        """Hands out `count` free blocks with one holder each. The caller has checked `num_free`."""
        assert count <= self.num_free, f"{count} blocks asked for, {self.num_free} free"
        blocks = []
        for _ in range(count):
            block = self._next[0]
            self._unlink(block)
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def retain(self, block: int) -> None:
        """Adds a holder; a free block leaves the free list with its content."""
        if self._holders[block] == 0:
            self._unlink(block)
        self._holders[block] += 1

    def release(self, block: int, *, keep: bool) -> None:
        """Takes a holder away. A block that becomes free is reused last if its content is worth
        keeping, and first if not."""
        assert self._holders[block] > 0, f"block {block} released but not held"
        self._holders[block] -= 1
        if self._holders[block] == 0:
            after = self._prev[0] if keep else 0
            before = self._next[after]
            self._next[after] = self._prev[before] = block
            self._prev[block], self._next[block] = after, before
            self.num_free += 1

    def free_blocks(self) -> list[int]:
        """The free blocks in order of reuse. O(num_free): for checks."""
        blocks, block = [], self._next[0]
        while block:
            blocks.append(block)
            block = self._next[block]
        return blocks

    def check_integrity(self, tables: Iterable[Iterable[int]]) -> None:
        """Asserts that the block tables given are all that holds blocks, and that every other
        block is in the free list once."""
        held = [0] * self.num_blocks
        for table in tables:
            for block in table:
                held[block] += 1
        assert held[0] == 0, "the null block was handed out"
        assert held == self._holders, "holders differ from the block tables"
        free = self.free_blocks()
        assert len(free) == self.num_free, "the count of free blocks is off"
        expected = [block for block in range(1, self.num_blocks) if held[block] == 0]
        assert sorted(free) == expected, "the free list differs from the blocks without holders"

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before], self._prev[after] = after, before
        self.num_free -= 1
