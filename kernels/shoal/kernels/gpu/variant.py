"""Which compilations of the kernels must hold what they promise, on every architecture."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Compute capabilities that every kernel is built for: A100, H100 and H200, B200.
ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True, slots=True)
class Variant:
    """One compilation of a kernel, as its wrapper would launch it.

    The compile proof builds it for each architecture without a GPU and reads registers, spills
    and shared memory from the machine code.
    """

    name: str  # of the kernel and what is special here, e.g. "paged_attention decode d128 fp8"
    kernel: Any  # what triton.jit returned
    signature: Mapping[str, str]  # argument -> Triton's type: "*bf16", "i32", "fp32"
    constants: Mapping[str, object]  # values of the constexpr arguments; not in the signature
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()  # pointers and sizes that are multiples of 16 at a launch
    hot: bool = True  # runs in every step: no register may spill
    tensor_cores: bool = False  # its products must be mma, wgmma or tcgen05 instructions
    wgmma: bool = False  # its tiles have 64 rows or more: wgmma on sm_90, tcgen05 on sm_100
    architectures: tuple[int, ...] = ARCHITECTURES  # fewer where it needs what older ones lack
