"""What a decoder looks like, read from a Hugging Face config or from GGUF metadata."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.worker.model.weights import WeightError


class UnsupportedModel(WeightError):
    """The model needs what Shoal does not have; the message names it and what there is."""


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """All positions divided by `factor`."""

    factor: float

    def apply(self, frequencies: Tensor) -> Tensor:
        return frequencies / self.factor


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Low frequencies divided by `factor`, high ones kept, a ramp between them (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int

    def apply(self, frequencies: Tensor) -> Tensor:
        turns = self.original_positions * frequencies / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = ((turns - self.low_freq_factor) / span).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True, slots=True)
class FactorScaling:
    """Each inverse frequency divided by its own factor, as GGUF files store it."""

    factors: tuple[float, ...]

    def apply(self, frequencies: Tensor) -> Tensor:
        return frequencies / torch.tensor(self.factors, dtype=frequencies.dtype)


RopeScaling = LinearScaling | Llama3Scaling | FactorScaling


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of the first `rotary_dim` elements of every head."""

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None = None

    def inverse_frequencies(self) -> Tensor:
        """[rotary_dim / 2] float64."""
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64) / self.rotary_dim
        frequencies = self.theta**-exponents
        return frequencies if self.scaling is None else self.scaling.apply(frequencies)


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder-only transformer: pre-norm, rotary attention, gated SiLU MLP."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    rope: RopeSpec
    max_positions: int
    tied_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        for name in (*sizes, "num_kv_heads", "head_dim", "max_positions"):
            if getattr(self, name) < 1:
                raise UnsupportedModel(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModel(
                f"num_heads is {self.num_heads}, not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.rope.rotary_dim % 2 or self.rope.rotary_dim > self.head_dim:
            raise UnsupportedModel(
                f"rotary_dim is {self.rope.rotary_dim}, expected an even number up to head_dim "
                f"{self.head_dim}"
            )


def spec_from_hugging_face(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> DecoderSpec:
    """The spec of a `config.json`, with the end tokens of a `generation_config.json` added.

    Raises UnsupportedModel for an architecture, activation or rope scaling that is not known,
    WeightError where a key is missing.
    """
    names = config.get("architectures") or ["(none named)"]
    for name in names:
        if name in _ARCHITECTURES:
            break
    else:
        raise UnsupportedModel(
            f"architecture {', '.join(names)} is not supported yet; known are "
            + ", ".join(sorted(_ARCHITECTURES))
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModel(f"quantization_config.quant_method {method} is not supported yet")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModel(f"hidden_act {activation} is not supported yet; known is silu")
    heads = int(_need(config, "num_attention_heads"))
    hidden = int(_need(config, "hidden_size"))
    head_dim = int(config.get("head_dim") or hidden // heads)
    ends = [*_ids(config.get("eos_token_id")), *_ids((generation or {}).get("eos_token_id"))]
    return DecoderSpec(
        architecture=name,
        vocab_size=int(_need(config, "vocab_size")),
        hidden_size=hidden,
        intermediate_size=int(_need(config, "intermediate_size")),
        num_layers=int(_need(config, "num_hidden_layers")),
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        rms_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_hugging_face_rope(config, head_dim),
        max_positions=int(_need(config, "max_position_embeddings")),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        eos_token_ids=tuple(dict.fromkeys(ends)),
        bos_token_id=next(iter(_ids(config.get("bos_token_id"))), None),
        **_ARCHITECTURES[name](config),
    )


def spec_from_gguf(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: tuple[float, ...] | None = None,
) -> DecoderSpec:
    """The spec of a GGUF file. `shapes` (by Hugging Face names) tells what metadata does not:
    the vocabulary, biases and whether the output has weights of its own."""
    family = metadata.get("general.architecture", "(none named)")
    if family != "llama":
        raise UnsupportedModel(
            f"GGUF architecture {family} is not supported yet; known is llama "
            "(Llama, Mistral, SmolLM2)"
        )
    if metadata.get("llama.expert_count"):
        raise UnsupportedModel("llama.expert_count: mixtures of experts are not supported yet")
    heads = int(_need(metadata, "llama.attention.head_count"))
    hidden = int(_need(metadata, "llama.embedding_length"))
    head_dim = int(metadata.get("llama.attention.key_length") or hidden // heads)
    scaling: RopeScaling | None = None
    kind = metadata.get("llama.rope.scaling.type", "none")
    if rope_factors is not None:
        scaling = FactorScaling(rope_factors)
    elif kind == "linear":
        scaling = LinearScaling(float(_need(metadata, "llama.rope.scaling.factor")))
    elif kind != "none":
        raise UnsupportedModel(f"llama.rope.scaling.type {kind} is not supported yet")
    rotary = int(metadata.get("llama.rope.dimension_count") or head_dim)
    embedding = shapes.get("model.embed_tokens.weight", (0, 0))
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    return DecoderSpec(
        architecture="LlamaForCausalLM",
        vocab_size=embedding[0] or int(_need(metadata, "llama.vocab_size")),
        hidden_size=hidden,
        intermediate_size=int(_need(metadata, "llama.feed_forward_length")),
        num_layers=int(_need(metadata, "llama.block_count")),
        num_heads=heads,
        num_kv_heads=int(metadata.get("llama.attention.head_count_kv") or heads),
        head_dim=head_dim,
        rms_eps=float(_need(metadata, "llama.attention.layer_norm_rms_epsilon")),
        rope=RopeSpec(float(metadata.get("llama.rope.freq_base", 10_000.0)), rotary, scaling),
        max_positions=int(_need(metadata, "llama.context_length")),
        tied_embeddings="lm_head.weight" not in shapes,
        attention_bias="model.layers.0.self_attn.q_proj.bias" in shapes,
        output_bias="model.layers.0.self_attn.o_proj.bias" in shapes,
        mlp_bias="model.layers.0.mlp.up_proj.bias" in shapes,
        sliding_window=metadata.get("llama.attention.sliding_window") or None,
        eos_token_ids=tuple(dict.fromkeys(int(end) for end in ends if end is not None)),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
    )


def _llama(config: Mapping[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {
        "attention_bias": bias,
        "output_bias": bias,
        "mlp_bias": bool(config.get("mlp_bias", False)),
    }


def _mistral(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": config.get("sliding_window") or None}


# What each architecture adds to the keys that all share.
_ARCHITECTURES: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
}


def _hugging_face_rope(config: Mapping[str, Any], head_dim: int) -> RopeSpec:
    """Rope from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    share = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    applied: RopeScaling | None = None
    if kind == "linear":
        applied = LinearScaling(float(_need(scaling, "factor")))
    elif kind == "llama3":
        applied = Llama3Scaling(
            float(_need(scaling, "factor")),
            float(_need(scaling, "low_freq_factor")),
            float(_need(scaling, "high_freq_factor")),
            int(_need(scaling, "original_max_position_embeddings")),
        )
    elif kind != "default":
        raise UnsupportedModel(
            f"rope scaling {kind} is not supported yet; known are default, linear, llama3"
        )
    return RopeSpec(theta, int(head_dim * share), applied)


def _need(values: Mapping[str, Any], key: str) -> Any:
    if values.get(key) is None:
        raise WeightError(f"the model's configuration has no {key}")
    return values[key]


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
