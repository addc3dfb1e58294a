"""The families that one decoder serves: for each architecture, what its `config.json` says.

An entry states what differs from a Llama. Its defaults are those of the configuration classes of
transformers, since a `config.json` may leave out what equals them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.worker.model import names
from shoal.worker.model.rope import yarn_magnitude
from shoal.worker.model.spec import (
    Activation,
    ExpertsSpec,
    LatentSpec,
    NormKind,
    QkNorm,
    Residual,
    Scoring,
)
from shoal.worker.model.weights import UnsupportedModel, need

Config = Mapping[str, Any]
Fields = dict[str, Any]

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture."""

    models: str  # who is of it, for the documentation
    fields: Callable[[Config], Fields]  # of DecoderSpec, beyond what all read alike
    defaults: Config = field(default_factory=dict)
    # Whether a layer attends within a window, where `layer_types` does not say.
    slides: Callable[[Config, int], bool] = lambda config, index: bool(config.get("sliding_window"))
    # Whether a layer rotates queries and keys.
    rotates: Callable[[Config, int, str], bool] = lambda config, index, kind: True
    # Whether a layer has experts.
    mixes: Callable[[Config, int], bool] = lambda config, index: False
    unscaled_windows: bool = False  # rope scaling is for layers without a window
    interleaved: bool = False  # rows of queries and keys pair elements 2i and 2i + 1


def _llama(config: Config) -> Fields:
    bias = bool(config.get("attention_bias", False))
    return {
        "attention_bias": bias,
        "output_bias": bias,
        "mlp_bias": bool(config.get("mlp_bias", False)),
    }


def _plain(config: Config) -> Fields:
    return {}


def _qwen2(config: Config) -> Fields:
    return {"attention_bias": bool(config.get("qkv_bias", True))}


def _qwen3(config: Config) -> Fields:
    return {**_llama(config), "qk_norm": QkNorm.HEAD}


def _qwen_slides(config: Config, index: int) -> bool:
    if not config.get("use_sliding_window") or not config.get("sliding_window"):
        return False
    return index >= int(config.get("max_window_layers") or 0)


def _smollm3_rotates(config: Config, index: int, kind: str) -> bool:
    flags = config.get("no_rope_layers")
    if flags:
        return bool(flags[index])
    return (index + 1) % int(config.get("no_rope_layer_interval") or 4) != 0


def _phi3(config: Config) -> Fields:
    return {"names": names.PHI3}


def _phi(config: Config) -> Fields:
    if config.get("qk_layernorm"):
        raise UnsupportedModel("qk_layernorm of PhiForCausalLM is not supported")
    return {
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "head_bias": True,
        "gated": False,
        "norm": NormKind.LAYER,
        "residual": Residual.PARALLEL_SHARED,
        "names": names.PHI,
    }


def _gemma(config: Config) -> Fields:
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModel("use_bidirectional_attention is not supported: not a causal decoder")
    return {
        **_llama(config),
        "norm": NormKind.RMS_PLUS_ONE,
        "activation": Activation.GELU_TANH,
        "embedding_scale": float(need(config, "hidden_size")) ** 0.5,
    }


def _gemma2(config: Config) -> Fields:
    return {
        **_gemma(config),
        "activation": activation(config.get("hidden_activation") or "gelu_pytorch_tanh"),
        "post_norm": True,
        "attention_scale": float(config.get("query_pre_attn_scalar") or 256) ** -0.5,
        "attention_softcap": config.get("attn_logit_softcapping"),
        "logit_softcap": config.get("final_logit_softcapping"),
        "names": names.SANDWICH,
    }


def _gemma3(config: Config) -> Fields:
    return {**_gemma2(config), "qk_norm": QkNorm.HEAD, "attention_softcap": None}


def _granite(config: Config) -> Fields:
    return {
        **_llama(config),
        "attention_scale": float(config.get("attention_multiplier", 1.0)),
        "embedding_scale": float(config.get("embedding_multiplier", 1.0)),
        "residual_scale": float(config.get("residual_multiplier", 1.0)),
        "logit_scale": 1.0 / float(config.get("logits_scaling", 1.0)),
    }


def _olmo(config: Config) -> Fields:
    return {
        **_llama(config),
        "norm": NormKind.BARE,
        "norm_eps": 1e-5,
        "clip_qkv": config.get("clip_qkv"),
    }


