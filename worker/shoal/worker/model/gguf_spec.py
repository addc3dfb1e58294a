"""The spec of a GGUF file of the Llama family."""

from collections.abc import Mapping
from typing import Any

from shoal.worker.model.rope import FactorScaling, LinearScaling, RopeScaling, RopeSpec
from shoal.worker.model.spec import DecoderSpec, LayerSpec
from shoal.worker.model.weights import UnsupportedModel, need


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
    heads = int(need(metadata, "llama.attention.head_count"))
    hidden = int(need(metadata, "llama.embedding_length"))
    head_dim = int(metadata.get("llama.attention.key_length") or hidden // heads)
    scaling: RopeScaling | None = None
    kind = metadata.get("llama.rope.scaling.type", "none")
    if rope_factors is not None:
        scaling = FactorScaling(rope_factors)
    elif kind == "linear":
        scaling = LinearScaling(float(need(metadata, "llama.rope.scaling.factor")))
    elif kind != "none":
        raise UnsupportedModel(f"llama.rope.scaling.type {kind} is not supported yet")
    rotary = int(metadata.get("llama.rope.dimension_count") or head_dim)
    theta = float(metadata.get("llama.rope.freq_base", 10_000.0))
    layer = LayerSpec(
        rope=RopeSpec(theta, rotary, scaling, interleaved=True),
        window=metadata.get("llama.attention.sliding_window") or None,
    )
    embedding = shapes.get("model.embed_tokens.weight", (0, 0))
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    return DecoderSpec(
        architecture="LlamaForCausalLM",
        vocab_size=embedding[0] or int(need(metadata, "llama.vocab_size")),
        hidden_size=hidden,
        intermediate_size=int(need(metadata, "llama.feed_forward_length")),
        layers=(layer,) * int(need(metadata, "llama.block_count")),
        num_heads=heads,
        num_kv_heads=int(metadata.get("llama.attention.head_count_kv") or heads),
        head_dim=head_dim,
        norm_eps=float(need(metadata, "llama.attention.layer_norm_rms_epsilon")),
        max_positions=int(need(metadata, "llama.context_length")),
        tied_embeddings="lm_head.weight" not in shapes,
        attention_bias="model.layers.0.self_attn.q_proj.bias" in shapes,
        output_bias="model.layers.0.self_attn.o_proj.bias" in shapes,
        mlp_bias="model.layers.0.mlp.up_proj.bias" in shapes,
        eos_token_ids=tuple(dict.fromkeys(int(end) for end in ends if end is not None)),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
    )
