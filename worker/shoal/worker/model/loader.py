"""Builds a decoder from a checkpoint: a .gguf file, or a folder of config.json and safetensors."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.kernels.experts import Routing
from shoal.kernels.linear import PackedLinear
from shoal.kernels.quant import Int8Weight
from shoal.worker.model.decoder import Decoder, Reduce, alone
from shoal.worker.model.gguf import GgufSource
from shoal.worker.model.gguf_spec import spec_from_gguf
from shoal.worker.model.hugging_face import spec_from_hugging_face
from shoal.worker.model.layers import (
    DecoderLayer,
    ExpertsMlp,
    GatedMlp,
    Heads,
    LatentHeads,
    Mlp,
    Norm,
    PlainMlp,
    ProjectedHeads,
)
from shoal.worker.model.precision import Precision
from shoal.worker.model.quantized import quantized_source
from shoal.worker.model.reader import (
    Checkpoint,
    Clock,
    ExpertWeights,
    HeadWeights,
    LatentWeights,
    LayerWeights,
    Matrix,
    MlpWeights,
    NormWeights,
    WeightReader,
)
from shoal.worker.model.safetensors import SafetensorsSource
from shoal.worker.model.spec import DecoderSpec, ExpertsSpec, LayerSpec, Scoring
from shoal.worker.model.weight_map import expected_shapes
from shoal.worker.model.weights import WeightError, WeightSource

Quantize = Callable[[Tensor], Int8Weight]


@dataclass(slots=True)
class LoadTimes:
    """Seconds spent on reading and dequantizing tensors, and on packing them."""

    load: float = 0.0
    pack: float = 0.0


def open_checkpoint(path: Path, *, whole: bool = True) -> Checkpoint:
    """Reads what a model is; `whole`: all weights will be read, not a rank's. Raises WeightError
    (UnsupportedModel for what Shoal does not have)."""
    if path.is_file():
        gguf = GgufSource(path, whole=whole)
        spec = spec_from_gguf(gguf.header.metadata, gguf.shapes, gguf.rope_factors())
        return Checkpoint(spec, gguf)
    config = read_config(path)
    spec = spec_from_hugging_face(config, _read_json(path / "generation_config.json"))
    stored = SafetensorsSource(path)
    spec = replace(spec, names=spec.names.fitted(stored.shapes))
    source: WeightSource = stored
    if quantization := config.get("quantization_config"):
        source = quantized_source(quantization, stored, expected_shapes(spec))
    return Checkpoint(spec, source)


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json. Raises WeightError where there is none."""
    if not folder.is_dir():
        raise WeightError(f"{folder} is neither a .gguf file nor a folder")
    config = _read_json(folder / "config.json")
    if config is None:
        raise WeightError(f"{folder} has no config.json, expected it beside *.safetensors")
    return config


def load_decoder(
    checkpoint: Checkpoint,
    precision: Precision,
    clock: Clock = time.perf_counter,
    quantize: Quantize | None = None,
    reduce: Reduce = alone,
) -> tuple[Decoder, LoadTimes]:
    """Reads every tensor once, rounds it to the precision and packs it; originals are let go.
    With `quantize` matrices have the values that it leaves, in the precision's weights.

    Raises WeightError that names the first tensor that is missing, not known, or of a wrong
    shape, before any is read.
    """
    read = WeightReader(checkpoint, precision, clock)
    pack = Packer(checkpoint.spec, precision, clock, quantize)
    embedding = read.embedding()
    layers = tuple(
        pack.layer(layer, read.layer(index)) for index, layer in enumerate(checkpoint.spec.layers)
    )
    decoder = Decoder(
        spec=checkpoint.spec,
        precision=precision,
        embedding=embedding,
        positions=read.positions(),
        layers=layers,
        norm=pack.norm(read.norm()),
        head=pack.linear(read.head(embedding)),
        reduce=reduce,
    )
    return decoder, LoadTimes(read.seconds, pack.seconds)