def _olmo2(config: Config) -> Fields:
    return {
        **_llama(config),
        "pre_norm": False,
        "post_norm": True,
        "qk_norm": QkNorm.ALL_HEADS,
    }


def _starcoder2(config: Config) -> Fields:
    bias = bool(config.get("use_bias", True))
    return {
        "attention_bias": bias,
        "output_bias": bias,
        "mlp_bias": bias,
        "gated": False,
        "norm": NormKind.LAYER,
        "norm_eps": float(config.get("norm_epsilon", 1e-5)),
        "names": names.STARCODER2,
    }


def _stablelm(config: Config) -> Fields:
    if config.get("qk_layernorm"):
        raise UnsupportedModel("qk_layernorm of StableLmForCausalLM is not supported")
    parallel = bool(config.get("use_parallel_residual"))
    return {
        "attention_bias": bool(config.get("use_qkv_bias", False)),
        "norm": NormKind.LAYER,
        "residual": Residual.PARALLEL_SHARED if parallel else Residual.SEQUENTIAL,
    }


def _cohere(config: Config) -> Fields:
    if config.get("use_qk_norm"):
        raise UnsupportedModel("use_qk_norm of CohereForCausalLM is not supported")
    bias = bool(config.get("attention_bias", False))
    return {
        "attention_bias": bias,
        "output_bias": bias,
        "norm": NormKind.LAYER_NO_BIAS,
        "residual": Residual.PARALLEL_SHARED,
        "logit_scale": float(config.get("logit_scale", 0.0625)),
    }


def _gpt2(config: Config) -> Fields:
    if config.get("scale_attn_by_inverse_layer_idx"):
        raise UnsupportedModel("scale_attn_by_inverse_layer_idx is not supported")
    return {
        "num_kv_heads": int(need(config, "num_attention_heads")),
        "intermediate_size": int(config.get("n_inner") or 4 * int(need(config, "hidden_size"))),
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "gated": False,
        "norm": NormKind.LAYER,
        "norm_eps": float(config.get("layer_norm_epsilon", 1e-5)),
        "attention_scale": None if config.get("scale_attn_weights", True) else 1.0,
        "learned_positions": int(need(config, "max_position_embeddings")),
        "names": names.GPT2,
    }


def _neox(config: Config) -> Fields:
    bias = bool(config.get("attention_bias", True))
    parallel = bool(config.get("use_parallel_residual", True))
    return {
        "num_kv_heads": int(need(config, "num_attention_heads")),
        "attention_bias": bias,
        "output_bias": bias,
        "mlp_bias": True,
        "gated": False,
        "norm": NormKind.LAYER,
        "residual": Residual.PARALLEL if parallel else Residual.SEQUENTIAL,
        "names": names.NEOX,
    }


def _experts(config: Config, inner: str, *, renormalize: bool, **more: Any) -> ExpertsSpec:
    count = int(need(config, "num_experts"))
    per_token = int(need(config, "num_experts_per_tok"))
    if not 1 <= per_token <= count:
        raise UnsupportedModel(f"num_experts_per_tok is {per_token}, expected 1 to {count}")
    return ExpertsSpec(count, per_token, int(need(config, inner)), renormalize, **more)


def _mixtral(config: Config) -> Fields:
    return {
        "experts": _experts(config, "intermediate_size", renormalize=True),
        "names": names.MIXTRAL,
    }


def _qwen2_moe(config: Config) -> Fields:
    renormalize = bool(config.get("norm_topk_prob", False))
    return {
        **_qwen2(config),
        "experts": _experts(
            config,
            "moe_intermediate_size",
            renormalize=renormalize,
            shared_inner=int(need(config, "shared_expert_intermediate_size")),
            shared_gate=True,
        ),
    }


def _qwen3_moe(config: Config) -> Fields:
    renormalize = bool(config.get("norm_topk_prob", False))
    experts = _experts(config, "moe_intermediate_size", renormalize=renormalize)
    return {**_qwen3(config), "experts": experts}


def _qwen_mixes(config: Config, index: int) -> bool:
    if index in (config.get("mlp_only_layers") or ()):
        return False
    return (index + 1) % int(config.get("decoder_sparse_step") or 1) == 0


