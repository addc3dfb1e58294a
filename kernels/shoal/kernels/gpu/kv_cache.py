"""A layer's paged KV cache on the device, and the kernel that writes a step's tokens into it.

Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
2023: a sequence's keys and values lie in blocks that a table lists. Block 0 is nobody's.
"""

from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.gpu.checks import expect, expect_together
from shoal.kernels.gpu.quantize import FLOATS, FP8_LIMIT, INT8_LIMIT, SMALLEST, encode
from shoal.kernels.gpu.variant import Variant

QUANTIZED = (torch.float8_e4m3fn, torch.int8)
LIMITS = {torch.int8: INT8_LIMIT, torch.float8_e4m3fn: FP8_LIMIT}
_SMALLEST = tl.constexpr(SMALLEST)
# Rows of one program, in elements: enough for every thread to move 16 bytes or more.
_ELEMENTS = 2048


@dataclass(frozen=True, slots=True)
class KvCache:
    """Keys and values of one layer. A quantized row times its scale is the key or value."""

    keys: Tensor  # [num_blocks, kv_heads, block_size, head_dim] bf16, fp16, fp32, e4m3 or int8
    values: Tensor  # like keys, with the same strides
    key_scales: Tensor | None = None  # [num_blocks, kv_heads, block_size] float32, if quantized
    value_scales: Tensor | None = None  # like key_scales

    @classmethod
    def allocate(
        cls,
        num_blocks: int,
        kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Self:
        if dtype not in FLOATS + QUANTIZED:
            known = ", ".join(str(each) for each in FLOATS + QUANTIZED)
            raise ValueError(f"a KV cache of {dtype} is not supported, choose one of {known}")
        shape = (num_blocks, kv_heads, block_size, head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        if dtype in FLOATS:
            return cls(keys, values)
        scales = [torch.zeros(shape[:3], dtype=torch.float32, device=device) for _ in range(2)]
        return cls(keys, values, *scales)

    def check(self) -> None:
        """Raises ValueError for tensors that no kernel can take as one cache."""
        expect("cache.keys", self.keys, (None,) * 4, FLOATS + QUANTIZED, dense=2)
        expect("cache.values", self.values, tuple(self.keys.shape), self.keys.dtype, dense=2)
        if self.keys.stride() != self.values.stride():
            raise ValueError(
                f"cache.values has strides {list(self.values.stride())}, expected those of "
                f"cache.keys, {list(self.keys.stride())}"
            )
        expect_together(keys=self.keys, values=self.values)
        for name, scales in (("key_scales", self.key_scales), ("value_scales", self.value_scales)):
            if (scales is not None) != (self.keys.dtype in QUANTIZED):
                given = "none" if scales is None else "some"
                raise ValueError(
                    f"cache.{name}: {given} given with keys of {self.keys.dtype}; a cache has "
                    f"scales if and only if it is quantized"
                )
            if scales is not None:
                expect(f"cache.{name}", scales, self.keys.shape[:3], torch.float32, dense=3)
                expect_together(keys=self.keys, scales=scales)


def store_kv(keys: Tensor, values: Tensor, cache: KvCache, slots: Tensor) -> None:
    """Writes the step's keys and values, quantized where the cache is.

    keys, values [tokens, kv_heads, head_dim] float, dense in the last dimension; slots [tokens]
    int64: block * block_size + offset, or negative for a token that is not stored. A slot
    occurs once. A float16 cache saturates; int8 and e4m3 take a scale per token and head, the
    row's largest magnitude over the type's, which is NaN where the row has one.
    """
    cache.check()
    _, kv_heads, _, head_dim = cache.keys.shape
    tokens = keys.shape[0]
    for name, heads in (("keys", keys), ("values", values)):
        expect(name, heads, (tokens, kv_heads, head_dim), FLOATS)
    expect("slots", slots, (tokens,), torch.int64)
    expect_together(keys=keys, values=values, slots=slots, cache=cache.keys)
    _launch(keys, values, cache.keys, cache.values, cache.key_scales, cache.value_scales, slots)


def store_latent(latent: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Writes the latent rows of multi-head latent attention.

    latent [tokens, width] float; cache [num_blocks, block_size, width] float; slots as for
    `store_kv`.
    """
    expect("cache", cache, (None, None, None), FLOATS, dense=2)
    tokens, width = latent.shape[0], cache.shape[2]
    expect("latent", latent, (tokens, width), FLOATS)
    expect("slots", slots, (tokens,), torch.int64)
    expect_together(latent=latent, slots=slots, cache=cache)
    _launch(latent.unsqueeze(1), None, cache.unsqueeze(1), None, None, None, slots)


def _launch(
    keys: Tensor,
    values: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor | None,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    slots: Tensor,
) -> None:
    tokens, kv_heads, head_dim = keys.shape
    if not tokens:
        return
    dims = triton.next_power_of_2(head_dim)
    heads = min(triton.next_power_of_2(kv_heads), max(1, _ELEMENTS // dims))
    value_strides = (0, 0) if values is None else values.stride()[:2]
    _store[(tokens, triton.cdiv(kv_heads, heads), 1 if values is None else 2)](
        keys,
        values,
        as_bytes(key_cache),
        None if value_cache is None else as_bytes(value_cache),
        key_scales,
        value_scales,
        slots,
        kv_heads,
        *keys.stride()[:2],
        *value_strides,
        *key_cache.stride()[:2],
        LIMIT=LIMITS.get(key_cache.dtype),
        BLOCK_SIZE=key_cache.shape[2],
        HEAD_DIM=head_dim,
        HEADS=heads,
        DIMS=dims,
        num_warps=4,
    )


def as_bytes(cache: Tensor) -> Tensor:
    """float8 as bytes, which every device stores; anything else as it is."""
    return cache.view(torch.uint8) if cache.dtype is torch.float8_e4m3fn else cache


@triton.jit
def _store(
    keys,  # [tokens, kv_heads, HEAD_DIM]
    values,  # like keys, or none
    key_cache,  # [blocks, kv_heads, BLOCK_SIZE, HEAD_DIM]
    value_cache,
    key_scales,  # [blocks, kv_heads, BLOCK_SIZE] or none
    value_scales,
    slots,  # [tokens]
    kv_heads,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    block_stride,
    head_stride,
    LIMIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    target = block * block_stride + heads * head_stride + offset * HEAD_DIM
    scale = (block * kv_heads + heads) * BLOCK_SIZE + offset
    inside = heads < kv_heads
    dims = tl.arange(0, DIMS)[None, :]
    mask = inside[:, None] & (dims < HEAD_DIM)
    if tl.program_id(2) == 0:
        source = token * key_stride + heads * key_head_stride
        x = tl.load(keys + source[:, None] + dims, mask=mask, other=0.0)
        put_rows(x, key_cache, target, key_scales, scale, inside, LIMIT, HEAD_DIM, DIMS)
    elif values is not None:
        source = token * value_stride + heads * value_head_stride
        x = tl.load(values + source[:, None] + dims, mask=mask, other=0.0)
        put_rows(x, value_cache, target, value_scales, scale, inside, LIMIT, HEAD_DIM, DIMS)


@triton.jit
def put_rows(
    x,  # [heads, DIMS], zeros from HEAD_DIM on
    targets,
    target,  # [heads] offset of each row
    scales,
    scale,  # [heads] place of its scale
    inside,  # [heads] whether it is stored
    LIMIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Stores rows of a tile, quantized by LIMIT unless that is none."""
    dims = tl.arange(0, DIMS)
    mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    if LIMIT is not None:
        x = x.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(x), 1), _SMALLEST)
        # A maximum passes over NaN, and codes have none to tell of it.
        broken = tl.max((x != x).to(tl.int32), 1) > 0
        tl.store(scales + scale, tl.where(broken, float("nan"), largest / LIMIT), mask=inside)
        x = x * (LIMIT / largest)[:, None]
        x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
        x = encode(x, targets.dtype.element_ty == tl.int8, False)
    elif targets.dtype.element_ty == tl.float16:
        x = tl.clamp(x.to(tl.float32), -65504.0, 65504.0, tl.PropagateNan.ALL).to(tl.float16)
    else:
        x = x.to(targets.dtype.element_ty)
    tl.store(targets + target[:, None] + dims[None, :], x, mask=mask)


def variants() -> tuple[Variant, ...]:
    """One of each kind of store."""
    ints = ("key_stride", "key_head_stride", "value_stride", "value_head_stride")
    aligned = ("keys", "values", "key_cache", "value_cache", *ints, "block_stride", "head_stride")

    def variant(name: str, cache: str, limit: float | None, head_dim: int, heads: int) -> Variant:
        scales = ("key_scales", "value_scales")
        return Variant(
            name=f"store_kv {name} d{head_dim}",
            kernel=_store,
            signature={
                **dict.fromkeys(("keys", "values"), "*bf16"),
                **dict.fromkeys(("key_cache", "value_cache"), cache),
                **({} if limit is None else dict.fromkeys(scales, "*fp32")),
                "slots": "*i64",
                **dict.fromkeys(("kv_heads", *ints, "block_stride", "head_stride"), "i32"),
            },
            constants={
                **(dict.fromkeys(scales) if limit is None else {}),
                "LIMIT": limit,
                "BLOCK_SIZE": 16,
                "HEAD_DIM": head_dim,
                "HEADS": heads,
                "DIMS": triton.next_power_of_2(head_dim),
            },
            aligned=aligned,
        )

    return (
        variant("bf16", "*bf16", None, 128, 8),
        variant("fp16", "*fp16", None, 96, 16),
        variant("int8", "*i8", INT8_LIMIT, 128, 8),
        variant("e4m3", "*u8", FP8_LIMIT, 256, 8),
    )
