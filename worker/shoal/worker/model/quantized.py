"""Quantized safetensors, dequantized as they are read: GPTQ, AWQ, FP8 and compressed-tensors.

A source of packed tensors looks like one of plain weights: a matrix that is stored as codes and
scales appears under its own name and shape. What a format keeps for activations or for a cache is
not looked at: both stay in the model's precision.
"""

import enum
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.worker.model.safetensors import SafetensorsSource
from shoal.worker.model.weights import UnsupportedModel, WeightError

METHODS = ("awq", "compressed-tensors", "fp8", "gptq")
_WORD = 32  # bits of an integer that codes are packed into
_PACKED_BITS = (2, 4, 8)
# Column of an AWQ word's nibbles, lowest first, is 0 2 4 6 1 3 5 7; this is the way back.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
# Scales of activations and of the cache.
_UNUSED = ("input_scale", "output_scale", "input_zero_point", ".k_scale", ".v_scale", ".q_scale")

Shape = tuple[int, ...]


class FourBits(enum.Enum):
    """How codes of four bits are packed, for who computes with them as they are."""

    GPTQ = enum.auto()
    GPTQ_2 = enum.auto()  # the second version of the format
    AWQ = enum.auto()
    COMPRESSED = enum.auto()  # pack-quantized


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one format stores a matrix `p.weight` [outputs, inputs]."""

    main: str  # the end of the name of the tensor that holds the codes: `p` and this
    parts: tuple[str, ...]  # ends of the others, of which the first must be there
    # The matrix's shape, of the shape of the codes and the prefix.
    shape: Callable[[Shape, str], Shape]
    dequantize: Callable[[Mapping[str, Tensor]], Tensor]  # tensors by the ends of their names
    four_bits: FourBits | None = None  # None: codes are of another size


class QuantizedSource:
    """Implements `shoal.worker.model.weights.WeightSource`."""

    def __init__(
        self, source: SafetensorsSource, scheme: Scheme, expected: Collection[str]
    ) -> None:
        """`expected`: the names that the model has. Biases beside codes that it does not have are
        left out where they are zero, as some writers of GPTQ add them to every layer."""
        self.origin = source.origin
        self._source = source
        self._scheme = scheme
        stored = source.shapes
        self._prefixes = {
            f"{prefix}.weight": prefix
            for name in stored
            if (prefix := name.removesuffix(scheme.main)) != name
            and f"{prefix}{scheme.parts[0]}" in stored
        }
        packed = {
            f"{prefix}{end}"
            for prefix in self._prefixes.values()
            for end in (scheme.main, *scheme.parts)
        }
        shapes = {
            name: shape
            for name, shape in stored.items()
            if name not in packed and not name.endswith(_UNUSED)
        }
        for prefix in self._prefixes.values():
            bias = f"{prefix}.bias"
            if bias in shapes and bias not in expected and not source.raw(bias).any():
                del shapes[bias]
        for name, prefix in self._prefixes.items():
            shapes[name] = scheme.shape(stored[f"{prefix}{scheme.main}"], prefix)
        self.shapes: Mapping[str, Shape] = shapes

    @property
    def bytes_read(self) -> int:
        return self._source.bytes_read

    def read(self, name: str) -> Tensor:
        """float32 where it was quantized, else as stored."""
        if (prefix := self._prefixes.get(name)) is None:
            return self._source.read(name)
        tensors = self._stored(prefix)
        try:
            return self._scheme.dequantize(tensors).contiguous()
        except RuntimeError as error:
            found = ", ".join(f"{prefix}{end} {list(t.shape)}" for end, t in tensors.items())
            raise WeightError(
                f"{self.origin}: {found} do not fit each other, expected those of "
                f"{name} {list(self.shapes[name])}"
            ) from error

    def has_four_bits(self, name: str) -> bool:
        """Whether a matrix is stored as codes of four bits."""
        return self._scheme.four_bits is not None and name in self._prefixes

    def four_bits(self, name: str) -> tuple[FourBits, Mapping[str, Tensor]]:
        """The stored tensors of such a matrix, by the ends of their names."""
        assert self._scheme.four_bits is not None, "other codes are read dequantized"
        return self._scheme.four_bits, self._stored(self._prefixes[name])

    def _stored(self, prefix: str) -> dict[str, Tensor]:
        ends = [end for end in self._scheme.parts if f"{prefix}{end}" in self._source.shapes]
        return {end: self._source.raw(f"{prefix}{end}") for end in (self._scheme.main, *ends)}

    def read_runs(self, name: str, dim: int, runs: Sequence[tuple[int, int]]) -> Tensor:
        """As of other sources; a quantized matrix is read whole."""
        if name not in self._prefixes:
            return self._source.read_runs(name, dim, runs)
        whole = self.read(name)
        return torch.cat([whole.narrow(dim, first, end - first) for first, end in runs], dim)


def quantized_source(
    config: Mapping[str, Any], source: SafetensorsSource, expected: Collection[str]
) -> QuantizedSource:
    """The source under a `quantization_config`, for a model of the `expected` names. Raises
    UnsupportedModel for a method or an option that is not known."""
    method = str(config.get("quant_method", "(none named)"))
    if method == "gptq":
        scheme = _gptq(config)
    elif method == "awq":
        scheme = _awq(config)
    elif method == "fp8":
        scheme = _fp8(config)
    elif method == "compressed-tensors":
        scheme = _compressed(config, source)
    else:
        raise UnsupportedModel(
            f"quantization_config.quant_method {method} is not supported; known are "
            + ", ".join(METHODS)
        )
    return QuantizedSource(source, scheme, expected)


def unpack(words: Tensor, bits: int, dim: int) -> Tensor:
    """The unsigned codes packed into int32 words along a dimension, lowest bits first.

    words [..., n, ...] int32 -> [..., n * 32 / bits, ...] int32.
    """
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
    view = [1] * (words.dim() + 1)
    view[dim + 1] = len(shifts)
    codes = (words.unsqueeze(dim + 1) >> shifts.view(view)) & ((1 << bits) - 1)
    return codes.flatten(dim, dim + 1)


def _gptq(config: Mapping[str, Any]) -> Scheme:
    """Frantar et al., "GPTQ", 2022, as AutoGPTQ stores it: codes packed along the inputs, zeros
    along the outputs and one too small, except in the second version of the format."""
    bits = _bits(config, "bits")
    shift = 0 if config.get("checkpoint_format") == "gptq_v2" else 1

    def dequantize(parts: Mapping[str, Tensor]) -> Tensor:
        codes = unpack(parts[".qweight"], bits, 0)
        zeros = (unpack(parts[".qzeros"], bits, 1) + shift) & ((1 << bits) - 1)
        scales = parts[".scales"].float()
        if (group := parts.get(".g_idx")) is None:
            size = len(codes) // len(scales)
            group = torch.arange(len(codes)) // size
        row = group.long()
        return ((codes - zeros[row, : codes.shape[1]]) * scales[row]).t()

    return Scheme(
        ".qweight",
        (".scales", ".qzeros", ".g_idx"),
        lambda shape, prefix: (shape[1], shape[0] * _WORD // bits),
        dequantize,
        (FourBits.GPTQ if shift else FourBits.GPTQ_2) if bits == 4 else None,
    )


def _awq(config: Mapping[str, Any]) -> Scheme:
    """Lin et al., "AWQ", 2023, in AutoAWQ's `gemm` layout: codes and zeros packed along the
    outputs, columns of a word interleaved."""
    bits = _bits(config, "bits", known=(4,))
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise UnsupportedModel(f"quantization_config.version {version} of awq is not supported yet")

    def columns(words: Tensor) -> Tensor:
        nibbles = unpack(words, bits, 1).view(len(words), -1, len(_AWQ_ORDER))
        return nibbles[:, :, list(_AWQ_ORDER)].flatten(1)

    def dequantize(parts: Mapping[str, Tensor]) -> Tensor:
        codes, zeros = columns(parts[".qweight"]), columns(parts[".qzeros"])
        scales = parts[".scales"].float()
        row = torch.arange(len(codes)) // (len(codes) // len(scales))
        return ((codes - zeros[row]) * scales[row]).t()

    return Scheme(
        ".qweight",
        (".scales", ".qzeros"),
        lambda shape, prefix: (shape[1] * _WORD // bits, shape[0]),
        dequantize,
        FourBits.AWQ,
    )


def _fp8(config: Mapping[str, Any]) -> Scheme:
    """Eight-bit floats with a scale for each block of the matrix (DeepSeek-V3), for each output,
    or for all of it."""
    block = config.get("weight_block_size")
    end = ".weight_scale" if block is None else ".weight_scale_inv"

    def dequantize(parts: Mapping[str, Tensor]) -> Tensor:
        codes, scales = parts[".weight"].float(), parts[end].float()
        if block is not None:
            return codes * _spread(scales, codes.shape, (int(block[0]), int(block[1])))
        return codes * (scales.view(-1, 1) if scales.numel() == len(codes) else scales)

    return Scheme(".weight", (end,), lambda shape, prefix: shape, dequantize)


def _compressed(config: Mapping[str, Any], source: SafetensorsSource) -> Scheme:
    """compressed-tensors: signed codes, or codes packed along the inputs with half of their range
    added; a scale for each output, group of inputs, block, or for all."""
    groups = list((config.get("config_groups") or {}).values())
    weights = [group.get("weights") or {} for group in groups]
    if not weights or any(other != weights[0] for other in weights):
        raise UnsupportedModel(
            "quantization_config.config_groups has several kinds of weights, expected one"
        )
    kind = str(groups[0].get("format") or config.get("format") or "")
    strategy = str(weights[0].get("strategy") or "tensor")
    block = weights[0].get("block_structure") if strategy == "block" else None
    packed = kind == "pack-quantized"
    if not packed and kind not in ("float-quantized", "int-quantized", "naive-quantized"):
        raise UnsupportedModel(
            f"quantization_config.format {kind} is not supported; known are float-quantized, "
            "int-quantized, naive-quantized, pack-quantized"
        )
    bits = _bits(weights[0], "num_bits", known=(4, 8) if packed else (8,))
    half = 1 << (bits - 1)

    def dequantize(parts: Mapping[str, Tensor]) -> Tensor:
        scales = parts[".weight_scale"].float()
        zeros = parts.get(".weight_zero_point")
        if packed:
            rows, inputs = parts[".weight_shape"].tolist()
            codes = (unpack(parts[".weight_packed"], bits, 1)[:, :inputs] - half).float()
            if zeros is not None:
                zeros = unpack(zeros, bits, 0)[:rows] - half
        else:
            codes = parts[".weight"].float()
        if block is not None:
            return codes * _spread(scales, codes.shape, (int(block[0]), int(block[1])))
        if scales.dim() < 2:
            scales = scales.view(-1, 1)
            zeros = None if zeros is None else zeros.view(-1, 1)
        group = parts.get(".weight_g_idx")
        if group is not None and not bool((group < 0).any()):
            column = group.long()
        else:
            column = torch.arange(codes.shape[1]) // -(-codes.shape[1] // scales.shape[1])
        if zeros is not None:
            codes = codes - zeros.float()[:, column]
        return codes * scales[:, column]

    def shape(stored: Shape, prefix: str) -> Shape:
        if not packed:
            return stored
        found = source.raw(f"{prefix}.weight_shape").tolist()
        return (int(found[0]), int(found[1]))

    if packed:
        parts = (".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx")
        four = FourBits.COMPRESSED if bits == 4 and block is None else None
        return Scheme(".weight_packed", parts, shape, dequantize, four)
    return Scheme(".weight", (".weight_scale", ".weight_zero_point"), shape, dequantize)


def _spread(scales: Tensor, shape: Sequence[int], block: tuple[int, int]) -> Tensor:
    """A scale for each element, of one for each block, the last blocks cut off."""
    rows = scales.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]


def _bits(config: Mapping[str, Any], key: str, known: tuple[int, ...] = _PACKED_BITS) -> int:
    bits = int(config.get(key) or 0)
    if bits not in known:
        expected = ", ".join(map(str, known))
        raise UnsupportedModel(f"quantization_config.{key} is {bits}, expected one of {expected}")
    return bits
