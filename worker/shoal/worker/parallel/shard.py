"""A rank's part of a checkpoint: its spec, and a source that reads nothing else.

To the loader a part looks like a small model: fewer layers, heads and inner columns, and a shorter
vocabulary. What divides each tensor stands beside its name, in `shoal.worker.model.weight_map`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from shoal.worker.model.spec import DecoderSpec
from shoal.worker.model.weight_map import Axis, Role, Split, Stored, tensors
from shoal.worker.model.weights import WeightSource
from shoal.worker.parallel.layout import Place, Share, Span, share

_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def share_of(spec: DecoderSpec, place: Place, inner_units: tuple[int, ...] = (16, 1)) -> Share:
    """The part of the rank at `place`; layers cost what they have of parameters. Raises
    CannotSplit."""
    prefixes = [spec.names.of_layer(index) for index in range(spec.num_layers)]
    costs = dict.fromkeys(prefixes, 0.0)
    for stored in tensors(spec):
        for prefix in prefixes:
            if stored.name.startswith(prefix):
                costs[prefix] += prod(stored.shape)
                break
    return share(
        place,
        layer_costs=list(costs.values()),
        head_cost=float(spec.vocab_size * spec.hidden_size),
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads,
        vocab=spec.vocab_size,
        inner_units=inner_units,
    )


def part_of(spec: DecoderSpec, own: Share) -> DecoderSpec:
    """The spec that the loader and the layers of a rank see."""
    experts = spec.experts
    if experts is not None:
        shared = experts.shared_inner
        experts = replace(
            experts,
            inner=own.inner(experts.inner).size,
            shared_inner=None if shared is None else own.inner(shared).size,
        )
    return replace(
        spec,
        layers=spec.layers[own.layers.first : own.layers.end],
        num_heads=own.heads.size,
        num_kv_heads=own.kv_heads.size,
        intermediate_size=own.inner(spec.intermediate_size).size,
        vocab_size=own.vocab.size,
        experts=experts,
    )


class ShardedSource:
    """The rank's slices of a whole checkpoint's tensors, under the names of the part's layers."""

    def __init__(
        self,
        whole: WeightSource,
        spec: DecoderSpec,
        own: Share,
        on_read: Callable[[str], None] = lambda name: None,
    ) -> None:
        """`spec` is the whole model's; `on_read` is told each tensor's name before it is read."""
        self.origin = whole.origin
        self._whole = whole
        self._spec = spec
        self._own = own
        self._on_read = on_read
        self._stored = {stored.name: stored for stored in tensors(spec)}
        self.shapes: Mapping[str, tuple[int, ...]] = {
            stored.name: stored.shape for stored in tensors(part_of(spec, own))
        }

    @property
    def bytes_read(self) -> int:
        return self._whole.bytes_read

    def read(self, name: str) -> Tensor:
        stored = self._stored[self._whole_name(name)]
        self._on_read(stored.name)
        if stored.role is Role.SUMMED_BIAS and self._own.place.lane:
            return torch.zeros(stored.shape)  # added once, by the first lane
        if stored.split is None or self._own.place.lanes == 1:
            return self._whole.read(stored.name)
        runs = self._runs(stored, stored.split)
        held = stored.shape[stored.split.dim]
        inside = [(min(first, held), min(end, held)) for first, end in runs]
        tensor = self._whole.read_runs(stored.name, stored.split.dim, inside)
        missing = self.shapes[name][stored.split.dim] - tensor.shape[stored.split.dim]
        if missing:
            padding = list(tensor.shape)
            padding[stored.split.dim] = missing
            tensor = torch.cat((tensor, tensor.new_zeros(padding)), stored.split.dim)
        return tensor

    def read_runs(self, name: str, dim: int, runs: Sequence[tuple[int, int]]) -> Tensor:
        whole = self.read(name)
        return torch.cat([whole.narrow(dim, first, end - first) for first, end in runs], dim)

    def _runs(self, stored: Stored, split: Split) -> list[tuple[int, int]]:
        """What the rank holds along the divided dimension, part by part."""
        runs = []
        begin = 0
        width = stored.shape[split.dim]
        counts = [self._count(axis) for axis in split.parts]
        for axis, count in zip(split.parts, counts, strict=True):
            if count is None:
                size = width // len(split.parts)
                span, unit = self._own.inner(size), 1
            else:
                # All parts along a dimension that counts heads have heads of one size.
                unit = width // sum(other for other in counts if other is not None)
                size, span = count * unit, self._span(axis)
            runs.append((begin + span.first * unit, begin + span.end * unit))
            begin += size
        return runs

    def _count(self, axis: Axis) -> int | None:
        """How many heads or tokens a whole axis has; None for an inner size."""
        counts = {
            Axis.VOCAB: self._spec.vocab_size,
            Axis.HEADS: self._spec.num_heads,
            Axis.KV_HEADS: self._spec.num_kv_heads,
        }
        return counts.get(axis)

    def _span(self, axis: Axis) -> Span:
        own = self._own
        return {Axis.VOCAB: own.vocab, Axis.HEADS: own.heads, Axis.KV_HEADS: own.kv_heads}[axis]

    def _whole_name(self, name: str) -> str:
        """The name that a tensor of the part has in the checkpoint: stages count their layers
        from 0."""
        first = self._own.layers.first
        if not first or not name.startswith(self._spec.names.of_layer(0).partition("0")[0]):
            return name
        return _LAYER_NUMBER.sub(lambda number: str(int(number[0]) + first), name, count=1)
