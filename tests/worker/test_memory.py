"""The account of memory: who gets what, and what the process really takes."""

from dataclasses import replace
from types import ModuleType

import pytest

from shoal.worker.config import EngineConfig
from shoal.worker.host import available_memory, usable_cores
from shoal.worker.memory import DEFAULT_KV_ROOM, NotEnoughMemory, plan_memory
from shoal.worker.model.precision import choose_precision
from shoal.worker.model.rope import RopeSpec
from shoal.worker.model.spec import DecoderSpec, LayerSpec

GIB = 1 << 30
SPEC = DecoderSpec(
    architecture="LlamaForCausalLM",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    norm_eps=1e-5,
    layers=(LayerSpec(RopeSpec(10_000.0, 64)),) * 30,
    max_positions=8192,
    tied_embeddings=True,
)
BLOCK_BYTES = 2 * 30 * 3 * 64 * 16 * 2


def plan(config: EngineConfig, available: int = 32 * GIB, dtype: str = "bfloat16"):
    return plan_memory(SPEC, choose_precision(dtype), config, 2048, available, resident=GIB // 2)


def test_block_and_weight_bytes_follow_the_formula() -> None:
    """Keys and values of a block in all layers; packed matrices plus the embedding lookup."""
    matrices = 30 * (576 * (576 * 2 + 192 * 2) + 3 * 576 * 1536)
    embedding, norms = 49152 * 576, 61 * 576
    found = plan(EngineConfig())
    assert found.block_bytes == BLOCK_BYTES
    assert found.weights == 2 * (matrices + 2 * embedding) + 4 * norms
    assert plan(EngineConfig(), dtype="float32").block_bytes == 2 * BLOCK_BYTES
    # float16 keeps its cache and embedding in 2 bytes and its packed matrices in 4.
    half = plan(EngineConfig(), dtype="float16")
    assert half.block_bytes == BLOCK_BYTES
    assert half.weights == 4 * (matrices + embedding) + 2 * embedding + 4 * norms


def test_int8_matrices_take_nine_eighths_of_a_byte() -> None:
    """Codes, and a scale and a sum for every 64 of them; the embedding stays in bfloat16."""
    whole, config = plan(EngineConfig()), EngineConfig(quantization="int8")
    eight = plan_memory(
        SPEC, choose_precision("bfloat16"), config, 2048, 32 * GIB, GIB // 2, native=True
    )
    matrices = 30 * (576 * (576 * 2 + 192 * 2) + 3 * 576 * 1536) + 49152 * 576
    assert whole.weights - eight.weights == matrices * 2 - matrices * 9 // 8


def test_without_a_limit_the_room_is_four_gib_at_most() -> None:
    """On a large machine the cache takes its fraction of 4 GiB; and never more than all sequences
    at full length can use."""
    for fraction in (0.25, 0.9, 1.0):
        found = plan(EngineConfig(kv_cache_memory_fraction=fraction))
        assert found.num_blocks == int(fraction * DEFAULT_KV_ROOM) // BLOCK_BYTES
    assert plan(EngineConfig(max_num_seqs=4)).num_blocks == 4 * 2048 // 16 + 1


def test_a_fraction_of_a_small_machine() -> None:
    """What weights and workspace leave of the memory available, times the fraction."""
    found = plan(EngineConfig(kv_cache_memory_fraction=0.5), available=2 * GIB)
    rest = found.weights + found.activations + found.workspace
    assert found.num_blocks == int(0.5 * (2 * GIB - rest)) // BLOCK_BYTES


@pytest.mark.parametrize("fraction", [0.1, 0.9, 1.0])
def test_a_limit_bounds_the_whole_process(fraction: float) -> None:
    """The cache takes its fraction of what the limit leaves beside everything else, the runtime
    included; all together stay under memory_limit_bytes."""
    found = plan(EngineConfig(memory_limit_bytes=2 * GIB, kv_cache_memory_fraction=fraction))
    room = 2 * GIB - (found.total - found.kv_cache)
    assert found.num_blocks == int(fraction * room) // BLOCK_BYTES
    assert found.total <= 2 * GIB


def test_blocks_by_number_win() -> None:
    """kv_cache_blocks decides alone, up to what can be used."""
    config = EngineConfig(kv_cache_blocks=77, memory_limit_bytes=1)
    assert plan(config).num_blocks == 77
    assert plan(replace(config, kv_cache_blocks=10**9)).num_blocks == 256 * 2048 // 16 + 1


@pytest.mark.parametrize(
    "config", [EngineConfig(memory_limit_bytes=GIB // 2), EngineConfig(kv_cache_blocks=1)]
)
def test_too_little_says_the_sum(config: EngineConfig) -> None:
    """The error holds the setting and every term."""
    with pytest.raises(NotEnoughMemory, match=r"KV blocks: .* is .*runtime 512 .*weights 310 "):
        plan(config)
    with pytest.raises(NotEnoughMemory, match="are available"):
        plan(EngineConfig(), available=GIB // 8)


def test_the_real_model_takes_what_the_plan_says(models: ModuleType) -> None:
    """Packed weights of SmolLM2, counted where they lie."""
    decoder = models.load(models.smollm2_path(), "bfloat16")
    linears = [
        linear
        for layer in decoder.layers
        for linear in (layer.heads.qkv, layer.output, layer.mlp.gate, layer.mlp.up, layer.mlp.down)
    ]
    norms = [decoder.norm, *(n for x in decoder.layers for n in (x.attention_norm, x.mlp_norm))]
    total = sum(linear.nbytes for linear in [*linears, decoder.head])
    total += decoder.embedding.nbytes + sum(norm.weight.nbytes for norm in norms)
    assert total == plan(EngineConfig()).weights


def test_container_limits_count(tmp_path) -> None:
    """A control group's memory and CPU limits lower what the machine offers."""
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    (tmp_path / "memory.current").write_text(f"{GIB // 4}\n")
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert available_memory(tmp_path) == GIB - GIB // 4
    assert usable_cores(tmp_path) == 1
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert available_memory(tmp_path) > GIB // 4
    assert usable_cores(tmp_path) == usable_cores(tmp_path / "absent") >= 1
