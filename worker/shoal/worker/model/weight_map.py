"""Every tensor of a decoder as its checkpoint stores it: name, shape, and how ranks divide it."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from shoal.worker.model.names import Fused
from shoal.worker.model.spec import DecoderSpec, ExpertsSpec, LatentSpec, NormKind, QkNorm, Residual


class Axis(enum.Enum):
    """What a dimension counts: what ranks divide it by."""

    VOCAB = enum.auto()
    HEADS = enum.auto()  # query heads times the size of each
    KV_HEADS = enum.auto()
    INNER = enum.auto()  # of an MLP or of an expert
    SHARED_INNER = enum.auto()  # of the expert that all tokens go through


class Role(enum.Enum):
    EMBEDDING = enum.auto()
    MATRIX = enum.auto()
    BIAS = enum.auto()
    SUMMED_BIAS = enum.auto()  # of a matrix whose inputs are divided: to be added once
    NORM = enum.auto()  # kept in float32, as are a router's corrections


@dataclass(frozen=True, slots=True)
class Split:
    """The dimension that ranks divide, and what lies along it: one axis, or those of a fused
    matrix in order."""

    dim: int
    parts: tuple[Axis, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]  # as stored
    role: Role
    split: Split | None = None  # None: every rank has all of it


def tensors(spec: DecoderSpec) -> tuple[Stored, ...]:
    """All of a decoder's tensors."""
    return (*_top(spec), *(t for index in range(spec.num_layers) for t in _layer(spec, index)))


