"""GGUF checkpoints of the Llama family, tensors mapped to Hugging Face's names.

llama.cpp stores query and key rows with rotary pairs interleaved, which is how the decoder wants
them. Q4_0, Q4_1 and Q8_0 are dequantized here by torch, on all its threads; every other
quantized type by the `gguf` package, whose import takes longer than this file's whole header.
"""

import mmap
import re
import warnings
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.worker.gguf_header import GgufHeader, GgufTensor, InvalidGguf, read_header
from shoal.worker.model.weights import WeightError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

# ggml type -> torch dtype, of tensors that are not quantized
_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
_Q4_0, _Q4_1, _Q8_0 = 2, 3, 8
# ggml type -> (elements, bytes) of a block
_BLOCKS = {_Q4_0: (32, 18), _Q4_1: (32, 20), _Q8_0: (32, 34)}
_INTEGERS = range(24, 29)  # I8, I16, I32, I64, F64: never weights

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"  # belongs to the spec, see shoal.worker.model.gguf_spec


class GgufSource:
    """The tensors of one GGUF file."""

    def __init__(self, path: Path, *, whole: bool = True) -> None:
        """Reads the header; `whole`: all of the file will be read soon. Raises WeightError where
        the file is no GGUF or is shorter than its tensors need."""
        self.origin = str(path)
        self.bytes_read = 0
        try:
            self.header: GgufHeader = read_header(path)
        except InvalidGguf as error:
            raise WeightError(str(error)) from error
        self._map = np.memmap(path, np.uint8, mode="r")
        if whole:
            self._map._mmap.madvise(mmap.MADV_WILLNEED)  # type: ignore[attr-defined]  # numpy's
        self._tensors: dict[str, GgufTensor] = {}
        for tensor in self.header.tensors:
            self._check_extent(tensor)
            self._tensors[_hugging_face_name(tensor.name)] = tensor
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tensor.shape[::-1]
            for name, tensor in self._tensors.items()
            if name != ROPE_FACTORS
        }

    def rope_factors(self) -> tuple[float, ...] | None:
        """What each inverse rotary frequency is divided by, where the file says so."""
        if ROPE_FACTORS not in self._tensors:
            return None
        return tuple(self.read(ROPE_FACTORS).tolist())

    def read(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return self._decoded(tensor, self._stored(tensor), tensor.shape[::-1])

    def read_runs(self, name: str, dim: int, runs: Sequence[tuple[int, int]]) -> Tensor:
        tensor = self._tensors[name]
        shape = list(tensor.shape[::-1])
        elements, size = self._block(tensor)
        # [rows, blocks, bytes]: a block lies along the last dimension
        blocks = self._stored(tensor).reshape(-1, shape[-1] // elements, size)
        along = 1 if dim == len(shape) - 1 else 0
        unit = elements if along else prod(shape[1:-1])
        if any(border % unit for run in runs for border in run):
            whole = self.read(name)
            return torch.cat([whole.narrow(dim, first, end - first) for first, end in runs], dim)
        taken = [blocks[(slice(None),) * along + (slice(f // unit, e // unit),)] for f, e in runs]
        shape[dim] = sum(end - first for first, end in runs)
        raw = np.concatenate(taken, axis=along) if len(taken) > 1 else taken[0]
        return self._decoded(tensor, np.ascontiguousarray(raw).reshape(-1), tuple(shape))

    def _stored(self, tensor: GgufTensor) -> Bytes:
        return self._map[tensor.offset : tensor.offset + self._nbytes(tensor)]

    def _decoded(self, tensor: GgufTensor, raw: Bytes, shape: tuple[int, ...]) -> Tensor:
        """raw: whole rows, or whole blocks of every row, as stored."""
        self.bytes_read += raw.nbytes
        if tensor.ggml_type in _PLAIN:
            return _borrow(raw).view(_PLAIN[tensor.ggml_type]).view(shape)
        if tensor.ggml_type in _BLOCKS:
            blocks = _borrow(raw).view(-1, _BLOCKS[tensor.ggml_type][1])
            return _dequantize(blocks, tensor.ggml_type).view(shape)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        values = dequantize(
            np.asarray(raw).reshape(*shape[:-1], -1), GGMLQuantizationType(tensor.ggml_type)
        )
        return torch.from_numpy(np.ascontiguousarray(values)).view(shape)

    def _check_extent(self, tensor: GgufTensor) -> None:
        end = tensor.offset + self._nbytes(tensor)
        if end > len(self._map):
            raise WeightError(
                f"{self.origin}: tensor {tensor.name} ends at byte {end}, the file at "
                f"{len(self._map)}: it is truncated, fetch it again"
            )

    def _nbytes(self, tensor: GgufTensor) -> int:
        elements, size = self._block(tensor)
        if tensor.shape[0] % elements:
            raise WeightError(
                f"{self.origin}: tensor {tensor.name} has rows of {tensor.shape[0]} elements, "
                f"expected a multiple of its type's block of {elements}"
            )
        return prod(tensor.shape) // elements * size

    def _block(self, tensor: GgufTensor) -> tuple[int, int]:
        """(elements, bytes) of what the tensor is made of."""
        kind = tensor.ggml_type
        if kind in _PLAIN:
            return 1, _PLAIN[kind].itemsize
        return _BLOCKS.get(kind) or self._foreign_block(tensor)

    def _foreign_block(self, tensor: GgufTensor) -> tuple[int, int]:
        """(elements, bytes) of a block of a type that the `gguf` package dequantizes."""
        from gguf import GGML_QUANT_SIZES

        sizes: dict[int, tuple[int, int]] = {int(kind): s for kind, s in GGML_QUANT_SIZES.items()}
        if tensor.ggml_type not in sizes or tensor.ggml_type in _INTEGERS:
            raise WeightError(
                f"{self.origin}: tensor {tensor.name} is of ggml type {tensor.ggml_type}, "
                "which is no known type of weights"
            )
        return sizes[tensor.ggml_type]


def _hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; others unchanged, so
    that the loader names them as they stand in the file."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, part, kind = match.groups()
        if part in _LAYER:
            return f"model.layers.{layer}.{_LAYER[part]}.{kind}"
    part, _, kind = name.rpartition(".")
    return f"{_TOP[part]}.{kind}" if part in _TOP else name


def _borrow(raw: Bytes) -> Tensor:
    """The file's own pages as a tensor, which nobody writes to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(raw, dtype=torch.uint8)


def _dequantize(blocks: Tensor, kind: int) -> Tensor:
    """blocks [n, bytes] uint8 -> [n, 32] float32, as ggml's `dequantize_row_*` define it."""
    scale = blocks[:, :2].contiguous().view(torch.float16).float()
    if kind == _Q8_0:
        return blocks[:, 2:].view(torch.int8) * scale
    packed = blocks[:, -16:]
    values = torch.cat((packed & 15, packed >> 4), dim=1)
    if kind == _Q4_0:
        return (values.to(torch.int8) - 8) * scale
    offset = blocks[:, 2:4].contiguous().view(torch.float16).float()
    return (values * scale).add_(offset)
