"""Builds a decoder from a checkpoint: a .gguf file, or a folder of config.json and safetensors."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.kernels.linear import PackedLinear
from shoal.kernels.quant import Int8Weight
from shoal.kernels.rope import interleave_halves
from shoal.worker.model.decoder import Decoder, DecoderLayer
from shoal.worker.model.gguf import GgufSource
from shoal.worker.model.precision import Precision
from shoal.worker.model.safetensors import SafetensorsSource
from shoal.worker.model.spec import DecoderSpec, spec_from_gguf, spec_from_hugging_face
from shoal.worker.model.weights import WeightError, WeightSource

Clock = Callable[[], float]
Quantize = Callable[[Tensor], Int8Weight]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose tables were read, not yet its weights."""

    spec: DecoderSpec
    source: WeightSource


@dataclass(slots=True)
class LoadTimes:
    """Seconds spent on reading and dequantizing tensors, and on packing them."""

    load: float = 0.0
    pack: float = 0.0


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads what a model is. Raises WeightError (UnsupportedModel for what Shoal does not have)."""
    if path.is_file():
        gguf = GgufSource(path)
        spec = spec_from_gguf(gguf.header.metadata, gguf.shapes, gguf.rope_factors())
        return Checkpoint(spec, gguf)
    if not path.is_dir():
        raise WeightError(f"{path} is neither a .gguf file nor a folder")
    config = _read_json(path / "config.json")
    if config is None:
        raise WeightError(f"{path} has no config.json, expected it beside *.safetensors")
    spec = spec_from_hugging_face(config, _read_json(path / "generation_config.json"))
    return Checkpoint(spec, SafetensorsSource(path))


def load_decoder(
    checkpoint: Checkpoint,
    precision: Precision,
    clock: Clock = time.perf_counter,
    quantize: Quantize | None = None,
) -> tuple[Decoder, LoadTimes]:
    """Reads every tensor once, rounds it to the precision and packs it; originals are let go.
    With `quantize` matrices have the values that it leaves, in the precision's weights.

    Raises WeightError that names the first tensor that is missing, not known, or of a wrong
    shape, before any is read.
    """
    read = WeightReader(checkpoint, precision, clock)
    times = LoadTimes()

    def pack(matrix: Matrix) -> PackedLinear:
        started = clock()
        weight, bias = matrix
        if quantize is not None:
            weight = quantize(weight).dequantized()
        compute = precision.compute
        packed = PackedLinear(weight.to(compute), None if bias is None else bias.to(compute))
        times.pack += clock() - started
        return packed

    def layer(index: int) -> DecoderLayer:
        read_layer = read.layer(index)
        return DecoderLayer(
            attention_norm=read_layer.attention_norm,
            qkv=pack(read_layer.qkv),
            output=pack(read_layer.output),
            mlp_norm=read_layer.mlp_norm,
            gate=pack(read_layer.gate),
            up=pack(read_layer.up),
            down=pack(read_layer.down),
        )

    embedding = read.embedding()
    layers = tuple(layer(index) for index in range(checkpoint.spec.num_layers))
    norm = read.norm()
    head = pack((read.head(embedding), None))
    times.load = read.seconds
    return Decoder(checkpoint.spec, precision, embedding, layers, norm, head), times


def expected_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by name."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (spec.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not spec.tied_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, hidden)
    projections = (
        ("self_attn.q_proj", queries, hidden, spec.attention_bias),
        ("self_attn.k_proj", keys, hidden, spec.attention_bias),
        ("self_attn.v_proj", keys, hidden, spec.attention_bias),
        ("self_attn.o_proj", hidden, queries, spec.output_bias),
        ("mlp.gate_proj", inner, hidden, spec.mlp_bias),
        ("mlp.up_proj", inner, hidden, spec.mlp_bias),
        ("mlp.down_proj", hidden, inner, spec.mlp_bias),
    )
    for index in range(spec.num_layers):
        prefix = f"model.layers.{index}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (hidden,)
        for name, rows, columns, bias in projections:
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
    return shapes


def _check(spec: DecoderSpec, source: WeightSource) -> None:
    expected = expected_shapes(spec)
    for name, shape in expected.items():
        found = source.shapes.get(name)
        if found is None:
            raise WeightError(f"{source.origin}: tensor {name} {list(shape)} is missing")
        if found != shape:
            raise WeightError(
                f"{source.origin}: tensor {name} is {list(found)}, expected {list(shape)}"
            )
    for name in source.shapes:
        # Old checkpoints store the rotary frequencies, and some the tied output a second time.
        derived = name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"
        if name not in expected and not derived:
            raise WeightError(
                f"{source.origin}: tensor {name} {list(source.shapes[name])} is not known to "
                f"{spec.architecture}, expected {len(expected)} others"
            )


Matrix = tuple[Tensor, Tensor | None]  # weight [outputs, inputs], bias [outputs]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer as read: norms in float32, matrices in the precision's weights."""

    attention_norm: Tensor  # [hidden]
    qkv: Matrix  # hidden -> (heads + 2 * kv_heads) * head_dim, rotary pairs interleaved
    output: Matrix
    mlp_norm: Tensor  # [hidden]
    gate: Matrix
    up: Matrix
    down: Matrix