def _olmoe(config: Config) -> Fields:
    renormalize = bool(config.get("norm_topk_prob", False))
    return {
        **_llama(config),
        "qk_norm": QkNorm.ALL_HEADS,
        "clip_qkv": config.get("clip_qkv"),
        "experts": _experts(config, "intermediate_size", renormalize=renormalize),
    }


def _deepseek(config: Config) -> Fields:
    plain, rotary = int(need(config, "qk_nope_head_dim")), int(need(config, "qk_rope_head_dim"))
    scale = (plain + rotary) ** -0.5
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type") or "default") != "default":
        weight = rope.get("mscale_all_dim") or 0
        scale *= yarn_magnitude(float(rope.get("factor") or 1), weight) ** 2 if weight else 1.0
    rank = config.get("q_lora_rank")
    heads = int(need(config, "num_attention_heads"))
    return {
        "attention_bias": bool(config.get("attention_bias", False)),
        "output_bias": bool(config.get("attention_bias", False)),
        "num_kv_heads": heads,
        "head_dim": plain + rotary,
        "attention_scale": scale,
        "latent": LatentSpec(
            query_rank=None if rank is None else int(rank),
            kv_rank=int(need(config, "kv_lora_rank")),
            plain_dim=plain,
            rotary_dim=rotary,
            value_dim=int(need(config, "v_head_dim")),
        ),
        "names": names.DEEPSEEK,
    }


def _deepseek2(config: Config) -> Fields:
    grouped = config.get("topk_method", "greedy") == "group_limited_greedy"
    return {
        **_deepseek(config),
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "experts": _experts(
            config,
            "moe_intermediate_size",
            renormalize=False,
            scale=float(config.get("routed_scaling_factor", 1.0)),
            groups=int(need(config, "n_group")) if grouped else 1,
            groups_kept=int(need(config, "topk_group")) if grouped else 1,
            shared_inner=_shared(config),
        ),
    }


def _deepseek3(config: Config) -> Fields:
    return {
        **_deepseek(config),
        "spare_layers": int(config.get("num_nextn_predict_layers") or 0),
        "experts": _experts(
            config,
            "moe_intermediate_size",
            renormalize=bool(config.get("norm_topk_prob", True)),
            scoring=Scoring.SIGMOID,
            scale=float(config.get("routed_scaling_factor", 2.5)),
            groups=int(config.get("n_group") or 1),
            groups_kept=int(config.get("topk_group") or 1),
            group_best=2,
            correction=True,
            shared_inner=_shared(config),
        ),
    }


def _shared(config: Config) -> int:
    inner = int(need(config, "moe_intermediate_size"))
    return inner * int(config.get("n_shared_experts") or 1)


def _deepseek_mixes(config: Config, index: int) -> bool:
    return index >= int(config.get("first_k_dense_replace") or 0)


_ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
    "relu2": Activation.RELU_SQUARED,
}


def activation(name: str) -> Activation:
    if name not in _ACTIVATIONS:
        known = ", ".join(sorted(_ACTIVATIONS))
        raise UnsupportedModel(f"hidden_act {name} is not supported; known are {known}")
    return _ACTIVATIONS[name]


def _all(config: Config, index: int) -> bool:
    return True


def _never(config: Config, index: int) -> bool:
    return False


