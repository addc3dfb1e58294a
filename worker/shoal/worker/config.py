"""Engine settings: one dataclass, filled from flags, from `LLM(...)` or from a pod's arguments.

Every field is a flag of `python -m shoal.worker` (kebab-case there). All but `device` and
`backend`, which are for comparing, `kv_cache_dtype`, which GPUs alone have, and
`memory_limit_bytes`, which is `spec.resources.memory`, are keys of `spec.engine` (camelCase there)
and flags of `shoal serve`.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Defaults are those of the InferenceService. Sizes are in tokens unless said otherwise."""

    max_model_len: int | None = None  # None: what the model was trained for, at most 8192
    max_num_seqs: int = 256
    max_batched_tokens: int = 2048  # a step's token budget
    block_size: int = 16
    kv_cache_memory_fraction: float = 0.9  # of the room for the KV cache: see shoal.worker.memory
    kv_cache_blocks: int | None = None  # None: as many as the memory fraction holds
    kv_cache_dtype: str = "auto"  # auto | fp8 | int8, of a GPU; auto: that of the weights
    dtype: str = "auto"  # auto | bfloat16 | float16 | float32
    # auto | none | int8, and fp8 on a GPU, at load time; auto: as the checkpoint is
    quantization: str = "auto"
    enable_prefix_caching: bool = True
    max_prefill_tokens: int | None = None  # of one request in one step; None: half the budget
    threads: int | None = None  # of the CPU backend; None: the cores this process may use
    device: str = "auto"  # auto | cpu | cuda; auto: a GPU where there is one
    # auto | native | torch, of a CPU: native where it can compute the model | triton, of a GPU
    backend: str = "auto"
    memory_limit_bytes: int | None = None  # of the process on a CPU; None: what is available


EXECUTORS = ("auto", "process", "ray")


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """How many ranks compute the model, and where they run: `spec.parallelism`. Each of them has
    the engine's `threads`, or its part of the cores of its host."""

    tensor: int = 1  # ranks that share every layer
    pipeline: int = 1  # stages of consecutive layers
    # auto: this process for one rank, processes of this host for several; ray: actors of a Ray
    # cluster, on as many hosts as it has
    executor: str = "auto"
    ray_address: str | None = None  # of a running cluster's head; None: a cluster of this host

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline

    @property
    def in_process(self) -> bool:
        """Whether the engine's own process computes."""
        return self.ranks == 1 and self.executor == "auto"