def expected_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape by its name."""
    return {stored.name: stored.shape for stored in tensors(spec)}


def _top(spec: DecoderSpec) -> Iterator[Stored]:
    names, hidden = spec.names, spec.hidden_size
    by_vocab = Split(0, (Axis.VOCAB,))
    vocab = (spec.vocab_size, hidden)
    yield Stored(f"{names.top(names.embedding)}.weight", vocab, Role.EMBEDDING, by_vocab)
    if spec.learned_positions is not None:
        table = (spec.learned_positions, hidden)
        yield Stored(f"{names.top(names.positions)}.weight", table, Role.EMBEDDING)
    yield from _norm(spec, names.top(names.norm))
    if not spec.tied_embeddings:
        yield Stored(f"{names.head}.weight", vocab, Role.MATRIX, by_vocab)
    if spec.head_bias:
        yield Stored(f"{names.head}.bias", (spec.vocab_size,), Role.BIAS, by_vocab)


def _layer(spec: DecoderSpec, index: int) -> Iterator[Stored]:
    names, prefix = spec.names, spec.names.of_layer(index)
    for norm in layer_norms(spec):
        yield from _norm(spec, f"{prefix}{norm}")
    if spec.latent is not None:
        yield from _latent(spec, spec.latent, f"{prefix}self_attn.")
    else:
        yield from _attention(spec, prefix)
    values = spec.num_heads * spec.value_dim
    hidden = spec.hidden_size
    yield from _rows(
        spec, f"{prefix}{names.output}", hidden, values, Axis.HEADS, bias=spec.output_bias
    )
    if spec.layers[index].experts:
        assert spec.experts is not None, "layers with experts have a spec of them"
        yield from _experts(spec, spec.experts, prefix)
        return
    inner, bias = spec.intermediate_size, spec.mlp_bias
    if spec.gated and names.gate_up is not None:
        both = (Axis.INNER, Axis.INNER)
        yield from _columns(spec, f"{prefix}{names.gate_up}", (inner, inner), both, bias=bias)
    else:
        for name in (names.gate, names.up) if spec.gated else (names.up,):
            yield from _columns(spec, f"{prefix}{name}", (inner,), (Axis.INNER,), bias=bias)
    yield from _rows(spec, f"{prefix}{names.down}", hidden, inner, Axis.INNER, bias=bias)


def layer_norms(spec: DecoderSpec) -> tuple[str, ...]:
    """The names of the norms that a layer has over the residual, or over what it adds to it."""
    names, found = spec.names, []
    if spec.pre_norm:
        found.append(names.attention_norm)
        if spec.residual is not Residual.PARALLEL_SHARED:
            found.append(names.mlp_norm)
    if spec.post_norm:
        found += [names.attention_post_norm, names.mlp_post_norm]
    return tuple(found)


def _attention(spec: DecoderSpec, prefix: str) -> Iterator[Stored]:
    names, size = spec.names, spec.head_dim
    queries, keys = spec.num_heads * size, spec.num_kv_heads * size
    if names.fused is not None:
        axes: tuple[Axis, ...] = (Axis.HEADS, Axis.KV_HEADS, Axis.KV_HEADS)
        rows: tuple[int, ...] = (queries, keys, keys)
        if names.fused is Fused.BY_HEAD:  # as many keys as queries: a head is all three
            axes, rows = (Axis.HEADS,), (queries + 2 * keys,)
        fused = f"{prefix}{names.fused_name}"
        yield from _columns(spec, fused, rows, axes, bias=spec.attention_bias)
    else:
        for name, count, axis in (
            (names.queries, queries, Axis.HEADS),
            (names.keys, keys, Axis.KV_HEADS),
            (names.values, keys, Axis.KV_HEADS),
        ):
            yield from _columns(
                spec, f"{prefix}{name}", (count,), (axis,), bias=spec.attention_bias
            )
    if spec.qk_norm is QkNorm.HEAD:
        for name in (names.query_norm, names.key_norm):
            yield Stored(f"{prefix}{name}.weight", (size,), Role.NORM)
    elif spec.qk_norm is QkNorm.ALL_HEADS:
        for name, count, axis in (
            (names.query_norm, queries, Axis.HEADS),
            (names.key_norm, keys, Axis.KV_HEADS),
        ):
            yield Stored(f"{prefix}{name}.weight", (count,), Role.NORM, Split(0, (axis,)))


def _latent(spec: DecoderSpec, latent: LatentSpec, prefix: str) -> Iterator[Stored]:
    hidden, heads = spec.hidden_size, spec.num_heads
    bias = spec.attention_bias
    queries = heads * (latent.plain_dim + latent.rotary_dim)
    by_head = (Axis.HEADS,)
    if latent.query_rank is None:
        yield from _columns(spec, f"{prefix}q_proj", (queries,), by_head, bias=False)
    else:
        yield from _whole(f"{prefix}q_a_proj", latent.query_rank, hidden, bias=bias)
        yield Stored(f"{prefix}q_a_layernorm.weight", (latent.query_rank,), Role.NORM)
        name, rank = f"{prefix}q_b_proj", latent.query_rank
        yield from _columns(spec, name, (queries,), by_head, bias=False, inputs=rank)
    joined = latent.kv_rank + latent.rotary_dim
    yield from _whole(f"{prefix}kv_a_proj_with_mqa", joined, hidden, bias=bias)
    yield Stored(f"{prefix}kv_a_layernorm.weight", (latent.kv_rank,), Role.NORM)
    expanded = heads * (latent.plain_dim + latent.value_dim)
    name, rank = f"{prefix}kv_b_proj", latent.kv_rank
    yield from _columns(spec, name, (expanded,), by_head, bias=False, inputs=rank)


def _experts(spec: DecoderSpec, experts: ExpertsSpec, prefix: str) -> Iterator[Stored]:
    names, hidden = spec.names, spec.hidden_size
    yield from _whole(f"{prefix}{names.router}", experts.count, hidden)
    if experts.correction:
        name = f"{prefix}{names.router}.e_score_correction_bias"
        yield Stored(name, (experts.count,), Role.NORM)
    for index in range(experts.count):
        yield from _gated(
            spec, f"{prefix}{names.expert.format(index)}", experts.inner, Axis.INNER, expert=True
        )
    if experts.shared_inner is not None:
        shared = f"{prefix}{names.shared}"
        yield from _gated(spec, shared, experts.shared_inner, Axis.SHARED_INNER, expert=False)
    if experts.shared_gate:
        yield from _whole(f"{prefix}{names.shared_gate}", 1, hidden)


def _gated(
    spec: DecoderSpec, prefix: str, inner: int, axis: Axis, *, expert: bool
) -> Iterator[Stored]:
    names, hidden = spec.names, spec.hidden_size
    gate, up, down = "gate_proj", "up_proj", "down_proj"
    if expert:
        gate, up, down = names.expert_gate, names.expert_up, names.expert_down
    for name in (gate, up):
        yield from _columns(spec, f"{prefix}{name}", (inner,), (axis,), bias=False)
    yield from _rows(spec, f"{prefix}{down}", hidden, inner, axis, bias=False)


def _norm(spec: DecoderSpec, name: str) -> Iterator[Stored]:
    if spec.norm is not NormKind.BARE:
        yield Stored(f"{name}.weight", (spec.hidden_size,), Role.NORM)
    if spec.norm is NormKind.LAYER:
        yield Stored(f"{name}.bias", (spec.hidden_size,), Role.NORM)


def _whole(name: str, outputs: int, inputs: int, *, bias: bool = False) -> Iterator[Stored]:
    """A matrix that every rank has all of."""
    yield Stored(f"{name}.weight", (outputs, inputs), Role.MATRIX)
    if bias:
        yield Stored(f"{name}.bias", (outputs,), Role.BIAS)


def _columns(
    spec: DecoderSpec,
    name: str,
    rows: tuple[int, ...],
    axes: tuple[Axis, ...],
    *,
    bias: bool,
    inputs: int | None = None,
) -> Iterator[Stored]:
    """A matrix whose outputs are divided; its inputs are the hidden state unless said otherwise."""
    outputs, inputs = sum(rows), inputs or spec.hidden_size
    if spec.names.transposed:
        yield Stored(f"{name}.weight", (inputs, outputs), Role.MATRIX, Split(1, axes))
    else:
        yield Stored(f"{name}.weight", (outputs, inputs), Role.MATRIX, Split(0, axes))
    if bias:
        yield Stored(f"{name}.bias", (outputs,), Role.BIAS, Split(0, axes))


def _rows(
    spec: DecoderSpec, name: str, outputs: int, inputs: int, axis: Axis, *, bias: bool
) -> Iterator[Stored]:
    """A matrix whose inputs are divided: its results are summed over ranks."""
    if spec.names.transposed:
        yield Stored(f"{name}.weight", (inputs, outputs), Role.MATRIX, Split(0, (axis,)))
    else:
        yield Stored(f"{name}.weight", (outputs, inputs), Role.MATRIX, Split(1, (axis,)))
    if bias:
        yield Stored(f"{name}.bias", (outputs,), Role.SUMMED_BIAS)
