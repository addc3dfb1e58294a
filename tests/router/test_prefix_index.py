"""The exact prefix index, against a naive one."""

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.api.blocks import block_hashes, root_hash, wire_id
from shoal.router.prefix_index import FIRST_CHUNK, PrefixIndex, PromptBlocks

ROOT = root_hash("r")
REPLICAS = "abc"


class Fixed(PromptBlocks):
    """A prompt whose blocks are given."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__(ROOT, (), 1)
        self.ids += ids


def longest(held: set[int], ids: list[int]) -> int:
    depth = 0
    while depth < len(ids) and ids[depth] in held:
        depth += 1
    return depth


blocks = st.lists(st.integers(0, 12), max_size=8)
operation = st.one_of(
    st.tuples(st.sampled_from(["stored", "removed"]), st.sampled_from(REPLICAS), blocks),
    st.tuples(st.sampled_from(["reset", "discard"]), st.sampled_from(REPLICAS), st.just([])),
)


@settings(max_examples=300)
@given(st.lists(operation, max_size=30), st.lists(blocks, max_size=6))
def test_matches_equal_the_naive_index(operations, prompts):
    """After any events every prompt's match is what sets of blocks say, and nothing lingers."""
    index = PrefixIndex()
    held: dict[str, set[int]] = {}
    for name, replica, ids in operations:
        if replica not in held:
            index.add(replica, 1000)
            held[replica] = set()
        if name == "stored":
            index.stored(replica, ids)
            held[replica] |= set(ids)
        elif name == "removed":
            index.removed(replica, ids)
            held[replica] -= set(ids)
        elif name == "reset":
            index.reset(replica)
            held[replica].clear()
        else:
            index.discard(replica)
            del held[replica]
    assert len(index) == len(set().union(*held.values()) if held else set())
    assert all(index.held(replica) == len(ids) for replica, ids in held.items())
    for ids in prompts:
        expected = {r: longest(own, ids) for r, own in held.items()}
        assert index.match(Fixed(ids)) == {r: depth for r, depth in expected.items() if depth}


@given(
    st.lists(st.integers(0, 2**32 - 1), max_size=400),
    st.sampled_from([1, 4, 16]),
)
def test_prompt_blocks_are_the_shared_definition(token_ids, size):
    """Hashed in chunks, the ids are those of shoal.api.blocks, without a block that ends with
    the last token."""
    prompt = PromptBlocks(ROOT, token_ids, size)
    while prompt.more():
        pass
    hashes = block_hashes(ROOT, token_ids, size)
    usable = max(0, len(token_ids) - 1) // size
    assert prompt.ids == [wire_id(block) for block in hashes[:usable]]


def test_an_unknown_prompt_costs_one_chunk_of_hashing():
    """The walk ends at the first block that nobody holds, and so does the hashing."""
    index = PrefixIndex()
    index.add("a", 100)
    index.stored("a", [1, 2, 3])
    prompt = PromptBlocks(ROOT, range(10_000), 16)
    assert index.match(prompt) == {}
    assert len(prompt.ids) == FIRST_CHUNK


def test_a_replica_never_holds_more_than_its_capacity():
    """An engine that reports blocks for ever cannot make the index grow: the oldest go."""
    index = PrefixIndex()
    index.add("a", 10)
    for start in range(0, 1000, 5):
        index.stored("a", range(start, start + 5))
    assert index.held("a") == len(index) == 10
    assert index.match(Fixed([995, 996])) == {"a": 2}


def test_a_replica_that_comes_back_starts_empty():
    """Adding a name again forgets what it held before."""
    index = PrefixIndex()
    index.add("a", 10)
    index.stored("a", [1])
    index.add("a", 10)
    assert index.match(Fixed([1])) == {}
    assert len(index) == 0
