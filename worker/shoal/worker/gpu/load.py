"""From a checkpoint to a decoder on a device.

What is done to tensors (casts, reordered rows, joined matrices) is done on the device. One layer's
parts are there twice while they are joined.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shoal.kernels.gpu.linear4 import Linear4
from shoal.kernels.gpu.pack4 import Weight4, stack4
from shoal.kernels.gpu.rope import cos_sin_table
from shoal.worker.gpu.coded import NUMBERS, CodedSource
from shoal.worker.gpu.decoder import DeviceDecoder
from shoal.worker.gpu.device import Device
from shoal.worker.gpu.layers import (
    Dense,
    DeviceLayer,
    DeviceNorm,
    ExpertsMlp,
    GatedMlp,
    Heads,
    LatentHeads,
    Linear,
    PlainMlp,
    ProjectedHeads,
)
from shoal.worker.gpu.source import DeviceSource
from shoal.worker.model.loader import routing
from shoal.worker.model.precision import Precision
from shoal.worker.model.quantized import QuantizedSource
from shoal.worker.model.reader import (
    Checkpoint,
    ExpertWeights,
    HeadWeights,
    LatentWeights,
    LayerWeights,
    Matrix,
    MlpWeights,
    NormWeights,
    WeightReader,
)
from shoal.worker.model.spec import DecoderSpec, LayerSpec

MakeLinear = Callable[[Tensor, Tensor | None], Linear]  # of a weight and a bias on the device


def load_device_decoder(
    checkpoint: Checkpoint,
    precision: Precision,
    device: Device,
    max_model_len: int,
    make_linear: MakeLinear = Dense,
    *,
    keep_codes: bool = True,
) -> DeviceDecoder:
    """Reads every tensor once. `make_linear` makes a layer's matrices; with `keep_codes` those
    that a checkpoint has as codes of four bits stay so. The head and routers, which decide much,
    are plain. Raises WeightError that names the first tensor that is missing, not known, or of a
    wrong shape, before any is read."""
    spec = checkpoint.spec
    source = DeviceSource(checkpoint.source, device)
    read = WeightReader(Checkpoint(spec, source), precision)
    layers, coded = read, None
    if keep_codes and _four_bits(checkpoint):
        assert isinstance(checkpoint.source, QuantizedSource)
        coded = CodedSource(checkpoint.source, device, precision.weights)
        layers = WeightReader(Checkpoint(spec, DeviceSource(coded, device)), NUMBERS)
    build = _Builder(spec, precision.weights, make_linear, coded)
    embedding = read.embedding()
    decoder = DeviceDecoder(
        spec=spec,
        precision=precision,
        embedding=embedding,
        positions=read.positions(),
        layers=tuple(
            build.layer(layer, layers.layer(index)) for index, layer in enumerate(spec.layers)
        ),
        norm=build.norm(read.norm()),
        head=Dense(*read.head(embedding)),
        turns={
            rope: cos_sin_table(rope.table(max_model_len)).to(device.home) for rope in spec.ropes
        },
    )
    device.settle()
    return decoder


def _four_bits(checkpoint: Checkpoint) -> bool:
    """Whether matrices are codes of four bits, whose rows are outputs."""
    source = checkpoint.source
    return (
        isinstance(source, QuantizedSource)
        and not checkpoint.spec.names.transposed
        and any(map(source.has_four_bits, source.shapes))
    )


class _Builder:
    """Makes a decoder's parts of weights as read."""

    def __init__(
        self,
        spec: DecoderSpec,
        dtype: torch.dtype,
        make_linear: MakeLinear,
        coded: CodedSource | None,
    ) -> None:
        """`coded`: the source of matrices that are rows' numbers; none where there are none."""
        self._spec = spec
        self._dtype = dtype
        self._make = make_linear
        self._coded = coded

    def norm(self, weights: NormWeights) -> DeviceNorm:
        return DeviceNorm(self._spec.norm, weights.weight, weights.bias, self._spec.norm_eps)

    def layer(self, spec: LayerSpec, weights: LayerWeights) -> DeviceLayer:
        return DeviceLayer(
            spec=spec,
            attention_norm=self._maybe_norm(weights.attention_norm),
            heads=self._heads(weights.heads),
            output=self._linear(weights.output),
            attention_post_norm=self._maybe_norm(weights.attention_post_norm),
            mlp_norm=self._maybe_norm(weights.mlp_norm),
            mlp=self._mlp(weights.mlp),
            mlp_post_norm=self._maybe_norm(weights.mlp_post_norm),
        )

    def _linear(self, matrix: Matrix) -> Linear:
        weight, bias = matrix
        bias = None if bias is None else bias.to(self._dtype)
        values = self._values(weight)
        if isinstance(values, Weight4):
            return Linear4(values, bias)
        return self._make(values, bias)

    def _plain(self, matrix: Matrix) -> Linear:
        weight, bias = matrix
        values = self._values(weight)
        if isinstance(values, Weight4):
            values = values.dequantized().to(self._dtype)
        return Dense(values, None if bias is None else bias.to(self._dtype))

    def _values(self, weight: Tensor) -> Tensor | Weight4:
        """The matrix that the numbers of its rows stand for, and any other as it is."""
        if self._coded is not None and weight.shape[1] == 1:
            return self._coded.joined(weight)
        return weight.to(self._dtype).contiguous()

    def _stacked(self, weights: Sequence[Tensor]) -> Tensor | Weight4:
        """One matrix for each expert."""
        values = [self._values(weight) for weight in weights]
        coded = [each for each in values if isinstance(each, Weight4)]
        groups = {(each.group, each.order is None) for each in coded}
        if len(coded) == len(values) and groups == {(coded[0].group, True)}:
            return stack4(coded)
        return torch.stack(
            [
                each.dequantized().to(self._dtype) if isinstance(each, Weight4) else each
                for each in values
            ]
        )

    def _maybe_norm(self, weights: NormWeights | None) -> DeviceNorm | None:
        return None if weights is None else self.norm(weights)

    def _heads(self, weights: HeadWeights | LatentWeights) -> Heads:
        spec = self._spec
        if isinstance(weights, HeadWeights):
            return ProjectedHeads(
                spec, self._linear(weights.qkv), weights.query_norm, weights.key_norm
            )
        assert spec.latent is not None, "latent weights have a spec"
        down = weights.query_down
        return LatentHeads(
            spec,
            spec.latent,
            query_down=None if down is None else self._linear(down),
            query_norm=weights.query_norm,
            query_up=self._linear(weights.query_up),
            kv_down=self._linear(weights.kv_down),
            kv_norm=weights.kv_norm,
            kv_up=self._linear(weights.kv_up),
        )

    def _mlp(self, weights: MlpWeights | ExpertWeights) -> Linear:
        if isinstance(weights, ExpertWeights):
            return self._experts(weights)
        if weights.gate is None:
            activation = self._spec.activation.value
            return PlainMlp(self._linear(weights.up), self._linear(weights.down), activation)
        return self._gated(weights)

    def _gated(self, weights: MlpWeights) -> GatedMlp:
        activation = self._spec.activation.value
        return GatedMlp(self._linear(_gate_up(weights)), self._linear(weights.down), activation)

    def _experts(self, weights: ExpertWeights) -> ExpertsMlp:
        assert self._spec.experts is not None, "layers with experts have a spec of them"
        gate = weights.shared_gate
        return ExpertsMlp(
            router=self._plain(weights.router),
            correction=weights.correction,
            routing=routing(self._spec.experts),
            gate_up=self._stacked([_gate_up(expert)[0] for expert in weights.experts]),
            down=self._stacked([expert.down[0] for expert in weights.experts]),
            activation=self._spec.activation.value,
            shared=None if weights.shared is None else self._gated(weights.shared),
            shared_gate=None if gate is None else self._plain(gate),
        )


def _gate_up(weights: MlpWeights) -> Matrix:
    """Both as one matrix, the gate's rows first."""
    assert weights.gate is not None, "a gated MLP has a gate"
    (gate, gate_bias), (up, up_bias) = weights.gate, weights.up
    bias = None
    if gate_bias is not None and up_bias is not None:
        bias = torch.cat((gate_bias, up_bias))
    return torch.cat((gate, up)), bias