class WeightReader:
    """Reads a checkpoint's tensors, each a copy of its own. `seconds`: what reading took so far.

    Raises WeightError that names the first tensor that is missing, not known, or of a wrong
    shape, before any is read.
    """

    def __init__(self, checkpoint: Checkpoint, precision: Precision, clock: Clock) -> None:
        self.seconds = 0.0
        self._spec = checkpoint.spec
        self._source = checkpoint.source
        self._dtype = precision.weights
        self._clock = clock
        _check(self._spec, self._source)

    def embedding(self) -> Tensor:
        """[vocab, hidden]"""
        return self._read("model.embed_tokens.weight", self._dtype)

    def norm(self) -> Tensor:
        """The last norm's weight, [hidden] float32."""
        return self._read("model.norm.weight", torch.float32)

    def head(self, embedding: Tensor) -> Tensor:
        """[vocab, hidden]: the embedding itself where they are tied."""
        return (
            embedding if self._spec.tied_embeddings else self._read("lm_head.weight", self._dtype)
        )

    def layer(self, index: int) -> LayerWeights:
        spec, prefix = self._spec, f"model.layers.{index}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        return LayerWeights(
            attention_norm=self._read(f"{prefix}input_layernorm.weight", torch.float32),
            qkv=self._qkv(attention),
            output=self._matrix(f"{attention}o_proj", spec.output_bias),
            mlp_norm=self._read(f"{prefix}post_attention_layernorm.weight", torch.float32),
            gate=self._matrix(f"{mlp}gate_proj", spec.mlp_bias),
            up=self._matrix(f"{mlp}up_proj", spec.mlp_bias),
            down=self._matrix(f"{mlp}down_proj", spec.mlp_bias),
        )

    def _qkv(self, prefix: str) -> Matrix:
        spec = self._spec
        kinds = ("weight", "bias") if spec.attention_bias else ("weight",)
        joined = []
        for kind in kinds:
            q, k, v = (self._read(f"{prefix}{part}_proj.{kind}", self._dtype) for part in "qkv")
            if not self._source.interleaved_rope:
                q = interleave_halves(q, spec.num_heads, spec.rope.rotary_dim)
                k = interleave_halves(k, spec.num_kv_heads, spec.rope.rotary_dim)
            joined.append(torch.cat((q, k, v)))
        return joined[0], joined[1] if spec.attention_bias else None

    def _matrix(self, name: str, bias: bool) -> Matrix:
        weight = self._read(f"{name}.weight", self._dtype)
        return weight, self._read(f"{name}.bias", self._dtype) if bias else None

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        started = self._clock()
        tensor = self._source.read(name).to(dtype, copy=True)
        self.seconds += self._clock() - started
        return tensor


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise WeightError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values