_LATENT: Config = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("Llama 2, 3, 3.1, 3.2, SmolLM2, TinyLlama, Yi", _llama),
    "MistralForCausalLM": Family(
        "Mistral 7B, Nemo, Small", _plain, {"sliding_window": 4096, "num_key_value_heads": 8}
    ),
    "Qwen2ForCausalLM": Family(
        "Qwen2, Qwen2.5, QwQ",
        _qwen2,
        {"sliding_window": 4096, "max_window_layers": 28},
        slides=_qwen_slides,
    ),
    "Qwen3ForCausalLM": Family(
        "Qwen3",
        _qwen3,
        {"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
        slides=_qwen_slides,
    ),
    "SmolLM3ForCausalLM": Family(
        "SmolLM3",
        _llama,
        {"tie_word_embeddings": True, "rope_theta": 2e6},
        slides=_never,
        rotates=_smollm3_rotates,
    ),
    "Phi3ForCausalLM": Family("Phi-3, Phi-3.5, Phi-4, Phi-4-mini", _phi3, {"rms_norm_eps": 1e-5}),
    "PhiForCausalLM": Family(
        "Phi-1, Phi-1.5, Phi-2",
        _phi,
        {"hidden_act": "gelu_new", "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5},
    ),
    "GemmaForCausalLM": Family(
        "Gemma, CodeGemma", _gemma, {"tie_word_embeddings": True, "head_dim": 256}
    ),
    "Gemma2ForCausalLM": Family(
        "Gemma 2",
        _gemma2,
        {
            "tie_word_embeddings": True,
            "head_dim": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        slides=lambda config, index: index % 2 == 0,
    ),
    "Gemma3ForCausalLM": Family(
        "Gemma 3, text only (270M, 1B)",
        _gemma3,
        {
            "tie_word_embeddings": True,
            "head_dim": 256,
            "sliding_window": 4096,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        slides=lambda config, index: (
            (index + 1) % int(config.get("sliding_window_pattern") or 6) != 0
        ),
    ),
    "GraniteForCausalLM": Family("Granite 3", _granite),
    "OlmoForCausalLM": Family("OLMo", _olmo),
    "Olmo2ForCausalLM": Family("OLMo 2", _olmo2, {"rms_norm_eps": 1e-5}),
    "Olmo3ForCausalLM": Family(
        "OLMo 3",
        _olmo2,
        {"rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 5e5},
        slides=lambda config, index: (index + 1) % 4 != 0,
        unscaled_windows=True,
    ),
    "Starcoder2ForCausalLM": Family(
        "StarCoder2",
        _starcoder2,
        {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 2},
    ),
    "StableLmForCausalLM": Family(
        "StableLM 2, 3B", _stablelm, {"rms_norm_eps": 1e-5, "partial_rotary_factor": 0.25}
    ),
    "CohereForCausalLM": Family(
        "Command R",
        _cohere,
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 5e5},
        interleaved=True,
    ),
    "Cohere2ForCausalLM": Family(
        "Command R7B, Command A",
        _cohere,
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "sliding_window": 4096},
        slides=lambda config, index: (
            (index + 1) % int(config.get("sliding_window_pattern") or 4) != 0
        ),
        rotates=lambda config, index, kind: kind == SLIDING,
        interleaved=True,
    ),
    "GPT2LMHeadModel": Family(
        "GPT-2, DistilGPT-2",
        _gpt2,
        {"tie_word_embeddings": True, "hidden_act": "gelu_new"},
        rotates=lambda config, index, kind: False,
    ),
    "GPTNeoXForCausalLM": Family(
        "GPT-NeoX, Pythia",
        _neox,
        {"hidden_act": "gelu", "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.25},
    ),
    "MixtralForCausalLM": Family(
        "Mixtral",
        _mixtral,
        {
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_key_value_heads": 8,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
        mixes=_all,
    ),
    "Qwen2MoeForCausalLM": Family(
        "Qwen1.5-MoE, Qwen2-MoE",
        _qwen2_moe,
        {
            "sliding_window": 4096,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "max_window_layers": 28,
        },
        slides=lambda config, index: (
            bool(config.get("use_sliding_window"))
            and index % 2 == 0
            and index < int(config.get("max_window_layers") or 0)
        ),
        mixes=_qwen_mixes,
    ),
    "Qwen3MoeForCausalLM": Family(
        "Qwen3-MoE",
        _qwen3_moe,
        {
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        slides=lambda config, index: bool(config.get("use_sliding_window")),
        mixes=_qwen_mixes,
    ),
    "OlmoeForCausalLM": Family(
        "OLMoE",
        _olmoe,
        {"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8},
        mixes=_all,
    ),
    "DeepseekV2ForCausalLM": Family(
        "DeepSeek-V2, V2-Lite, Coder-V2",
        _deepseek2,
        {**_LATENT, "n_shared_experts": 2},
        mixes=_deepseek_mixes,
        interleaved=True,
    ),
    "DeepseekV3ForCausalLM": Family(
        "DeepSeek-V3, R1",
        _deepseek3,
        {
            **_LATENT,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048,
            "num_nextn_predict_layers": 1,
            "first_k_dense_replace": 3,
            "n_group": 8,
            "topk_group": 4,
        },
        mixes=_deepseek_mixes,
        interleaved=True,
    ),
}
