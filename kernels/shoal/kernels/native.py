"""Step programs on the CPU: a model's operations recorded once, replayed by one native call.

What CUDA graphs are to a GPU. A step of a small model is hundreds of operations of a few
microseconds; called one by one from Python they cost more than they compute. The library behind
this (csrc/) keeps a team of threads that runs all operations of a step with a spin barrier after
each. Weights are bfloat16 or int8, sums and the residual stream float32. The torch functions of
`linear`, `norm`, `rope` and `attention` are its oracle and what runs where it is not there: no
compiler at installation, or a processor without AVX-512 BF16 and VNNI.
"""

import ctypes
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.kernels.flat import FlatBatch, Ints
from shoal.kernels.quant import GROUP, Int8Weight

LIBRARY = Path(__file__).with_name("_native_avx512bf16.so")
PANEL = 32  # outputs that are packed together
KEY_GROUP = 16  # tokens of a key tile's vector: block sizes are multiples of it
MAX_HEAD_DIM = 256


class Buffer(enum.IntEnum):
    """What operations read and write; every buffer holds rows of the step."""

    RESIDUAL = 0  # [rows, hidden] float32
    NORMED = 1  # [rows, hidden] bfloat16
    HEADS = 2  # [rows, (heads + 2 kv_heads) head_dim] bfloat16: queries, keys, values
    ATTENDED = 3  # [rows, heads head_dim] bfloat16
    INNER = 4  # [rows, intermediate] bfloat16
    LOGITS = 5  # [rows, vocabulary] float32


class Into(enum.IntEnum):
    """What a linear does with its result."""

    BFLOAT16 = 0
    FLOAT32 = 1
    ADD = 2  # to a float32 target
    GATED = 3  # silu(gate) * up, of a layer that `interleave_gate` made


class _Code(enum.IntEnum):
    EMBED = 0
    NORM = 1
    LINEAR = 2
    ROPE_STORE = 3
    ATTEND = 4
    TAKE = 5


class _Op(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("code", "source", "target", "into", "n", "k")),
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "sums", "bias", "cache")),
        ("eps", ctypes.c_float),
    )


class _Shape(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in (
                *("hidden", "heads", "kv_heads", "head_dim", "rotary", "block_size", "window"),
            )
        ),
        ("scale", ctypes.c_float),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "sequences", "rows", "table_stride")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("ids", "positions", "owner", "first", "count", "start", "tables"),
                *("wanted", "turns", "seconds"),
            )
        ),
    )


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes that every layer shares."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    block_size: int
    scale: float  # of the scores
    window: int | None = None  # a token sees itself and the `window - 1` before it

    def unfit(self) -> str | None:
        """Why the library cannot compute such a model; None where it can."""
        for name, value, multiple in (
            ("hidden size", self.hidden, 16),
            ("head size", self.head_dim, 16),
            ("rotary size", self.rotary_dim, 16),
            ("block size", self.block_size, KEY_GROUP),
        ):
            if value % multiple:
                return f"{name} {value} is no multiple of {multiple}"
        if self.head_dim > MAX_HEAD_DIM:
            return f"head size {self.head_dim} is above {MAX_HEAD_DIM}"
        return None

    def cache(self, num_blocks: int) -> Tensor:
        """A layer's keys and values, zeroed: [blocks, kv_heads, 2, block_size * head_dim]
        bfloat16. Pages are the kernel's until they are first used."""
        shape = (num_blocks, self.kv_heads, 2, self.block_size * self.head_dim)
        return torch.from_numpy(np.zeros(shape, np.uint16)).view(torch.bfloat16)


