"""Which device computes, as the settings and the machine say. Imports no kernels."""

import os
from collections.abc import Mapping

import torch

from shoal.worker.config import EngineConfig
from shoal.worker.model.precision import Precision

DEVICES = ("auto", "cpu", "cuda")
# What weights and the KV cache can be rounded to, each row with a scale of its own.
CODES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
_CPU_BACKENDS = ("native", "torch")
_KNOWN = {
    name: Precision(name, dtype, dtype, dtype)
    for name, dtype in (
        ("float32", torch.float32),
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
    )
}


def chosen_device(
    config: EngineConfig, cuda: bool, environ: Mapping[str, str] = os.environ
) -> str | None:
    """`cuda`, `interpreter` (Triton's, on a CPU), or None for the CPU's own backends.

    `cuda`: whether torch sees such a device. Raises ValueError for settings that contradict each
    other or the machine.
    """
    device, backend = config.device, config.backend
    if device not in DEVICES:
        raise ValueError(f"device is {device!r}, expected " + ", ".join(DEVICES))
    interpreted = environ.get("TRITON_INTERPRET") == "1"
    cuda = cuda and not interpreted  # the interpreter takes every kernel of the process
    if device == "cuda":
        if interpreted:
            raise ValueError(
                "device is cuda, but TRITON_INTERPRET=1 has kernels run on the CPU: unset it"
            )
        if not cuda:
            raise ValueError(
                "device is cuda, but torch sees no such device: choose cpu, or check the driver "
                "and that this torch is built for it"
            )
        if backend in _CPU_BACKENDS:
            raise ValueError(
                f"backend is {backend}, which computes on a CPU, but device is cuda: choose "
                "backend auto or triton"
            )
    if backend == "triton":
        if cuda and device != "cpu":
            return "cuda"
        if not interpreted:
            raise ValueError(
                "backend is triton, whose kernels need a GPU: choose backend auto, or set "
                "TRITON_INTERPRET=1 to try them on this CPU, some thousand times slower"
            )
        return "interpreter"
    return "cuda" if cuda and device != "cpu" and backend == "auto" else None


def check_cpu(config: EngineConfig) -> None:
    """Raises ValueError for settings that GPUs alone have."""
    if config.kv_cache_dtype != "auto":
        raise ValueError(
            f"kv_cache_dtype is {config.kv_cache_dtype!r}, which needs a GPU: choose auto"
        )


def cache_dtype(config: EngineConfig, precision: Precision) -> torch.dtype:
    """What keys and values are kept in. ValueError for what is not known."""
    if config.kv_cache_dtype == "auto":
        return precision.cache
    if config.kv_cache_dtype not in CODES:
        raise ValueError(f"kv_cache_dtype is {config.kv_cache_dtype!r}, expected auto, fp8 or int8")
    return CODES[config.kv_cache_dtype]


def device_precision(dtype: str, kind: str) -> Precision:
    """The precision of a device for a `dtype` setting; `auto` is bfloat16 where the device has it
    in hardware, else float16, and float32 for the interpreter. ValueError for what it has not."""
    interpreted = kind == "interpreter"
    if dtype == "auto":
        if interpreted:
            dtype = "float32"
        else:
            dtype = (
                "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
            )
    if dtype not in _KNOWN:
        raise ValueError(f"dtype is {dtype!r}, expected auto, " + ", ".join(sorted(_KNOWN)))
    if interpreted and dtype == "bfloat16":
        raise ValueError(
            "dtype is bfloat16, which Triton's interpreter computes wrongly: choose float32"
        )
    return _KNOWN[dtype]
