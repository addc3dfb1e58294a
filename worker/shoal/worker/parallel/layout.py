"""Which part of a model each rank of a group computes; pure.

Ranks count lane by lane within stage by stage: rank = stage * tensor + lane. A stage is a run of
layers; the lanes of a stage share each of its layers by heads, by the inner size of its MLP and
by vocabulary.

Key heads are dealt out whole while there are enough of them; where there are fewer than lanes,
several lanes hold the same key head and share its query heads. So the query heads of a lane are
a run, all its key heads serve equally many of them, and no head is computed twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


class CannotSplit(ValueError):
    """The model cannot be laid on so many ranks; the message names sizes and limit."""


@dataclass(frozen=True, slots=True)
class Span:
    """`first .. end` of something that is counted."""

    first: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.first


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands in its group."""

    stage: int
    lane: int
    stages: int
    lanes: int

    @staticmethod
    def of(rank: int, tensor: int, pipeline: int) -> "Place":
        return Place(rank // tensor, rank % tensor, pipeline, tensor)

    @property
    def first(self) -> bool:
        """Whether this stage takes tokens in."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether this stage gives logits out."""
        return self.stage + 1 == self.stages

    @property
    def answers(self) -> bool:
        """Whether this rank draws the tokens."""
        return self.last and self.lane == 0


@dataclass(frozen=True, slots=True)
class Share:
    """A rank's part. Heads and rows of the vocabulary are those of its lane; rows beyond the
    vocabulary are padding."""

    place: Place
    layers: Span
    heads: Span
    kv_heads: Span
    kv_holders: int  # lanes that hold the same key heads
    vocab: Span
    inner_units: tuple[int, ...]  # what inner sizes may be cut at multiples of, the best first

    def inner(self, size: int) -> Span:
        """The lane's part of the inner size of an MLP. Raises CannotSplit."""
        lanes, units = self.place.lanes, self.inner_units
        unit = next((u for u in units if size % u == 0 and size // u >= lanes), units[-1])
        return split_evenly(size, lanes, unit, "the inner size of an MLP")[self.place.lane]


def share(
    place: Place,
    *,
    layer_costs: Sequence[float],
    head_cost: float,
    heads: int,
    kv_heads: int,
    vocab: int,
    inner_units: tuple[int, ...] = (16, 1),
) -> Share:
    """The part of the rank at `place`. Raises CannotSplit."""
    stages = split_layers(layer_costs, head_cost, place.stages)
    by_lane = split_heads(heads, kv_heads, place.lanes)
    own_heads, own_kv = by_lane[place.lane]
    rows = -(-vocab // place.lanes)
    return Share(
        place,
        stages[place.stage],
        own_heads,
        own_kv,
        sum(other == own_kv for _, other in by_lane),
        Span(place.lane * rows, (place.lane + 1) * rows),
        inner_units,
    )


def split_layers(costs: Sequence[float], head_cost: float, stages: int) -> tuple[Span, ...]:
    """Runs of layers, at least one each, whose dearest is as cheap as can be; the last one also
    computes the head. Of equal splits the one with the earlier stages fuller."""
    count = len(costs)
    if stages > count:
        raise CannotSplit(f"pipeline is {stages}, but the model has {count} layers")
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    # best[end]: of the first `end` layers in `stage + 1` stages, the dearest stage and its start
    best = {end: (total[end], 0) for end in range(1, count + 1)}
    starts = [best]
    for stage in range(1, stages):
        extra = head_cost if stage + 1 == stages else 0.0
        best = {
            end: min(
                (max(starts[-1][start][0], total[end] - total[start] + extra), -start)
                for start in range(stage, end)
            )
            for end in range(stage + 1, count + 1)
        }
        starts.append(best)
    spans = []
    end = count
    for stage in range(stages - 1, -1, -1):
        first = -starts[stage][end][1]
        spans.append(Span(first, end))
        end = first
    return tuple(reversed(spans))


def split_heads(heads: int, kv_heads: int, lanes: int) -> tuple[tuple[Span, Span], ...]:
    """(query heads, key heads) of each lane."""
    if lanes > heads:
        raise CannotSplit(f"tensor is {lanes}, but the model has {heads} attention heads")
    group = heads // kv_heads
    if kv_heads >= lanes:
        return tuple(
            (Span(own.first * group, own.end * group), own)
            for own in split_evenly(kv_heads, lanes, 1, "key heads")
        )
    parts = []
    for kv_head, holders in enumerate(split_evenly(lanes, kv_heads, 1, "lanes")):
        for queries in split_evenly(group, holders.size, 1, "query heads"):
            first = kv_head * group + queries.first
            parts.append((Span(first, first + queries.size), Span(kv_head, kv_head + 1)))
    return tuple(parts)


def split_evenly(size: int, parts: int, unit: int, what: str) -> tuple[Span, ...]:
    """Runs of whole units, of which the earlier may have one more; the rest goes to the last."""
    units = size // unit
    if units < parts:
        raise CannotSplit(
            f"tensor is {parts}, but {what} of {size} cannot be cut so often at multiples of {unit}"
        )
    each, more = divmod(units, parts)
    ends = [0]
    for part in range(parts):
        ends.append(ends[-1] + (each + (part < more)) * unit)
    ends[-1] = size
    return tuple(Span(first, end) for first, end in pairwise(ends))
