"""The account of a device's memory: what is left for the KV cache, by measurement."""

from dataclasses import dataclass

from shoal.worker.config import EngineConfig
from shoal.worker.memory import NotEnoughMemory
from shoal.worker.request import SamplingParams
from shoal.worker.step import Row, SlotInit, StepPlan

_MIB = 1 << 20
MIN_BLOCKS = 2  # the null block and one to use


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a device, weights loaded."""

    free: int  # before anything but the weights is allocated
    step: int  # what the largest step takes at its peak: measured
    state: int  # of slots: tokens, tables, counts; and the buffers of decode steps
    graphs: int
    block_bytes: int

    def blocks(self, config: EngineConfig, most: int) -> int:
        """As `config` says, at most `most`. Raises NotEnoughMemory if no block fits."""
        room = max(0, self.free - self.step - self.state - self.graphs)
        fitting = int(config.kv_cache_memory_fraction * room) // self.block_bytes
        source = f"{room // _MIB} MiB are left for it"
        if (asked := config.kv_cache_blocks) is not None:
            source = f"kv_cache_blocks is {asked}, and {source}"
            fitting = asked if asked * self.block_bytes <= room else 0
        if fitting < MIN_BLOCKS:
            raise NotEnoughMemory(
                f"the KV cache does not fit: {source}, a block takes {self.block_bytes} bytes and "
                f"at least {MIN_BLOCKS} are needed; {self.describe()}. Lower max_batched_tokens, "
                "max_num_seqs or max_model_len"
            )
        return min(fitting, most)

    def describe(self) -> str:
        parts = ", ".join(
            f"{name} {getattr(self, name) // _MIB}" for name in ("free", "step", "state", "graphs")
        )
        return f"MiB behind the weights: {parts}"


def largest_step(tokens: int, slots: int, max_model_len: int) -> StepPlan:
    """As many tokens as a step may have, of as many sequences as may draw, on the null block."""
    sequences = min(slots, tokens)
    rows, init = [], []
    sampling = SamplingParams(temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.1)
    for slot in range(sequences):
        share = tokens // sequences + (slot < tokens % sequences)
        count = min(share, max_model_len - 1)
        init.append(SlotInit(slot, (0,) * count, count, sampling, slot, ()))
        rows.append(Row(slot, 0, count, sample=True))
    return StepPlan(0, tuple(init), (), tuple(rows))
