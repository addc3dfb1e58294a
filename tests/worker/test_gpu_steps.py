"""A plan as the arrays that a device reads, the sizes of graphs, and the memory that is left."""

import numpy as np
import pytest
import torch

from shoal.worker.config import EngineConfig
from shoal.worker.gpu.device import HostDevice
from shoal.worker.gpu.memory import DeviceMemory, largest_step
from shoal.worker.gpu.source import DeviceSource
from shoal.worker.gpu.steps import (
    PromptAsk,
    decode_rows,
    graph_sizes,
    history_parts,
    joined,
    mixed_step,
    padded,
)
from shoal.worker.memory import NotEnoughMemory
from shoal.worker.request import SamplingParams
from shoal.worker.step import Row, SlotBlocks, SlotInit, StepPlan

GREEDY = SamplingParams(temperature=0.0)
MIB = 1 << 20


def enter(slot: int, tokens: tuple[int, ...], blocks: tuple[int, ...]) -> SlotInit:
    return SlotInit(slot, tokens, len(tokens), GREEDY, 0, blocks)


def test_decodes_are_three_numbers_a_row() -> None:
    """Slot, position and the block that the position begins."""
    rows = (Row(3, 16, 1, True), Row(1, 5, 1, True))
    found = decode_rows(StepPlan(7, (), (SlotBlocks(3, (9,)),), rows))
    assert found is not None and found.tolist() == [[3, 1], [16, 5], [9, 0]]
    assert padded(found, 4, 8).tolist() == [[3, 1, 8, 8], [16, 5, 0, 0], [9, 0, 0, 0]]


@pytest.mark.parametrize(
    "plan",
    [
        StepPlan(0, (enter(0, (1,), (1,)),), (), (Row(0, 0, 1, True),)),
        StepPlan(0, (), (), (Row(0, 3, 2, True),)),
        StepPlan(0, (), (), (Row(0, 3, 1, False),)),
        StepPlan(0, (), (SlotBlocks(1, (4,)),), (Row(0, 3, 1, True),)),
        StepPlan(0, (), (SlotBlocks(0, (4, 5)),), (Row(0, 16, 1, True),)),
    ],
)
def test_what_is_more_than_decodes_is_no_graph(plan: StepPlan) -> None:
    """A sequence that enters, a chunk, a row that draws nothing, tables that grow otherwise."""
    assert decode_rows(plan) is None


def test_a_mixed_step_says_whose_each_token_is() -> None:
    """One sequence enters with a chunk that ends its prompt, one goes on with a chunk that does
    not, one decodes and grows; the first one's prompt has logprobs."""
    init = (enter(2, (10, 11, 12), (5,)),)
    rows = (Row(0, 32, 1, True), Row(2, 0, 3, True), Row(1, 4, 2, False))
    plan = StepPlan(0, init, (SlotBlocks(0, (7,)),), rows)
    table_len = np.array([2, 1, 9])
    asks = {2: PromptAsk((10, 11, 12), 3, 1)}
    step = mixed_step(plan, table_len, asks)
    assert step.history.tolist() == [10, 11, 12]
    assert history_parts(init) == [(2, 0, 3)]
    assert step.updates.tolist() == [[2, 0], [0, 2], [5, 7]]
    assert table_len.tolist() == [3, 1, 1]
    assert step.tokens.tolist() == [[0, 2, 2, 2, 1, 1], [32, 0, 1, 2, 4, 5]]
    assert step.slots.tolist() == [0, 2, 1]
    assert step.query_starts.tolist() == [0, 1, 4, 6]
    assert step.lengths.tolist() == [33, 3, 6]
    assert step.sampling.tolist() == [[0, 2], [32, 2], [0, 0]]
    assert step.wanted.tolist() == [0, 3, 1, 2]  # two that draw, then the prompt's first two
    assert step.chosen.tolist() == [11, 12]
    assert (step.max_queries, step.max_length) == (4, 33)


def test_what_goes_to_the_device_lies_on_16_bytes() -> None:
    """Each row begins at an even place, so that kernels are compiled for one alignment; arrays of
    nothing take no place."""
    arrays = [np.arange(3), np.zeros((3, 0), np.int64), np.arange(6).reshape(2, 3), np.zeros(0)]
    flat, sizes = joined([array.astype(np.int64) for array in arrays])
    assert flat.tolist() == [0, 1, 2, 0, 0, 1, 2, 0, 3, 4, 5, 0]
    assert sizes == [4, 0, 8, 0]


def test_graphs_have_few_sizes() -> None:
    """Close together where a row costs most, and the largest is the engine's."""
    assert graph_sizes(1) == (1,)
    assert graph_sizes(5) == (1, 2, 4, 5)
    assert graph_sizes(40) == (1, 2, 4, 8, 16, 24, 32, 40)
    sizes = graph_sizes(256)
    assert sizes[-4:] == (160, 192, 224, 256) and len(sizes) == 19
    assert graph_sizes(300)[-2:] == (256, 300)


def test_the_cache_takes_its_share_of_what_is_left() -> None:
    """Of the memory behind weights, the largest step, the slots' state and graphs."""
    memory = DeviceMemory(1000 * MIB, 100 * MIB, 50 * MIB, 50 * MIB, MIB)
    assert memory.blocks(EngineConfig(), 10_000) == 720
    assert memory.blocks(EngineConfig(), 300) == 300
    assert memory.blocks(EngineConfig(kv_cache_blocks=12), 300) == 12
    with pytest.raises(NotEnoughMemory, match="kv_cache_blocks is 801, and 800 MiB are left"):
        memory.blocks(EngineConfig(kv_cache_blocks=801), 10_000)
    with pytest.raises(NotEnoughMemory, match=r"step 1200.*Lower max_batched_tokens"):
        DeviceMemory(1000 * MIB, 1200 * MIB, 0, 0, MIB).blocks(EngineConfig(), 300)


def test_memory_is_measured_with_the_largest_step() -> None:
    """All the tokens of the budget, over as many sequences as may draw at once."""
    plan = largest_step(100, 8, 4096)
    assert plan.num_tokens == 100 and len(plan.rows) == 8
    assert all(row.sample for row in plan.rows)
    assert max(row.count for row in largest_step(5000, 2, 256).rows) == 255


class _Source:
    """A source of one tensor."""

    origin = "here"
    bytes_read = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.shapes = {"t": tuple(tensor.shape)}

    def read(self, name: str) -> torch.Tensor:
        return self.tensor

    def read_runs(self, name: str, dim: int, runs: list[tuple[int, int]]) -> torch.Tensor:
        return torch.cat([self.tensor.narrow(dim, a, b - a) for a, b in runs], dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 5), (1,), (0, 3), ()])
def test_weights_go_through_two_small_buffers(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Piece by piece, in turns, each buffer only once its copy is over; strides do not matter."""
    device = HostDevice(MIB)
    tensor = torch.randn(shape).to(dtype)
    source = DeviceSource(_Source(tensor), device, staging=16)
    assert torch.equal(source.read("t"), tensor)
    pieces = -(-tensor.nbytes // 16)
    assert device.waits == max(0, pieces - 2)
    if len(shape) == 2:
        assert torch.equal(DeviceSource(_Source(tensor.t()), device).read("t"), tensor.t())