class Packer:
    """Makes a decoder's parts of weights as read. `seconds`: what packing took so far."""

    def __init__(
        self,
        spec: DecoderSpec,
        precision: Precision,
        clock: Clock = time.perf_counter,
        quantize: Quantize | None = None,
    ) -> None:
        self.seconds = 0.0
        self._spec = spec
        self._compute = precision.compute
        self._clock = clock
        self._quantize = quantize
        self._eps = torch.tensor(spec.norm_eps)

    def linear(self, matrix: Matrix, *, plain: bool = False) -> PackedLinear:
        """`plain`: of a matrix that is small and decides much, and is not quantized."""
        started = self._clock()
        weight, bias = matrix
        if self._quantize is not None and not plain:
            weight = self._quantize(weight).dequantized()
        packed = PackedLinear(
            weight.to(self._compute), None if bias is None else bias.to(self._compute)
        )
        self.seconds += self._clock() - started
        return packed

    def norm(self, weights: NormWeights) -> Norm:
        return Norm(self._spec.norm, weights.weight, weights.bias, self._eps)

    def layer(self, spec: LayerSpec, weights: LayerWeights) -> DecoderLayer:
        return DecoderLayer(
            spec=spec,
            attention_norm=self._maybe_norm(weights.attention_norm),
            heads=self._heads(weights.heads),
            output=self.linear(weights.output),
            attention_post_norm=self._maybe_norm(weights.attention_post_norm),
            mlp_norm=self._maybe_norm(weights.mlp_norm),
            mlp=self._mlp(weights.mlp),
            mlp_post_norm=self._maybe_norm(weights.mlp_post_norm),
        )

    def _maybe_norm(self, weights: NormWeights | None) -> Norm | None:
        return None if weights is None else self.norm(weights)

    def _heads(self, weights: HeadWeights | LatentWeights) -> Heads:
        spec = self._spec
        if isinstance(weights, HeadWeights):
            return ProjectedHeads(
                spec, self.linear(weights.qkv), weights.query_norm, weights.key_norm
            )
        assert spec.latent is not None, "latent weights have a spec"
        down = weights.query_down
        return LatentHeads(
            spec,
            spec.latent,
            query_down=None if down is None else self.linear(down),
            query_norm=weights.query_norm,
            query_up=self.linear(weights.query_up),
            kv_down=self.linear(weights.kv_down),
            kv_norm=weights.kv_norm,
            kv_up=self.linear(weights.kv_up),
        )

    def _mlp(self, weights: MlpWeights | ExpertWeights) -> Mlp:
        if isinstance(weights, ExpertWeights):
            assert self._spec.experts is not None, "layers with experts have a spec of them"
            gate = weights.shared_gate
            return ExpertsMlp(
                router=self.linear(weights.router, plain=True),
                correction=weights.correction,
                routing=routing(self._spec.experts),
                experts=tuple(self._gated(expert) for expert in weights.experts),
                shared=None if weights.shared is None else self._gated(weights.shared),
                shared_gate=None if gate is None else self.linear(gate, plain=True),
            )
        if weights.gate is None:
            activation = self._spec.activation.value
            return PlainMlp(self.linear(weights.up), self.linear(weights.down), activation)
        return self._gated(weights)

    def _gated(self, weights: MlpWeights) -> GatedMlp:
        assert weights.gate is not None, "a gated MLP has a gate"
        return GatedMlp(
            self.linear(weights.gate),
            self.linear(weights.up),
            self.linear(weights.down),
            self._spec.activation.value,
        )


def routing(experts: ExpertsSpec) -> Routing:
    return Routing(
        per_token=experts.per_token,
        sigmoid=experts.scoring is Scoring.SIGMOID,
        renormalize=experts.renormalize,
        scale=experts.scale,
        groups=experts.groups,
        groups_kept=experts.groups_kept,
        group_best=experts.group_best,
    )


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
