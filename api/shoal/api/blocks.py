"""Block hashes: the one definition that router and worker share.

A KV block is identified by all tokens up to its end: `hash(parent hash, its token ids)`, where
the first block's parent is a root that holds everything else which changes the KV values or
must keep them apart (revision, adapter, tenant). BLAKE2b with 16 bytes resists collisions, so
the engine trusts equal hashes without comparing tokens. On the wire a block goes by the first
8 bytes: enough to route by, where a collision costs a cache miss and nothing else.
"""

import sys
from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import NewType

BlockHash = NewType("BlockHash", bytes)  # 16 bytes

HASH_BYTES = 16


@lru_cache(maxsize=256)
def root_hash(revision: str, salt: str = "") -> BlockHash:
    """The parent of a first block. `salt` names the tenant or adapter, or is empty."""
    return BlockHash(blake2b(f"{revision}\0{salt}".encode(), digest_size=HASH_BYTES).digest())


def block_hashes(parent: BlockHash, token_ids: Sequence[int], block_size: int) -> list[BlockHash]:
    """Hashes of the full blocks of `token_ids`; a last partial block has none.

    `parent` is the root, or the hash of the block that ends right before `token_ids`.
    Token ids must fit 32 bits unsigned, else OverflowError.
    """
    width = 4 * block_size
    data = array("I", token_ids).tobytes()
    fresh = blake2b(digest_size=HASH_BYTES).copy  # cheaper than setting one up each time
    hashes = []
    for start in range(0, len(data) - width + 1, width):
        hasher = fresh()
        hasher.update(parent + data[start : start + width])
        parent = BlockHash(hasher.digest())
        hashes.append(parent)
    return hashes


def wire_id(block: BlockHash) -> int:
    """The 64-bit name of a block in `CacheEvents`."""
    return int.from_bytes(block[:8], "little")


def wire_ids(blocks: Iterable[BlockHash]) -> list[int]:
    """`wire_id` of each."""
    halves = array("Q", b"".join(blocks))
    if sys.byteorder != "little":
        halves.byteswap()
    return halves[::2].tolist()
