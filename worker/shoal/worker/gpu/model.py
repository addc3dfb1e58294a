"""A decoder with its caches and the state of its slots: what computes a step on a device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.gpu.attention import AttentionBatch
from shoal.kernels.gpu.kv_cache import KvCache
from shoal.kernels.gpu.step_inputs import DecodeRows, SlotRows, gather_decode
from shoal.worker.gpu.decoder import DeviceDecoder
from shoal.worker.gpu.layers import StepInputs
from shoal.worker.gpu.steps import MixedStep


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """Queues the kernels of a step; never waits."""

    decoder: DeviceDecoder
    caches: Sequence[KvCache]  # one a layer
    state: SlotRows
    starts: Tensor  # [rows + 1] int32: 0, 1, 2 ..., where every sequence has one query
    max_model_len: int
    num_blocks: int
    block_size: int

    def decode(self, step: Tensor, rows: DecodeRows) -> Tensor:
        """A token of each of many sequences.

        step [3, rows] as for `gather_decode`; `rows` is where it writes to -> [rows, hidden], the
        last norm's output.
        """
        gather_decode(step, self.state, self.block_size, rows)
        count = step.shape[1]
        batch = AttentionBatch(
            self.starts[: count + 1], rows.lengths, rows.tables, 1, self.max_model_len
        )
        inputs = StepInputs(step[1], rows.places, batch)
        return self.decoder.forward(rows.ids, inputs, self.caches)

    def prefill(self, step: MixedStep, parts: Sequence[Tensor]) -> Tensor:
        """Any step. `parts`: the step's arrays on the device -> [wanted, hidden]."""
        _, updates, tokens, slots, starts, lengths, _, wanted, _ = parts
        state = self.state
        if updates.shape[1]:
            places = updates[0] * state.tables.shape[1] + updates[1]
            state.tables.view(-1).scatter_(0, places, updates[2].to(torch.int32))
        owners, positions = tokens
        ids = state.tokens.view(-1).index_select(0, owners * state.tokens.shape[1] + positions)
        places = owners * state.tables.shape[1] + positions // self.block_size
        blocks = state.tables.view(-1).index_select(0, places).long()
        batch = AttentionBatch(
            starts.to(torch.int32),
            lengths.to(torch.int32),
            state.tables.index_select(0, slots),
            step.max_queries,
            step.max_length,
        )
        inputs = StepInputs(
            positions, blocks * self.block_size + positions % self.block_size, batch
        )
        return self.decoder.forward(ids.long(), inputs, self.caches, wanted)


def device_model(
    decoder: DeviceDecoder,
    *,
    num_blocks: int,
    block_size: int,
    max_model_len: int,
    slots: int,
    cache: torch.dtype,
    device: torch.device,
) -> DeviceModel:
    """With caches and state of its own for so many sequences at a time."""
    spec = decoder.spec
    return DeviceModel(
        decoder=decoder,
        caches=[
            KvCache.allocate(
                num_blocks, spec.num_kv_heads, block_size, spec.head_dim, cache, device
            )
            for _ in spec.layers
        ],
        # The last token of a full sequence is stored, though never computed.
        state=SlotRows.allocate(slots, max_model_len + 1, -(-max_model_len // block_size), device),
        starts=torch.arange(slots + 1, dtype=torch.int32, device=device),
        max_model_len=max_model_len,
        num_blocks=num_blocks,
        block_size=block_size,
    )
