"""Which device computes, by settings and machine."""

import subprocess
import sys

import pytest
import torch

from shoal.worker.config import EngineConfig, ParallelConfig
from shoal.worker.gpu.choose import cache_dtype, check_cpu, chosen_device, device_precision
from shoal.worker.parallel.create import create_group

WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(("grpc", "ray", "kopf", "google.protobuf", "psutil")))
import shoal.worker.engine, shoal.worker.in_process, shoal.worker.llm
"""
PLAIN: dict[str, str] = {}
INTERPRETED = {"TRITON_INTERPRET": "1"}


@pytest.mark.parametrize(
    ("device", "backend", "cuda", "environ", "wanted"),
    [
        ("auto", "auto", False, PLAIN, None),
        ("auto", "auto", True, PLAIN, "cuda"),
        ("auto", "native", True, PLAIN, None),
        ("auto", "torch", True, PLAIN, None),
        ("auto", "triton", True, PLAIN, "cuda"),
        ("cpu", "auto", True, PLAIN, None),
        ("cuda", "auto", True, PLAIN, "cuda"),
        ("cuda", "triton", True, PLAIN, "cuda"),
        ("auto", "triton", False, INTERPRETED, "interpreter"),
        ("cpu", "triton", True, INTERPRETED, "interpreter"),
        ("auto", "auto", False, INTERPRETED, None),
        ("auto", "auto", True, INTERPRETED, None),
        ("auto", "triton", True, INTERPRETED, "interpreter"),
    ],
)
def test_settings_and_machine_choose(
    device: str, backend: str, cuda: bool, environ: dict[str, str], wanted: str | None
) -> None:
    """A GPU where there is one and nothing says otherwise; the interpreter only when asked for."""
    config = EngineConfig(device=device, backend=backend)
    assert chosen_device(config, cuda, environ) == wanted


@pytest.mark.parametrize(
    ("device", "backend", "cuda", "message"),
    [
        ("gpu", "auto", True, "device is 'gpu', expected auto, cpu, cuda"),
        ("cuda", "auto", False, "device is cuda, but torch sees no such device: choose cpu"),
        ("cuda", "native", True, "backend is native, which computes on a CPU, but device is cuda"),
        ("auto", "triton", False, "backend is triton, whose kernels need a GPU"),
        ("cpu", "triton", True, "backend is triton, whose kernels need a GPU"),
    ],
)
def test_what_contradicts_itself_is_refused(
    device: str, backend: str, cuda: bool, message: str
) -> None:
    """The message names both sides and a way out."""
    with pytest.raises(ValueError, match=message):
        chosen_device(EngineConfig(device=device, backend=backend), cuda, PLAIN)


def test_the_interpreter_is_for_the_whole_process() -> None:
    """A GPU cannot be had beside it."""
    with pytest.raises(ValueError, match="device is cuda, but TRITON_INTERPRET=1"):
        chosen_device(EngineConfig(device="cuda"), True, INTERPRETED)


def test_the_interpreter_has_no_bfloat16() -> None:
    """It would compute wrongly without a word."""
    assert device_precision("auto", "interpreter").compute is torch.float32
    assert device_precision("float16", "interpreter").cache is torch.float16
    with pytest.raises(ValueError, match="bfloat16, which Triton's interpreter computes wrongly"):
        device_precision("bfloat16", "interpreter")
    with pytest.raises(ValueError, match="expected auto, bfloat16, float16, float32"):
        device_precision("int8", "cuda")


def test_a_rounded_cache_is_for_gpus() -> None:
    """A CPU refuses it, and a kind that nobody has is named."""
    config, precision = EngineConfig(kv_cache_dtype="fp8"), device_precision("float32", "cuda")
    assert cache_dtype(config, precision) is torch.float8_e4m3fn
    assert cache_dtype(EngineConfig(), precision) is torch.float32
    with pytest.raises(ValueError, match="kv_cache_dtype is 'fp8', which needs a GPU"):
        check_cpu(config)
    with pytest.raises(ValueError, match="kv_cache_dtype is 'int2', expected auto, fp8 or int8"):
        cache_dtype(EngineConfig(kv_cache_dtype="int2"), precision)


def test_a_divided_model_is_not_for_a_gpu(tmp_path) -> None:
    """Its ranks compute on CPUs, and say so before any starts."""
    with pytest.raises(ValueError, match=r"divided over ranks \(2 x 1\) is computed on CPUs"):
        create_group(
            tmp_path,
            EngineConfig(device="cuda"),
            ParallelConfig(tensor=2),
            lambda phase, seconds: None,
        )


def test_the_engine_imports_where_only_torch_is() -> None:
    """A machine with a GPU may have neither grpcio nor ray nor kopf, nor protobuf."""
    subprocess.run([sys.executable, "-c", WITHOUT], check=True, timeout=120)
