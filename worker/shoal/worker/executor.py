"""The seam between engine and device: one plan in, sampled tokens out."""

from dataclasses import dataclass
from typing import Protocol

from shoal.worker.step import StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the engine and the router need to know of a loaded model."""

    architecture: str
    vocab_size: int
    max_model_len: int  # prompt and generated tokens together, at most
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str  # bfloat16 | float16 | float32


class Executor(Protocol):
    """Runs the model over slots and KV blocks. One owner: the engine's thread."""

    info: ModelInfo
    num_blocks: int  # block 0 is null and never handed out
    block_size: int

    def execute(self, plan: StepPlan) -> StepResult:
        """Computes the plan's rows and returns a `Sampled` for each with `sample` set,
        in their order. Raises only if the device failed: an error of one row is in its result."""
        ...

    def close(self) -> None:
        """Frees the device's memory. Idempotent."""
        ...
