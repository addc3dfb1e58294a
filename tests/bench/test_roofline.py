"""The model of bytes and FLOPs, against figures worked out by hand."""

import pytest

from bench import roofline
from bench.roofline import LLAMA_8B, QWEN3_06B, Limits, Work


def test_parameters_are_those_of_the_published_models() -> None:
    """Norms aside, which are a few thousand: 8.03 and 0.596 billion."""
    assert LLAMA_8B.parameters == pytest.approx(8.030e9, rel=1e-3)
    assert QWEN3_06B.parameters == pytest.approx(0.596e9, rel=1e-3)


def test_a_decode_step_reads_the_weights_and_the_context_once() -> None:
    """Without the embedding, which is gathered: 15 GB and 128 KiB a token of context."""
    short = roofline.decode_step(LLAMA_8B, 1, 128)
    long = roofline.decode_step(LLAMA_8B, 1, 128 + 1000)
    assert short.bytes == pytest.approx(2 * (8.030e9 - 128256 * 4096), rel=2e-3)
    assert long.bytes - short.bytes == 1000 * LLAMA_8B.token_bytes == 1000 * 131072


def test_causal_attention_counts_what_each_query_sees() -> None:
    """Four queries of four keys see ten pairs; two behind a prefix of two see seven; a window of
    two leaves seven of the ten."""
    pair = 4 * 8  # FLOPs of a pair with one head of eight
    assert roofline.attention(4, 4, 1, 1, 8).flops == 10 * pair
    assert roofline.attention(2, 4, 1, 1, 8).flops == 7 * pair
    assert roofline.attention(4, 4, 1, 1, 8, window=2).flops == 7 * pair
    assert roofline.attention(4, 4, 1, 1, 8, window=99) == roofline.attention(4, 4, 1, 1, 8)


def test_a_window_bounds_the_keys_that_are_read() -> None:
    """One query reads its window, not the context; a narrow cache halves the bytes and adds
    scales."""
    plain = roofline.attention(1, 4096, 8, 8, 64, window=128)
    assert plain.bytes == 2 * 8 * 64 * 2 + 2 * 128 * 8 * 64 * 2
    narrow = roofline.attention(1, 4096, 8, 8, 64, window=128, kv_size=1)
    assert narrow.bytes == 2 * 8 * 64 * 2 + 2 * 128 * 8 * (64 + 4)


def test_latents_are_read_once_for_all_heads() -> None:
    """Two heads over three latents of 4 + 2: products with 6 elements and with 4."""
    work = roofline.latent_attention(3, 2, 4, 2, sequences=5)
    assert work.flops == 5 * 3 * 2 * 2 * (6 + 4)
    assert work.bytes == 5 * 2 * (3 * 6 + 2 * (6 + 4))


def test_the_limit_is_the_slower_of_memory_and_products() -> None:
    """A product of one row is bound by its weights, of a thousand rows by arithmetic."""
    limits = Limits(copy=1e12, multiply={"bf16": 1e14})
    row, many = roofline.linear(1, 4096, 4096), roofline.linear(4096, 4096, 4096)
    assert limits.bound(row) == "memory"
    assert limits.bound(many) == "products"
    assert limits.share(row, row.bytes / 1e12) == 1.0
    assert limits.share(many, 2 * many.flops / 1e14) == 0.5


def test_works_add_and_multiply() -> None:
    """Layers are one layer's work so many times."""
    assert Work(1, 2) + Work(3, 4) * 2 == Work(7, 10)


def test_experts_are_read_only_where_a_row_goes() -> None:
    """Two rows of two experts each reach four of 64 at most; many rows reach all."""
    few, many = (roofline.experts(n, 16, 8, 64, 2) for n in (2, 1000))
    assert few.bytes == 4 * 3 * 16 * 8 * 2 + 2 * 2 * (2 * 16 + 3 * 8) * 2
    assert many.bytes == 64 * 3 * 16 * 8 * 2 + 1000 * 2 * (2 * 16 + 3 * 8) * 2
