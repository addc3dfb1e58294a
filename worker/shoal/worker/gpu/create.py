"""From a checkpoint to an executor on a device: weights, then memory as it is measured, then KV."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from shoal.kernels.gpu.linear8 import Linear8
from shoal.kernels.gpu.pack8 import quantize8
from shoal.worker.config import EngineConfig
from shoal.worker.gpu.choose import CODES, cache_dtype, device_precision
from shoal.worker.gpu.decoder import DeviceDecoder
from shoal.worker.gpu.device import CudaDevice, Device, HostDevice
from shoal.worker.gpu.executor import GpuExecutor
from shoal.worker.gpu.layers import Dense
from shoal.worker.gpu.load import MakeLinear, load_device_decoder
from shoal.worker.gpu.memory import MIN_BLOCKS, DeviceMemory, largest_step
from shoal.worker.gpu.model import device_model
from shoal.worker.gpu.steps import graph_sizes
from shoal.worker.host import available_memory
from shoal.worker.memory import DEFAULT_KV_ROOM
from shoal.worker.model.loader import open_checkpoint
from shoal.worker.model.precision import Precision
from shoal.worker.model.reader import Checkpoint
from shoal.worker.model.spec import DecoderSpec

log = logging.getLogger(__name__)

# Graphs keep what they were recorded with: code, arguments, and the libraries' workspaces.
_GRAPH_BYTES = 24 << 20


def create_gpu_executor(
    path: Path,
    config: EngineConfig,
    kind: str,
    longest: Callable[[DecoderSpec, EngineConfig], int],
    progress: Callable[[str, float], None],
    clock: Callable[[], float],
) -> GpuExecutor:
    """Loads the model at `path` onto the device of this `kind` (see `chosen_device`); `longest`
    says how long its sequences may get. `progress` as for `create_executor`. Raises WeightError,
    UnknownArchitecture among them, NotEnoughMemory, and ValueError for a setting out of range."""
    checkpoint = open_checkpoint(path)
    device: Device = CudaDevice() if kind == "cuda" else HostDevice(_interpreter_memory())
    return executor_of(
        checkpoint,
        config,
        device_precision(config.dtype, kind),
        device,
        longest(checkpoint.spec, config),
        progress,
        clock,
    )


def executor_of(
    checkpoint: Checkpoint,
    config: EngineConfig,
    precision: Precision,
    device: Device,
    max_model_len: int,
    progress: Callable[[str, float], None],
    clock: Callable[[], float],
) -> GpuExecutor:
    """An executor of a checkpoint whose weights may come from anywhere."""
    started = clock()
    with torch.inference_mode():
        decoder = load_device_decoder(
            checkpoint,
            precision,
            device,
            max_model_len,
            linear_maker(config),
            keep_codes=config.quantization == "auto",
        )
    progress("load", clock() - started)
    started = clock()
    slots = min(config.max_num_seqs, config.max_batched_tokens)
    cache = cache_dtype(config, precision)
    memory = measure(decoder, config, device, max_model_len, slots)
    per_sequence = -(-max_model_len // config.block_size)
    blocks = memory.blocks(config, slots * per_sequence + 1)
    log.info(
        "device: %s; %s; KV cache of %d blocks of %d tokens, %d bytes each",
        device.name,
        memory.describe(),
        blocks,
        config.block_size,
        memory.block_bytes,
    )
    with torch.inference_mode():
        model = device_model(
            decoder,
            num_blocks=blocks,
            block_size=config.block_size,
            max_model_len=max_model_len,
            slots=slots,
            cache=cache,
            device=device.home,
        )
        executor = GpuExecutor(model, device, clock, slots)
    progress("kv", clock() - started)
    started = clock()
    if device.home.type != "cpu":  # the interpreter has nothing to warm up, and would take long
        executor.warm_up(min(config.max_batched_tokens, max_model_len - 1))
    progress("warm-up", clock() - started)
    return executor


def measure(
    decoder: DeviceDecoder, config: EngineConfig, device: Device, max_model_len: int, slots: int
) -> DeviceMemory:
    """What is left behind the weights, and what a step of max_batched_tokens takes of it."""
    spec = decoder.spec
    free = device.free_memory()
    cache = cache_dtype(config, decoder.precision)
    row = spec.head_dim * cache.itemsize + (4 if cache in CODES.values() else 0)
    block_bytes = 2 * spec.num_layers * spec.num_kv_heads * config.block_size * row
    with torch.inference_mode():
        model = device_model(
            decoder,
            num_blocks=MIN_BLOCKS,
            block_size=config.block_size,
            max_model_len=max_model_len,
            slots=slots,
            cache=cache,
            device=device.home,
        )
        probe = GpuExecutor(model, device, lambda: 0.0, slots)
    state = max(0, free - device.free_memory())
    plan = largest_step(config.max_batched_tokens, slots, max_model_len)
    step = device.appetite(lambda: probe.execute(plan))
    probe.close()
    sizes = len(graph_sizes(slots))
    return DeviceMemory(free, step, state, sizes * _GRAPH_BYTES, block_bytes)


def linear_maker(config: EngineConfig) -> MakeLinear:
    """What becomes of a layer's matrices. ValueError for a quantization that is not known."""
    if config.quantization in ("auto", "none"):
        return Dense
    codes = CODES.get(config.quantization)
    if codes is None:
        raise ValueError(
            f"quantization is {config.quantization!r}, expected auto, none, int8 or fp8 on a GPU"
        )
    return lambda weight, bias: Linear8(quantize8(weight, codes), bias)


def _interpreter_memory() -> int:
    """Bytes that the interpreter's KV cache may be planned with."""
    return min(DEFAULT_KV_ROOM, available_memory())
