"""The one account of memory: what the engine allocates by and what its start log prints."""

from dataclasses import dataclass
from math import prod

from shoal.kernels.paged import QUERY_TILE
from shoal.kernels.quant import GROUP
from shoal.worker.config import EngineConfig
from shoal.worker.model.precision import Precision
from shoal.worker.model.spec import DecoderSpec
from shoal.worker.model.weight_map import Role, tensors

DEFAULT_KV_ROOM = 4 << 30
_MIB = 1 << 20
_MIN_BLOCKS = 2  # the null block and one to use
SAMPLER_COPIES = 4  # float32 copies of the logits that sampling holds at once, at most
LOGIT_ROWS = 64  # rows whose prompt logprobs are computed at once


class NotEnoughMemory(ValueError):
    """The model does not fit; the message holds the whole sum."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by use."""

    runtime: int  # interpreter and libraries, before the model
    weights: int
    activations: int  # of the largest step
    workspace: int  # per-request state, rope table, logits and sampling
    num_blocks: int
    block_bytes: int
    block_size: int

    @property
    def kv_cache(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def total(self) -> int:
        return self.runtime + self.weights + self.activations + self.workspace + self.kv_cache

    def describe(self) -> str:
        """The sum, in one line."""
        parts = ("runtime", "weights", "activations", "workspace", "kv_cache")
        terms = " + ".join(f"{part} {getattr(self, part) // _MIB}" for part in parts)
        return (
            f"{terms} = {self.total // _MIB} MiB at most; KV cache of {self.num_blocks} blocks of "
            f"{self.block_size} tokens, {self.block_bytes} bytes each"
        )


def plan_memory(
    spec: DecoderSpec,
    precision: Precision,
    config: EngineConfig,
    max_model_len: int,
    available: int,
    resident: int,
    *,
    native: bool = False,
    weights: int | None = None,
) -> MemoryPlan:
    """Decides the number of KV blocks.

    `config.kv_cache_blocks` decides alone where it is set. Else the cache takes
    `kv_cache_memory_fraction` of its room: what `memory_limit_bytes` leaves after everything
    else or, without a limit, what is `available` now after everything else, at most 4 GiB. It is
    never larger than max_num_seqs sequences of max_model_len need. `weights`: their bytes, where
    the spec does not tell. Raises NotEnoughMemory if no block fits.
    """
    per_sequence = -(-max_model_len // config.block_size)
    block_bytes = (
        2
        * spec.num_layers
        * spec.num_kv_heads
        * spec.head_dim
        * config.block_size
        * precision.cache.itemsize
    )
    fixed = MemoryPlan(
        runtime=resident,
        weights=(
            _weights(spec, precision, packed_int8=native and config.quantization == "int8")
            if weights is None
            else weights
        ),
        activations=(
            _native_activations(spec, config)
            if native
            else _activations(spec, precision, config, max_model_len)
        ),
        workspace=_workspace(spec, config, max_model_len, per_sequence),
        num_blocks=0,
        block_bytes=block_bytes,
        block_size=config.block_size,
    )
    most = config.max_num_seqs * per_sequence + 1
    if config.kv_cache_blocks is not None:
        blocks = config.kv_cache_blocks
        source = f"kv_cache_blocks is {config.kv_cache_blocks}"
    else:
        if config.memory_limit_bytes is not None:
            room = config.memory_limit_bytes - fixed.total
            source = f"memory_limit_bytes is {config.memory_limit_bytes}"
        else:
            room = min(DEFAULT_KV_ROOM, available - (fixed.total - resident))
            source = f"{available // _MIB} MiB are available"
        blocks = int(config.kv_cache_memory_fraction * room) // block_bytes
    plan = MemoryPlan(
        fixed.runtime,
        fixed.weights,
        fixed.activations,
        fixed.workspace,
        min(blocks, most),
        block_bytes,
        config.block_size,
    )
    if plan.num_blocks < _MIN_BLOCKS:
        raise NotEnoughMemory(
            f"no room for {_MIN_BLOCKS} KV blocks: {source}, but the rest needs {fixed.describe()}"
        )
    return plan


def _weights(spec: DecoderSpec, precision: Precision, *, packed_int8: bool) -> int:
    """Packed matrices, float32 norms, and the embedding, which is looked up unpacked."""
    sizes = dict.fromkeys(Role, 0)
    for tensor in tensors(spec):
        sizes[tensor.role] += prod(tensor.shape)
    packed = sizes[Role.MATRIX] + sizes[Role.BIAS] + sizes[Role.SUMMED_BIAS]
    if spec.tied_embeddings:
        packed += spec.vocab_size * spec.hidden_size
    # A group of int8 codes has a float32 scale and an int32 sum.
    matrices = packed * (GROUP + 8) // GROUP if packed_int8 else packed * precision.compute.itemsize
    return 4 * sizes[Role.NORM] + matrices + sizes[Role.EMBEDDING] * precision.weights.itemsize


def _activations(
    spec: DecoderSpec, precision: Precision, config: EngineConfig, max_model_len: int
) -> int:
    """What one layer of the largest step holds at once: the flat batch's hidden states and
    projections, and the keys, values and scores that attention gathers for one long chunk."""
    item = precision.compute.itemsize
    heads = spec.num_heads + 2 * spec.num_kv_heads
    mlp = 2 * spec.intermediate_size * item
    if (experts := spec.experts) is not None:
        # One expert at a time, at worst of all tokens, beside the sum that it is added to.
        inner = max(experts.inner, experts.shared_inner or 0)
        mlp = max(mlp, 2 * inner * item + spec.hidden_size * (4 + 4 + item))
    attention = (2 * heads + spec.num_heads) * spec.head_dim * item
    rotated = 2 * 4 * (heads - spec.num_kv_heads) * spec.head_dim
    per_token = spec.hidden_size * (4 + 4 + 2 * item) + max(mlp, attention + rotated)
    gathered = 2 * spec.num_kv_heads * spec.head_dim * item * max_model_len
    scores = 2 * QUERY_TILE * spec.num_heads * item * max_model_len
    return config.max_batched_tokens * per_token + gathered + scores


def _native_activations(spec: DecoderSpec, config: EngineConfig) -> int:
    """The buffers of a step program: see `shoal.kernels.native.Buffer`."""
    heads = 2 * spec.num_heads + 2 * spec.num_kv_heads
    per_token = 6 * spec.hidden_size + 2 * heads * spec.head_dim + 2 * spec.intermediate_size
    return config.max_batched_tokens * per_token


def _workspace(
    spec: DecoderSpec, config: EngineConfig, max_model_len: int, per_sequence: int
) -> int:
    state = 8 * config.max_num_seqs * (max_model_len + 1 + per_sequence)
    rope = sum(8 * max_model_len * rope.rotary_dim // 2 for rope in spec.ropes)
    rows = min(config.max_num_seqs, config.max_batched_tokens) + LOGIT_ROWS
    return state + rope + SAMPLER_COPIES * 4 * rows * spec.vocab_size
