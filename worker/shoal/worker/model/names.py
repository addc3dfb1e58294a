"""What checkpoints call the tensors of a decoder, family by family."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace


class Fused(enum.Enum):
    """How one stored matrix holds queries, keys and values."""

    STACKED = enum.auto()  # all queries, all keys, all values
    BY_HEAD = enum.auto()  # query, key and value of the first head, then of the second


@dataclass(frozen=True, slots=True)
class Names:
    """Names without `.weight` and `.bias`. Those of a layer come after `layer`, those of an
    expert after `expert` too; a family that does not have a tensor leaves its name alone."""

    prefix: str = "model."
    embedding: str = "embed_tokens"
    positions: str = "embed_positions"
    norm: str = "norm"
    layer: str = "layers.{}."
    head: str = "lm_head"  # without the prefix
    attention_norm: str = "input_layernorm"
    attention_post_norm: str = "post_attention_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    mlp_post_norm: str = "post_feedforward_layernorm"
    queries: str = "self_attn.q_proj"
    keys: str = "self_attn.k_proj"
    values: str = "self_attn.v_proj"
    fused: Fused | None = None
    fused_name: str = "self_attn.qkv_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    gate_up: str | None = None  # gate and up in one matrix
    router: str = "mlp.gate"
    expert: str = "mlp.experts.{}."
    expert_gate: str = "gate_proj"
    expert_up: str = "up_proj"
    expert_down: str = "down_proj"
    shared: str = "mlp.shared_expert."
    shared_gate: str = "mlp.shared_expert_gate"
    # A layer's matrices are stored [inputs, outputs].
    transposed: bool = False
    # Ends of names of tensors that hold nothing a decoder needs, as older checkpoints do.
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)

    def top(self, name: str) -> str:
        """The whole name of `embedding`, `positions` or `norm`."""
        return f"{self.prefix}{name}"

    def of_layer(self, index: int) -> str:
        """What the names of a layer begin with."""
        return f"{self.prefix}{self.layer.format(index)}"

    def fitted(self, shapes: Mapping[str, tuple[int, ...]]) -> "Names":
        """These names without their prefix, where a checkpoint of the bare decoder leaves it
        out."""
        bare = f"{self.embedding}.weight"
        if self.top(bare) not in shapes and bare in shapes:
            return replace(self, prefix="")
        return self


LLAMA = Names()
PHI3 = replace(LLAMA, fused=Fused.STACKED, gate_up="mlp.gate_up_proj")
SANDWICH = replace(LLAMA, mlp_norm="pre_feedforward_layernorm")  # Gemma 2 and 3
PHI = replace(
    LLAMA,
    norm="final_layernorm",
    output="self_attn.dense",
    up="mlp.fc1",
    down="mlp.fc2",
)
STARCODER2 = replace(LLAMA, up="mlp.c_fc", down="mlp.c_proj")
GPT2 = Names(
    prefix="transformer.",
    embedding="wte",
    positions="wpe",
    norm="ln_f",
    layer="h.{}.",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    fused=Fused.STACKED,
    fused_name="attn.c_attn",
    output="attn.c_proj",
    up="mlp.c_fc",
    down="mlp.c_proj",
    transposed=True,
    ignored=(".attn.bias", ".attn.masked_bias"),
)
NEOX = Names(
    prefix="gpt_neox.",
    embedding="embed_in",
    norm="final_layer_norm",
    head="embed_out",
    fused=Fused.BY_HEAD,
    fused_name="attention.query_key_value",
    output="attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    ignored=("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
)
MIXTRAL = replace(
    LLAMA,
    router="block_sparse_moe.gate",
    expert="block_sparse_moe.experts.{}.",
    expert_gate="w1",
    expert_up="w3",
    expert_down="w2",
)
DEEPSEEK = replace(LLAMA, shared="mlp.shared_experts.")
