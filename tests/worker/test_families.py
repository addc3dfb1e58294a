"""Every architecture of the registry against transformers, on tiny random models of its own
configuration class: whole, in chunks, token by token, in batches, and 64 greedy tokens.
"""

import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from shoal.worker.model.families import FAMILIES
from shoal.worker.model.loader import open_checkpoint
from shoal.worker.model.table import models_page
from shoal.worker.model.weight_map import expected_shapes
from shoal.worker.model.weights import WeightError

Changes = dict[str, Any]
BASE: Changes = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
THETA = {"rope_theta": 10_000.0}
YARN = {**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    **THETA,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {
    **THETA,
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 2.0, 4.0, 9.0],
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 21}
BY_TYPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "n_group": 4,
    "topk_group": 2,
}
DEEPSEEK_YARN = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8}

# case: (architecture, configuration class, changes to BASE)
CASES: dict[str, tuple[str, str, Changes]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("LlamaForCausalLM", "LlamaConfig", {"rope_parameters": YARN}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 21}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen2-yarn": ("Qwen2ForCausalLM", "Qwen2Config", {"rope_parameters": YARN}),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 16}),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {"sliding_window": 33}),
    "phi3-long": (
        "Phi3ForCausalLM",
        "Phi3Config",
        {"original_max_position_embeddings": 128, "rope_parameters": LONG},
    ),
    "phi4-mini": (
        "Phi3ForCausalLM",
        "Phi3Config",
        {"rope_parameters": {**THETA, "partial_rotary_factor": 0.75}, "tie_word_embeddings": True},
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", {}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {"head_dim": 12}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {"head_dim": 12, "query_pre_attn_scalar": 20, **MIXED},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {"head_dim": 12, "query_pre_attn_scalar": 20, **MIXED, "rope_parameters": BY_TYPE},
    ),
    "granite": (
        "GraniteForCausalLM",
        "GraniteConfig",
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "logits_scaling": 4.0,
        },
    ),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", {"clip_qkv": 0.5}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {}),
    "olmo3": ("Olmo3ForCausalLM", "Olmo3Config", MIXED),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", {"sliding_window": 21}),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", {"use_qkv_bias": True}),
    "stablelm-parallel": (
        "StableLmForCausalLM",
        "StableLmConfig",
        {"use_parallel_residual": True},
    ),
    "cohere": ("CohereForCausalLM", "CohereConfig", {}),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", {"head_dim": 8, **MIXED}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {}),
    "neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {"rope_parameters": {**THETA, "partial_rotary_factor": 0.25}},
    ),
    "neox-sequential": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {"use_parallel_residual": False},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 5}),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**MOE, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]},
    ),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**MOE, "head_dim": 16, "norm_topk_prob": True, "decoder_sparse_step": 2},
    ),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**MOE, "clip_qkv": 0.5}),
    "deepseek2": (
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        {**DEEPSEEK, "topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0},
    ),
    "deepseek2-lite": (
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        {**DEEPSEEK, "q_lora_rank": None, "rope_parameters": DEEPSEEK_YARN},
    ),
    "deepseek3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**DEEPSEEK, "rope_parameters": DEEPSEEK_YARN},
    ),
}
CHUNKED = ((90,), (1,), (37, 5, 1, 1, 20))


@cache
def tiny(case: str) -> Any:
    """A random model whose biases and norms are not the identities that all begin with."""
    architecture, config_class, changes = CASES[case]
    torch.manual_seed(sum(map(ord, case)))
    config = getattr(transformers, config_class)(**{**BASE, **changes})
    model = getattr(transformers, architecture)(config).eval()
    around_zero = case.startswith("gemma")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name or ".ln_" in name
            centre = 1.0 if norm and name.endswith("weight") and not around_zero else 0.0
            parameter.normal_(centre, 0.25 if norm else 0.15)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.1)
    return model


