"""The seam between engine and device: plans in, sampled tokens out."""

from abc import ABC, abstractmethod
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


class DeviceLost(RuntimeError):
    """What computes is gone, with everything in flight: only a new process helps."""


class Executor(Protocol):
    """Runs the model over slots and KV blocks. One owner: the engine's thread.

    Plans are computed in the order of their submission: what a plan stores is there for all that
    come after it.
    """

    info: ModelInfo
    num_blocks: int  # block 0 is null and never handed out
    block_size: int

    @property
    def depth(self) -> int:
        """Plans that may be submitted and not yet collected; more than one keeps the stages of a
        pipeline busy."""
        ...

    @property
    def relays(self) -> bool:
        """Whether a plan may have the row of a token that a plan under way is to draw: the device
        reads what it drew, and nobody waits for the answer."""
        ...

    @property
    def lost(self) -> str | None:
        """Why the device is gone, or None while it is there. Any thread may read it."""
        ...

    def submit(self, plan: StepPlan) -> None:
        """Begins a plan that has rows. At most `depth` are under way. Raises as `collect`."""
        ...

    def collect(self) -> StepResult:
        """Waits for the oldest plan under way and returns a `Sampled` for each of its rows with
        `sample` set, in their order. Raises only if the device failed, and then drops all plans
        under way: an error of one row is in its result. DeviceLost: it failed for good."""
        ...

    def close(self) -> None:
        """Frees the device's memory. Idempotent."""
        ...


class SerialExecutor(ABC):
    """An `Executor` that computes one plan at a time, in the caller's thread."""

    depth = 1
    relays = False
    lost: str | None = None
    _submitted: StepPlan | None = None

    @abstractmethod
    def execute(self, plan: StepPlan) -> StepResult:
        """Computes the plan; raises if the device failed."""

    def submit(self, plan: StepPlan) -> None:
        assert self._submitted is None, "one plan at a time"
        self._submitted = plan

    def collect(self) -> StepResult:
        plan, self._submitted = self._submitted, None
        assert plan is not None, "no plan was submitted"
        return self.execute(plan)
