"""What a kernel must move and compute at least, and what share of a device's limits it reaches.

Bytes count each operand once: weights, inputs and results of one launch that must cross the
device's memory, none that could stay in its caches. FLOPs count two for a multiply-add. A time at
the limit is the longer of bytes over measured copy bandwidth and FLOPs over the measured rate of
matrix products (Williams et al., "Roofline", 2009).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Work:
    """Of one launch, or of a step."""

    bytes: float
    flops: float = 0.0
    kind: str = "bf16"  # of the products: a key of `Limits.multiply`

    def __add__(self, other: Self) -> "Work":
        """The kind is the first's: sums are of work in one precision."""
        return Work(self.bytes + other.bytes, self.flops + other.flops, self.kind)

    def __mul__(self, times: int) -> "Work":
        return Work(self.bytes * times, self.flops * times, self.kind)


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one device, measured."""

    copy: float  # bytes a second, read and written together
    multiply: Mapping[str, float]  # FLOPs a second by kind of product: bf16, fp8, int8

    def seconds(self, work: Work) -> float:
        """The least time that the work can take."""
        products = work.flops / self.multiply[work.kind] if work.flops else 0.0
        return max(work.bytes / self.copy, products)

    def share(self, work: Work, seconds: float) -> float:
        """1 is the limit."""
        return self.seconds(work) / seconds

    def bound(self, work: Work) -> str:
        """What the work is limited by: memory or products."""
        return "memory" if self.seconds(work) == work.bytes / self.copy else "products"


def norm(rows: int, columns: int, size: int = 2, *, residual: bool = True) -> Work:
    """Reads x and writes it normed; with the residual's sum, reads and writes that as well."""
    return Work((4 if residual else 2) * rows * columns * size)


def rope(rows: int, heads: int, head_dim: int, size: int = 2) -> Work:
    """In place: each head is read and written."""
    return Work(2 * rows * heads * head_dim * size)


def gated(rows: int, inner: int, size: int = 2) -> Work:
    """Reads gate and up, writes their product."""
    return Work(3 * rows * inner * size)


def embed(rows: int, columns: int, size: int = 2) -> Work:
    return Work(2 * rows * columns * size)


def store_kv(tokens: int, kv_heads: int, head_dim: int, size: int = 2, kv_size: int = 2) -> Work:
    """Reads keys and values, writes them as the cache keeps them."""
    elements = 2 * tokens * kv_heads * head_dim
    scales = 2 * tokens * kv_heads * 4 if kv_size == 1 else 0
    return Work(elements * (size + kv_size) + scales)


def attention(
    queries: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    sequences: int = 1,
    size: int = 2,
    kv_size: int = 2,
    window: int | None = None,
) -> Work:
    """Of `sequences` with `queries` tokens each at the end of a context of `length`. Causal: a
    query's products reach as far as it sees; keys and values are read once a sequence."""
    reach = length if window is None else min(length, window + queries - 1)
    first = length - queries + 1  # keys that the first query sees
    if window is None:
        pairs = queries * (first + length) / 2
    else:
        pairs = float(sum(min(first + i, window) for i in range(queries)))
    scales = 2 * reach * kv_heads * 4 if kv_size == 1 else 0
    moved = 2 * queries * heads * head_dim * size + 2 * reach * kv_heads * head_dim * kv_size
    return Work((moved + scales) * sequences, 4 * pairs * heads * head_dim * sequences)


def latent_attention(
    length: int, heads: int, rank: int, rotary: int, *, sequences: int = 1, size: int = 2
) -> Work:
    """One query of each sequence over latents that all heads share (DeepSeek-V2, absorbed)."""
    moved = (length * (rank + rotary) + heads * (2 * rank + rotary)) * size
    return Work(moved * sequences, 2 * length * heads * (2 * rank + rotary) * sequences)


def linear(
    rows: int, outputs: int, inputs: int, *, bits: float = 16, size: int = 2, kind: str = "bf16"
) -> Work:
    """`bits` of a weight, its share of scales included; `size` bytes of an input and a result."""
    moved = outputs * inputs * bits / 8 + rows * (outputs + inputs) * size
    return Work(moved, 2 * rows * outputs * inputs, kind)


def experts(
    rows: int, hidden: int, inner: int, count: int, per_token: int, bits: float = 16
) -> Work:
    """Gate, up and down of the experts that the rows reach if they choose evenly: each expert
    that any row chose is read once."""
    reached = min(count, rows * per_token)
    weights = reached * 3 * hidden * inner * bits / 8
    moved = rows * per_token * (2 * hidden + 3 * inner) * 2
    return Work(weights + moved, 6 * rows * per_token * hidden * inner)


def sampling(rows: int, vocab: int, size: int = 4) -> Work:
    """Reads the logits once."""
    return Work(rows * vocab * size)


def lora(rows: int, hidden: int, columns: int, rank: int, adapters: int) -> Work:
    """Reads x and the adapters in use, reads and writes the output."""
    weights = adapters * rank * (hidden + columns) * 2
    return Work(weights + rows * (hidden + 2 * columns) * 2, 2 * rows * rank * (hidden + columns))


def block_copy(blocks: int, block_bytes: int) -> Work:
    return Work(2 * blocks * block_bytes)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder's sizes, as far as its work depends on them."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @property
    def matrices(self) -> int:
        """Elements of one layer's matrices."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return attention + 3 * self.hidden * self.inner

    @property
    def parameters(self) -> int:
        head = self.vocab * self.hidden
        return self.layers * self.matrices + (head if self.tied else 2 * head)

    @property
    def token_bytes(self) -> int:
        """Of one token in the KV cache, in 16 bits."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2


def decode_step(model: ModelShape, batch: int, context: int) -> Work:
    """One token of each of `batch` sequences of `context`: every matrix and all keys and values
    are read once, which is what bounds it."""
    every = Work(model.layers * model.matrices * 2, 2 * batch * model.layers * model.matrices)
    head = linear(batch, model.vocab, model.hidden)
    seen = attention(1, context, model.heads, model.kv_heads, model.head_dim, sequences=batch)
    return every + head + seen * model.layers


def prefill(model: ModelShape, tokens: int) -> Work:
    """One prompt; its last token alone meets the head."""
    every = Work(model.layers * model.matrices * 2, 2 * tokens * model.layers * model.matrices)
    head = linear(1, model.vocab, model.hidden)
    seen = attention(tokens, tokens, model.heads, model.kv_heads, model.head_dim)
    return every + head + seen * model.layers


LLAMA_8B = ModelShape("Llama-8B", 32, 4096, 14336, 32, 8, 128, 128256, tied=False)
QWEN3_06B = ModelShape("Qwen3-0.6B", 28, 1024, 3072, 16, 8, 128, 151936, tied=True)
