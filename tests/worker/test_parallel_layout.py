"""Which part of a model each rank computes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.worker.parallel.layout import (
    CannotSplit,
    Place,
    Span,
    share,
    split_evenly,
    split_heads,
    split_layers,
)


@given(kv_heads=st.integers(1, 12), group=st.integers(1, 8), lanes=st.integers(1, 12))
def test_every_query_head_has_one_lane_and_finds_its_key_head_there(
    kv_heads: int, group: int, lanes: int
) -> None:
    """Lanes cover the query heads in order, each with the key heads that these attend by, and the
    same number of queries for each of its key heads."""
    heads = kv_heads * group
    if lanes > heads:
        with pytest.raises(CannotSplit, match=f"tensor is {lanes}.*{heads} attention heads"):
            split_heads(heads, kv_heads, lanes)
        return
    parts = split_heads(heads, kv_heads, lanes)
    assert [head for own, _ in parts for head in range(own.first, own.end)] == list(range(heads))
    for own, keys in parts:
        assert own.size and own.size % keys.size == 0
        each = own.size // keys.size
        for offset, head in enumerate(range(own.first, own.end)):
            assert head // group == keys.first + offset // each


@given(
    costs=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    head=st.integers(0, 20),
    stages=st.integers(1, 9),
)
def test_stages_are_runs_of_layers_whose_dearest_is_cheapest(
    costs: list[int], head: int, stages: int
) -> None:
    """Against all ways to cut."""
    if stages > len(costs):
        with pytest.raises(CannotSplit, match=f"pipeline is {stages}.*{len(costs)} layers"):
            split_layers(costs, head, stages)
        return

    def dearest(spans: tuple[Span, ...]) -> int:
        sums = [sum(costs[span.first : span.end]) for span in spans]
        return max([*sums[:-1], sums[-1] + head])

    def ways(first: int, left: int) -> list[tuple[Span, ...]]:
        if left == 1:
            return [(Span(first, len(costs)),)]
        return [
            (Span(first, end), *rest)
            for end in range(first + 1, len(costs) - left + 2)
            for rest in ways(end, left - 1)
        ]

    found = split_layers(costs, head, stages)
    assert found in ways(0, stages)
    assert dearest(found) == min(map(dearest, ways(0, stages)))


def test_the_head_of_a_small_model_weighs_as_much_as_layers() -> None:
    """SmolLM2-135M: 30 layers of 3.5 M weights and a head of 28 M, about eight layers."""
    assert split_layers([3.54] * 30, 28.3, 2) == (Span(0, 19), Span(19, 30))


def test_uneven_cuts_keep_to_their_unit() -> None:
    """The inner size of an MLP is cut at groups of quantized weights; a rest goes to the last."""
    assert split_evenly(1536, 3, 64, "inner") == (Span(0, 512), Span(512, 1024), Span(1024, 1536))
    assert split_evenly(100, 3, 16, "inner") == (Span(0, 32), Span(32, 64), Span(64, 100))
    with pytest.raises(CannotSplit, match="inner of 100 cannot be cut so often at multiples of 64"):
        split_evenly(100, 3, 64, "inner")


def test_an_odd_vocabulary_is_padded() -> None:
    """All lanes have equally many rows, the last ones beyond the vocabulary."""
    shares = [
        share(
            Place.of(rank, 3, 2),
            layer_costs=[1.0] * 4,
            head_cost=1.0,
            heads=6,
            kv_heads=2,
            vocab=199,
        )
        for rank in range(6)
    ]
    assert [part.vocab for part in shares[:3]] == [Span(0, 67), Span(67, 134), Span(134, 201)]
    assert [part.place.answers for part in shares] == [False] * 3 + [True, False, False]
    assert [part.inner(48) for part in shares[:3]] == [Span(0, 16), Span(16, 32), Span(32, 48)]
    assert [part.kv_heads for part in shares[3:]] == [Span(0, 1), Span(0, 1), Span(1, 2)]
