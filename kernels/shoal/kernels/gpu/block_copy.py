"""Moves KV blocks between places: to pinned host memory, back, or within the device.

A block's keys, values and scales lie in as many tensors as the cache of all layers has; one
launch copies every block of a list in all of them, so a swap costs one launch whatever the
number of layers (Kwon et al., PagedAttention, 2023, section 4.5). The device reads and writes
pinned host memory through its own address (unified addressing).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.gpu.checks import expect, expect_together
from shoal.kernels.gpu.variant import Variant

_WORD = 8  # bytes of an element that the kernel moves
_WIDE = 16  # bytes that a thread moves at once where everything is a multiple of them
_WORDS = 1024  # of one program


@dataclass(frozen=True, slots=True)
class BlockStore:
    """Tensors that hold the same blocks, each a part of them: layers' keys, values, scales."""

    tensors: tuple[Tensor, ...]  # each [num_blocks, ...], a block's part without gaps
    addresses: Tensor  # [tensors] int64 on the device that copies
    strides: Tensor  # [tensors] int64, bytes from block to block
    sizes: tuple[int, ...]  # bytes of a block in each tensor
    lengths: Tensor  # [tensors] int64, the same on the device
    wide: bool  # addresses, strides and sizes are multiples of 16

    @classmethod
    def of(cls, tensors: Sequence[Tensor], device: torch.device) -> Self:
        """A store for copies by `device`; a tensor lies there or in pinned host memory.

        Raises ValueError where a tensor lies elsewhere, a block's part has gaps, or its address
        or bytes are no multiple of 8.
        """
        for place, tensor in enumerate(tensors):
            _check(f"tensors[{place}]", tensor, tensors[0], device)
        sizes = tuple(tensor[0].numel() * tensor.element_size() for tensor in tensors)
        steps = [tensor.stride(0) * tensor.element_size() for tensor in tensors]
        numbers = torch.tensor([[tensor.data_ptr() for tensor in tensors], steps, sizes])
        wide = not bool((numbers % _WIDE).any())
        addresses, strides, lengths = numbers.to(device)
        return cls(tuple(tensors), addresses, strides, sizes, lengths, wide)

    @property
    def num_blocks(self) -> int:
        return len(self.tensors[0])

    def on_host(self, num_blocks: int) -> Self:
        """A store in pinned host memory with room for so many blocks of the same parts."""
        device = self.addresses.device
        pinned = device.type == "cuda"
        tensors = [
            torch.zeros(num_blocks, *tensor.shape[1:], dtype=tensor.dtype, pin_memory=pinned)
            for tensor in self.tensors
        ]
        return type(self).of(tensors, device)


def _check(name: str, tensor: Tensor, first: Tensor, device: torch.device) -> None:
    expect(name, tensor, (len(first), *(None,) * (tensor.dim() - 1)), tensor.dtype)
    reached = tensor.device == device or (tensor.device.type == "cpu" and tensor.is_pinned())
    if not reached:
        raise ValueError(f"{name} is on {tensor.device}, expected {device} or pinned host memory")
    if not tensor[0].is_contiguous():
        raise ValueError(
            f"{name} has strides {list(tensor.stride())}, expected blocks without gaps"
        )
    part = tensor[0].numel() * tensor.element_size()
    step = tensor.stride(0) * tensor.element_size()
    for what, number in (("address", tensor.data_ptr()), ("part of a block", part), ("step", step)):
        if number % _WORD:
            raise ValueError(f"{name} has a {what} of {number} bytes, no multiple of {_WORD}")


@triton.jit
def _copy_kernel(
    sources_ptr,  # [tensors] addresses
    source_strides_ptr,
    targets_ptr,
    target_strides_ptr,
    lengths_ptr,  # [tensors] bytes of a block
    pairs_ptr,  # [pairs, 2] block of the source, block of the target
    WORDS: tl.constexpr,
    WIDE: tl.constexpr,  # everything is a multiple of 16 bytes
):
    pair, tensor = tl.program_id(0), tl.program_id(1)
    source_block = tl.load(pairs_ptr + 2 * pair)
    target_block = tl.load(pairs_ptr + 2 * pair + 1)
    word = tl.program_id(2) * WORDS + tl.arange(0, WORDS)
    words = tl.load(lengths_ptr + tensor) // 8
    if source_block < 0:
        return
    source = tl.load(sources_ptr + tensor)
    source += source_block * tl.load(source_strides_ptr + tensor)
    target = tl.load(targets_ptr + tensor)
    target += target_block * tl.load(target_strides_ptr + tensor)
    source_at = source.to(tl.pointer_type(tl.int64))
    target_at = target.to(tl.pointer_type(tl.int64))
    if WIDE:
        source_at = tl.multiple_of(source_at, 16)
        target_at = tl.multiple_of(target_at, 16)
        words = tl.multiple_of(words, 2)
    inside = word < words
    tl.store(target_at + word, tl.load(source_at + word, mask=inside), mask=inside)


def copy_blocks_reference(source: BlockStore, target: BlockStore, pairs: Tensor) -> None:
    """What `copy_blocks` does, pair by pair."""
    for given, taken in zip(source.tensors, target.tensors, strict=True):
        for read, written in pairs.tolist():
            if read >= 0:
                taken[written] = given[read].to(taken.device)


def copy_blocks(source: BlockStore, target: BlockStore, pairs: Tensor) -> None:
    """Copies block pairs[i, 0] of the source to block pairs[i, 1] of the target, in every tensor.

    pairs [n, 2] int64 on the device, each within its store; a negative source skips the pair
    (lists of a fixed length are padded so). Copies run in no order: within one store no block is
    both read and written. Host memory may be read again once the stream has come past the launch.
    Raises ValueError for stores whose blocks differ in their parts.
    """
    expect("pairs", pairs, (None, 2), torch.int64, dense=2)
    expect_together(source=source.addresses, target=target.addresses, pairs=pairs)
    if source.sizes != target.sizes:
        raise ValueError(
            f"a block of the source has parts of {list(source.sizes)} bytes, "
            f"of the target {list(target.sizes)}"
        )
    if not len(pairs):
        return
    parts = triton.cdiv(max(source.sizes), _WORD * _WORDS)
    _copy_kernel[(len(pairs), len(source.sizes), parts)](
        source.addresses,
        source.strides,
        target.addresses,
        target.strides,
        source.lengths,
        pairs,
        WORDS=_WORDS,
        WIDE=source.wide and target.wide,
        num_warps=4,
    )


def variants() -> tuple[Variant, ...]:
    """One kernel moves bytes of any type, by 8 or by 16."""
    names = ("sources", "source_strides", "targets", "target_strides", "lengths", "pairs")
    pointers = tuple(f"{name}_ptr" for name in names)
    return tuple(
        Variant(
            name=f"block copy by {_WIDE if wide else _WORD} bytes",
            kernel=_copy_kernel,
            signature=dict.fromkeys(pointers, "*i64"),
            constants={"WORDS": _WORDS, "WIDE": wide},
            aligned=pointers,
        )
        for wide in (True, False)
    )