def prompts(seed: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(BASE["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


def test_every_family_has_an_oracle() -> None:
    """No entry of the registry is without a case, and no case without an entry."""
    assert {architecture for architecture, _, _ in CASES.values()} == set(FAMILIES)


def test_the_page_about_models_is_up_to_date() -> None:
    """docs/models.md is what the registry says."""
    page = Path(__file__).resolve().parents[2] / "docs/models.md"
    assert page.read_text() == models_page(), "run: make generate"


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, models: ModuleType, tmp_path: Path) -> None:
    """At every position in float32: whole, token by token, in uneven chunks, alone and beside
    other sequences; the checkpoint is in shards."""
    model = tiny(case)
    decoder = models.load(models.save(model, tmp_path, shard="60KB"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    sequences = prompts(1, 90, 1, 43)
    wanted = [models.oracle_logits(model, tokens) for tokens in sequences]
    for chunks in CHUNKED:
        found = models.decoder_logits(decoder, sequences, chunks)
        for ours, reference in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=3e-4)
    alone = models.decoder_logits(decoder, sequences[:1], (64, 1))
    torch.testing.assert_close(alone[0], wanted[0], rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_equal_transformers(case: str, models: ModuleType, tmp_path: Path) -> None:
    """64 tokens, each the argmax of transformers' logits on the same text."""
    model = tiny(case)
    decoder = models.load(models.save(model, tmp_path))
    prompt = prompts(2, 30)[0]
    tokens = models.greedy(decoder, prompt, 64)
    predicted = models.oracle_logits(model, prompt + tokens).argmax(-1)
    assert predicted[29:-1].tolist() == tokens


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_near(case: str, models: ModuleType, tmp_path: Path) -> None:
    """Half of all logits move by less than a twentieth of their spread against float32; more where
    rounding may turn a choice of experts."""
    path = models.save(tiny(case), tmp_path)
    tokens = prompts(4, 40)
    decoder = models.load(path)
    exact = models.decoder_logits(decoder, tokens, (30, 1))[0]
    rounded = models.decoder_logits(models.load(path, "bfloat16"), tokens, (30, 1))[0]
    share = 0.05 if decoder.spec.experts is None else 0.15
    assert (rounded - exact).abs().median() < share * exact.std()


@pytest.mark.parametrize("case", ["gpt2", "neox", "qwen3"])
def test_a_bare_decoders_names_are_understood(
    case: str, models: ModuleType, tmp_path: Path
) -> None:
    """Checkpoints without the prefix of the whole model, and with buffers of older versions."""
    path = models.save(tiny(case), tmp_path) / "model.safetensors"
    names = open_checkpoint(tmp_path).spec.names
    tensors = {name.removeprefix(names.prefix): value for name, value in load_file(path).items()}
    first = names.layer.format(0)
    for ignored in names.ignored:
        tensors[f"{first.rstrip('.')}{'' if ignored[0] == '.' else '.'}{ignored}"] = torch.ones(3)
    save_file(tensors, path)
    spec = open_checkpoint(tmp_path).spec
    assert spec.names.prefix == ""
    decoder = models.load(tmp_path)
    tokens = prompts(3, 20)
    wanted = models.oracle_logits(tiny(case), tokens[0])
    ours = models.decoder_logits(decoder, tokens, (20,))[0]
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=3e-4)


def test_layers_that_predict_further_tokens_are_left_out(
    models: ModuleType, tmp_path: Path
) -> None:
    """DeepSeek-V3 stores one behind its last layer."""
    path = models.save(tiny("deepseek3"), tmp_path) / "model.safetensors"
    tensors = load_file(path)
    behind = {
        name.replace("layers.3.", "layers.4."): value.clone() for name, value in tensors.items()
    }
    save_file({**tensors, **behind, "model.layers.4.eh_proj.weight": torch.ones(3)}, path)
    assert models.load(tmp_path).spec.num_layers == 4


@pytest.mark.parametrize("case", CASES)
def test_defaults_are_those_of_transformers(case: str, models: ModuleType, tmp_path: Path) -> None:
    """A config.json that leaves out what equals a default is read as the whole one."""
    path = models.save(tiny(case), tmp_path) / "config.json"
    whole = open_checkpoint(tmp_path).spec
    config = json.loads(path.read_text())
    _, config_class, _ = CASES[case]
    default = getattr(transformers, config_class)()
    stated = ("architectures", "bos_token_id", "eos_token_id")
    kept = {
        key: value
        for key, value in config.items()
        if key in stated or not hasattr(default, key) or getattr(default, key) != value
    }
    path.write_text(json.dumps(kept))
    assert open_checkpoint(tmp_path).spec == whole


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_asked_for_by_name(case: str, models: ModuleType, tmp_path: Path) -> None:
    """Without any one of its tensors a checkpoint is refused, and the message names it."""
    path = models.save(tiny(case), tmp_path) / "model.safetensors"
    spec, tensors = open_checkpoint(tmp_path).spec, load_file(path)
    assert {name: tuple(value.shape) for name, value in tensors.items()} == expected_shapes(spec)
    gone = sorted(tensors)[len(tensors) // 2]
    save_file({name: value for name, value in tensors.items() if name != gone}, path)
    with pytest.raises(WeightError, match=rf"tensor {gone} \[.*\] is missing"):
        models.load(tmp_path)