class PackedWeight:
    """A linear layer's weight [n, k] and bias in the library's layout."""

    __slots__ = ("bias", "k", "n", "packed", "scales", "sums")

    def __init__(self, weight: Tensor | Int8Weight, bias: Tensor | None = None) -> None:
        self.scales = self.sums = None
        if isinstance(weight, Int8Weight):
            self.n, self.k = weight.codes.shape
            panels = -(-self.n // PANEL)
            codes = weight.codes.contiguous()
            self.packed = torch.empty(panels * PANEL * self.k, dtype=torch.int8)
            self.sums = torch.empty(panels * PANEL * self.k // GROUP, dtype=torch.int32)
            self.scales = _panels(weight.scales)
            _library().shoal_pack8(
                *(codes.data_ptr(), self.packed.data_ptr(), self.sums.data_ptr(), self.n, self.k)
            )
        else:
            self.n, self.k = weight.shape
            if self.k % 2:
                raise ValueError(f"a linear layer has {self.k} inputs, expected an even number")
            plain = weight.to(torch.bfloat16).contiguous()
            self.packed = torch.empty(-(-self.n // PANEL) * PANEL * self.k, dtype=torch.bfloat16)
            _library().shoal_pack(plain.data_ptr(), self.packed.data_ptr(), self.n, self.k)
        # As torch does it: a bias in the weights' precision, added in float32.
        self.bias = None if bias is None else bias.to(torch.bfloat16).float().contiguous()

    @classmethod
    def of_parts(
        cls,
        n: int,
        k: int,
        packed: Tensor,
        *,
        scales: Tensor | None,
        sums: Tensor | None,
        bias: Tensor | None,
    ) -> "PackedWeight":
        """The weight that had these attributes; tensors begin at multiples of 64 bytes."""
        made = cls.__new__(cls)
        made.n, made.k, made.packed = n, k, packed
        made.scales, made.sums, made.bias = scales, sums, bias
        return made


def _panels(scales: Tensor) -> Tensor:
    """[n, groups] -> [panels, groups, PANEL] float32; rows beyond n are zero."""
    rows = -(-scales.shape[0] // PANEL) * PANEL
    padded = torch.zeros(rows, scales.shape[1])
    padded[: scales.shape[0]] = scales
    return padded.view(-1, PANEL, scales.shape[1]).transpose(1, 2).contiguous()


def interleave_gate(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [n, ...] -> [2 n, ...]: 16 rows of gate, 16 of up, and so on. n is a multiple of
    16. The weight, or the bias, of a layer whose result goes `Into.GATED`."""
    if gate.shape[0] % 16:
        raise ValueError(f"the intermediate size is {gate.shape[0]}, expected a multiple of 16")
    tail = gate.shape[1:]
    return torch.stack((gate.view(-1, 16, *tail), up.view(-1, 16, *tail)), 1).reshape(-1, *tail)


class Team:
    """Threads that run programs together. The caller of a program is one of them."""

    def __init__(self, threads: int) -> None:
        self._library = _library()
        self._handle: int | None = self._library.shoal_team_new(threads)

    @property
    def handle(self) -> int:
        if self._handle is None:
            raise ValueError("the team of threads was closed")
        return self._handle

    def close(self) -> None:
        """Ends the threads. Idempotent."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._library.shoal_team_free(handle)

    def __del__(self) -> None:
        self.close()


class Program:
    """Operations in order. Record them, then `run` for every step; one caller at a time."""

    def __init__(self, geometry: Geometry, turns: Tensor) -> None:
        """`turns`: a `rope.rope_table`, complex64 [positions, rotary_dim / 2]."""
        if (why := geometry.unfit()) is not None:
            raise ValueError(f"{why}, which step programs cannot compute")
        self.geometry = geometry
        self._turns = turns.contiguous()
        self._ops: list[_Op] = []
        self._kept: list[Tensor] = []  # whose memory the operations point into
        self._recorded: ctypes.Array[_Op] | None = None
        self._shape = _Shape(
            *(geometry.hidden, geometry.heads, geometry.kv_heads, geometry.head_dim),
            *(geometry.rotary_dim, geometry.block_size, geometry.window or 0, geometry.scale),
        )

    def embed(self, weight: Tensor) -> None:
        """RESIDUAL = rows of weight [vocabulary, hidden] bfloat16, by token id."""
        self._add(_Op(_Code.EMBED, weight=self._keep(weight)))

    def norm(self, weight: Tensor, eps: float, target: Buffer = Buffer.NORMED) -> None:
        """target = root-mean-square norm of RESIDUAL; weight [hidden] float32."""
        self._add(_Op(_Code.NORM, target=target, weight=self._keep(weight), eps=eps))

    def linear(self, layer: PackedWeight, source: Buffer, target: Buffer, into: Into) -> None:
        """target = layer(source), or as `into` says."""
        weight = self._keep(layer.packed)
        others = [
            None if part is None else self._keep(part)
            for part in (layer.scales, layer.sums, layer.bias)
        ]
        self._add(_Op(_Code.LINEAR, source, target, into, layer.n, layer.k, weight, *others))

    def rope_store(self, cache: Tensor) -> None:
        """Rotates the queries of HEADS in place, and the keys; keys and values go to the cache."""
        self._add(_Op(_Code.ROPE_STORE, cache=self._keep(cache)))

    def attend(self, cache: Tensor) -> None:
        """ATTENDED = attention of HEADS' queries over the cache, which holds this step's keys."""
        self._add(_Op(_Code.ATTEND, cache=self._keep(cache)))

    def take(self) -> None:
        """From here on only the rows that `run` is asked for are computed."""
        self._add(_Op(_Code.TAKE))

    @property
    def weights(self) -> dict[str, Tensor]:
        """What the operations read that is the same in every step, by its place in the program."""
        caches = {op.cache for op in self._ops}
        kept = ((place, tensor) for place, tensor in enumerate(self._kept))
        return {str(place): t for place, t in kept if t.data_ptr() not in caches}

    @property
    def operations(self) -> list[str]:
        """A name for each operation: what it does, and to which buffer."""
        return [
            f"{_Code(op.code).name.lower()}"
            + (f" {Buffer(op.target).name.lower()}" if op.code == _Code.LINEAR else "")
            for op in self._ops
        ]

    def run(
        self,
        team: Team,
        batch: FlatBatch,
        wanted: Ints,
        buffers: Sequence[Tensor],
        seconds: npt.NDArray[np.float64] | None = None,
    ) -> None:
        """Replays the program.

        batch: what EMBED, ROPE_STORE and ATTEND work on; of a program without them only the
        number of tokens counts. wanted: flat rows that `take` keeps. buffers: by `Buffer`, each
        with room for the step's rows, or empty where no operation uses it. seconds [operations]:
        what each takes is added to it. Raises ValueError where a buffer is too small.
        """
        rows = max(batch.num_tokens, len(wanted))
        if any(0 < len(buffer) < rows for buffer in buffers):
            room = min(len(buffer) for buffer in buffers if len(buffer))
            raise ValueError(f"a step of {rows} rows, but its buffers have room for {room}")
        if self._recorded is None:
            self._recorded = (_Op * len(self._ops))(*self._ops)
        arrays = [
            np.ascontiguousarray(array)
            for array in (
                *(batch.ids, batch.positions, batch.owner, np.cumsum(batch.count) - batch.count),
                *(batch.count, batch.start, batch.tables, wanted),
            )
        ]
        step = _Batch(
            *(len(batch.ids), len(batch.count), len(wanted), arrays[6].shape[1]),
            *(array.ctypes.data for array in arrays),
            self._turns.data_ptr(),
            None if seconds is None else seconds.ctypes.data,
        )
        pointers = (ctypes.c_void_p * len(Buffer))(*(buffer.data_ptr() for buffer in buffers))
        _library().shoal_run(
            team.handle,
            *(self._recorded, len(self._ops), ctypes.byref(self._shape)),
            *(ctypes.byref(step), pointers),
        )

    def _add(self, op: _Op) -> None:
        self._ops.append(op)
        self._recorded = None

    def _keep(self, tensor: Tensor) -> int:
        if not tensor.is_contiguous():
            raise ValueError(f"a step program needs contiguous tensors, got {tensor.stride()}")
        self._kept.append(tensor)
        return tensor.data_ptr()


@cache
def unavailable() -> str | None:
    """Why step programs cannot run in this process; None where they can."""
    if not LIBRARY.exists():
        return "the native library was not built (no C++ compiler at installation)"
    capabilities = torch.cpu.get_capabilities()
    for name in ("avx512_dq", "avx512_vl", "avx512_bw", "avx512_bf16", "avx512_vnni"):
        if not capabilities.get(name):
            return f"the processor has no {name.upper()}"
    try:
        _library()
    except OSError as error:
        return f"the native library cannot be loaded: {error}"
    return None


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.shoal_team_new.argtypes = (ctypes.c_int,)
    library.shoal_team_new.restype = pointer
    library.shoal_team_free.argtypes = (pointer,)
    library.shoal_team_free.restype = None
    library.shoal_pack.argtypes = (pointer, pointer, number, number)
    library.shoal_pack.restype = None
    library.shoal_pack8.argtypes = (pointer, pointer, pointer, number, number)
    library.shoal_pack8.restype = None
    library.shoal_run.argtypes = (pointer, pointer, number, pointer, pointer, pointer)
    library.shoal_run.restype = None
    return library
