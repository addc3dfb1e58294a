"""Which replica holds which prefix: an exact index fed by the engines' cache events.

Blocks go by their 64-bit wire ids (`shoal.api.blocks.wire_id`). Every block maps to a bit set of
the replicas that hold it, so a lookup walks the request's blocks once, whatever the number of
replicas, and ends at the first block that nobody holds. The index holds what the replicas hold
and never more: an entry goes with its `removed` event, a reset, or its replica.
"""

from collections.abc import Iterable, Mapping, Sequence

from shoal.api.blocks import BlockHash, block_hashes, wire_ids

FIRST_CHUNK = 2  # blocks hashed before the first lookup; later chunks double what there is


class PromptBlocks:
    """The wire ids of a prompt's full blocks, hashed only as far as somebody asks, and once.

    The last token is always computed, so a block that ends with it cannot help and is left out.
    """

    __slots__ = ("_block_size", "_hashed", "_parent", "_token_ids", "_usable", "ids")

    def __init__(self, root: BlockHash, token_ids: Sequence[int], block_size: int) -> None:
        self.ids: list[int] = []
        self._parent = root
        self._token_ids = token_ids
        self._block_size = block_size
        self._usable = max(0, len(token_ids) - 1) // block_size
        self._hashed = 0

    def more(self) -> bool:
        """Hashes the next chunk onto `ids`; False where there are no more blocks."""
        if self._hashed >= self._usable:
            return False
        count = min(max(FIRST_CHUNK, self._hashed), self._usable - self._hashed)
        size = self._block_size
        start = self._hashed * size
        hashes = block_hashes(self._parent, self._token_ids[start : start + count * size], size)
        self.ids += wire_ids(hashes)
        self._parent = hashes[-1]
        self._hashed += count
        return True


class PrefixIndex:
    """Blocks by replica. Replicas are named; a name is known from `add` until `discard`."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}  # block -> bit set of replicas
        self._bits: dict[str, int] = {}  # replica -> its bit
        self._blocks: dict[str, dict[int, None]] = {}  # replica -> its blocks, oldest first
        self._capacity: dict[str, int] = {}

    def __len__(self) -> int:
        """Distinct blocks known."""
        return len(self._holders)

    def held(self, replica: str) -> int:
        """How many blocks the replica is known to hold."""
        return len(self._blocks.get(replica, ()))

    def add(self, replica: str, capacity: int) -> None:
        """Makes a replica known, with nothing cached. It never holds more than `capacity`
        blocks: beyond that its oldest entries go."""
        self.discard(replica)
        taken = set(self._bits.values())
        bit = 1
        while bit in taken:
            bit <<= 1
        self._bits[replica] = bit
        self._blocks[replica] = {}
        self._capacity[replica] = capacity

    def discard(self, replica: str) -> None:
        """Forgets a replica and all it held. Unknown names are ignored."""
        if replica in self._bits:
            self.reset(replica)
            del self._bits[replica], self._blocks[replica], self._capacity[replica]

    def reset(self, replica: str) -> None:
        """Forgets what a known replica held."""
        self.removed(replica, list(self._blocks[replica]))

    def stored(self, replica: str, blocks: Iterable[int]) -> None:
        """The known replica now holds these blocks too."""
        bit, holders, own = self._bits[replica], self._holders, self._blocks[replica]
        for block in blocks:
            holders[block] = holders.get(block, 0) | bit
            own[block] = None
        excess = len(own) - self._capacity[replica]
        if excess > 0:
            self.removed(replica, [block for block, _ in zip(own, range(excess), strict=False)])

    def removed(self, replica: str, blocks: Iterable[int]) -> None:
        """The known replica holds these blocks no more. Blocks it never held are ignored."""
        bit, holders, own = self._bits[replica], self._holders, self._blocks[replica]
        for block in blocks:
            if block not in own:
                continue
            del own[block]
            left = holders[block] & ~bit
            if left:
                holders[block] = left
            else:
                del holders[block]

    def match(self, prompt: PromptBlocks) -> Mapping[str, int]:
        """How many of the prompt's leading blocks each replica holds; zeros are left out."""
        holders = self._holders
        alive = -1
        depth = 0
        depths: dict[int, int] = {}  # bits that fell out -> blocks matched until then
        while holders:
            if depth == len(prompt.ids) and not prompt.more():
                break
            now = holders.get(prompt.ids[depth], 0) & alive
            if now != alive and depth:
                depths[alive & ~now] = depth
            alive = now
            if not now:
                break
            depth += 1
        if alive > 0:
            depths[alive] = depth
        if not depths:
            return {}
        return {
            replica: matched
            for replica, bit in self._bits.items()
            for bits, matched in depths.items()
            if bits & bit
        }
