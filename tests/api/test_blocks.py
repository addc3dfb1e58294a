"""Block hashes are the definition they are documented as."""

from hashlib import blake2b

from hypothesis import given
from hypothesis import strategies as st

from shoal.api.blocks import block_hashes, root_hash, wire_id, wire_ids

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=80)


@given(tokens, st.sampled_from([1, 4, 16]))
def test_a_block_is_the_hash_of_parent_and_tokens(token_ids, size):
    """Each full block hashes its parent's hash and its ids; a partial block has none."""
    parent = root_hash("r", "tenant")
    expected = []
    for start in range(0, len(token_ids) - size + 1, size):
        block = b"".join(t.to_bytes(4, "little") for t in token_ids[start : start + size])
        parent = blake2b(parent + block, digest_size=16).digest()
        expected.append(parent)
    assert block_hashes(root_hash("r", "tenant"), token_ids, size) == expected
    assert wire_ids(expected) == [wire_id(block) for block in expected]


@given(tokens, st.integers(0, 80))
def test_hashing_can_go_on_from_any_block(token_ids, cut):
    """Hashing the rest from the last block equals hashing everything at once."""
    at = min(cut, len(token_ids)) // 4 * 4
    whole = block_hashes(root_hash("r"), token_ids, 4)
    head = block_hashes(root_hash("r"), token_ids[:at], 4)
    tail = block_hashes(head[-1] if head else root_hash("r"), token_ids[at:], 4)
    assert head + tail == whole


def test_roots_keep_revisions_and_salts_apart():
    """No two of (revision, salt) share a root."""
    roots = {root_hash(*pair) for pair in (("a", ""), ("b", ""), ("a", "x"), ("ax", ""))}
    assert len(roots) == 4
