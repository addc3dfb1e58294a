"""A rank's layers as a backend, and the executor over it.

Every lane of a stage has the same residual, bit by bit: what its heads and inner columns add is a
share, and the sum of the shares is the same on all lanes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from shoal.kernels.flat import FlatBatch, Ints
from shoal.kernels.paged import CacheShape
from shoal.worker.memory import LOGIT_ROWS
from shoal.worker.model.backend import Backend, TorchBackend
from shoal.worker.model.decoder import Decoder, alone
from shoal.worker.model.loader import Packer
from shoal.worker.model.reader import Checkpoint, WeightReader
from shoal.worker.parallel.comm import Comm, Link
from shoal.worker.parallel.messages import WirePlan
from shoal.worker.parallel.part import Part
from shoal.worker.runner import InProcessExecutor
from shoal.worker.sampler import logprob_entries
from shoal.worker.step import PromptLogprobs, Row, Sampled, StepResult

_WARM_UP_TOKENS = 64


class Timings:
    """Where a rank's time goes, in seconds since it was last asked."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._last = clock()
        self._zero()

    def heard(self) -> None:
        """A plan came."""
        now = self.clock()
        self.waiting += now - self._last
        self._last = now

    def done(self) -> None:
        """It is computed, and answered."""
        now = self.clock()
        self.busy += now - self._last
        self._last = now
        self.steps += 1

    def taken(self) -> dict[str, float]:
        """`steps`; `waiting` for plans; `busy` with them; of that `lanes` and `links` were
        exchanges with the ranks of the same stage and of others, waits for them included."""
        found = {
            "steps": float(self.steps),
            "waiting": self.waiting,
            "busy": self.busy,
            "lanes": self.lanes,
            "links": self.links,
        }
        self._zero()
        self._last = self.clock()
        return found

    def _zero(self) -> None:
        self.steps = 0
        self.waiting = self.busy = self.lanes = self.links = 0.0


class StageBackend(TorchBackend):
    """Implements `shoal.worker.model.backend.Backend` for one rank, but for the logits, which one
    lane has alone. All lanes of a stage make the same calls."""

    name = "torch"

    def __init__(self, part: Part, comm: Comm, num_blocks: int, timings: Timings) -> None:
        """Reads the rank's weights."""
        spec = part.spec
        shape = CacheShape(num_blocks, part.config.block_size, spec.num_kv_heads, spec.head_dim)
        self._place = part.share.place
        self._vocab = part.share.vocab
        self._lanes, self._before, self._after = comm.lanes, comm.before, comm.after
        self._positions: Tensor | None = None  # [learned_positions, hidden]
        self.timings = timings
        super().__init__(self._load(part), shape, part.max_model_len, part.quantize)
        self.spec = part.whole

    def forward(self, batch: FlatBatch, rows: Ints) -> Tensor:
        ids, positions = torch.from_numpy(batch.ids), torch.from_numpy(batch.positions)
        wanted = torch.from_numpy(rows)
        inputs = self.inputs(batch)
        if self._before is None:
            residual = self._embed(ids, positions)
        else:
            residual = self._receive(self._before, len(ids))
        if self._after is None:
            return self._decoder.run(residual, inputs, wanted)
        residual = self._decoder.run(residual, inputs)
        self._send(self._after, residual)
        return residual.index_select(0, wanted)

    def gathered_logits(self, hidden: Tensor) -> Tensor | None:
        """hidden [rows, hidden] -> [rows, vocab] on lane 0 of the last stage, None elsewhere."""
        if not self._place.last:
            return None
        part = self._decoder.logits(hidden)
        if self._place.lanes == 1:
            return part
        started = self.timings.clock()
        whole = self._lanes.gather(part)
        self.timings.lanes += self.timings.clock() - started
        return None if whole is None else whole[:, : self.spec.vocab_size].contiguous()

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        if self._place.lanes == 1:
            residual = self._decoder.embed(ids, positions)
        else:
            own = ids - self._vocab.first
            foreign = (own < 0) | (own >= self._vocab.size)
            residual = self._decoder.embed(own.masked_fill_(foreign, 0), positions)
            residual.masked_fill_(foreign.unsqueeze(1), 0.0)
            self._reduce(residual)
        if self._positions is not None:
            residual.add_(self._positions.index_select(0, positions))
        return residual

    def _reduce(self, values: Tensor) -> Tensor:
        started = self.timings.clock()
        self._lanes.add_(values)
        self.timings.lanes += self.timings.clock() - started
        return values

    def _receive(self, link: Link, tokens: int) -> Tensor:
        started = self.timings.clock()
        residual = link.receive(torch.empty(tokens, self.spec.hidden_size))
        self.timings.links += self.timings.clock() - started
        return residual

    def _send(self, link: Link, residual: Tensor) -> None:
        started = self.timings.clock()
        link.send(residual)
        self.timings.links += self.timings.clock() - started

    def _load(self, part: Part) -> Decoder:
        place, spec = part.share.place, part.spec
        read = WeightReader(Checkpoint(spec, part.source), part.precision)
        pack = Packer(spec, part.precision, quantize=part.quantize)
        tied = place.last and spec.tied_embeddings
        embedding = read.embedding() if place.first or tied else None
        if place.first:
            self._positions = read.positions()
        layers = tuple(
            pack.layer(layer, read.layer(index)) for index, layer in enumerate(spec.layers)
        )
        norm = head = None
        if place.last:
            norm = pack.norm(read.norm())
            head = pack.linear(read.head(embedding))
        return Decoder(
            spec=spec,
            precision=part.precision,
            embedding=embedding if place.first else None,
            positions=None,
            layers=layers,
            norm=norm,
            head=head,
            reduce=self._reduce if place.lanes > 1 else alone,
        )


class StageExecutor(InProcessExecutor):
    """Keeps the slots of a rank. The rank that answers draws the tokens; the others are told."""

    def __init__(self, backend: StageBackend, part: Part, num_blocks: int) -> None:
        super().__init__(
            backend,
            num_blocks=num_blocks,
            block_size=part.config.block_size,
            max_model_len=part.max_model_len,
            slots=part.config.max_num_seqs,
        )
        self.place = part.share.place
        self.timings = backend.timings
        self.warm_up_tokens = min(_WARM_UP_TOKENS, part.max_model_len - 1)
        self._stage = backend

    def compute(self, wire: WirePlan) -> StepResult:
        """The plan's result, which is empty on ranks that do not answer."""
        for drawn in wire.drawn:
            self._tokens[drawn.slot, drawn.position] = drawn.token_id
        return self.execute(wire.plan)

    def _sample(
        self, hidden: Tensor, slots: Ints, lengths: Ints, backend: Backend
    ) -> list[Sampled]:
        logits = self._stage.gathered_logits(hidden)
        if logits is None:
            return []
        sampled = self._sampler.sample(logits, slots, lengths, self._tokens)
        self._tokens[slots, lengths] = [result.token_id for result in sampled]
        return sampled

    def _prompt_entries(self, row: Row, hidden: Tensor, backend: Backend) -> PromptLogprobs:
        likeliest = self._prompt_logprobs[row.slot][1]
        following = torch.from_numpy(self._tokens[row.slot, row.start + 1 :])
        entries = []
        for first in range(0, len(hidden), LOGIT_ROWS):
            part = hidden[first : first + LOGIT_ROWS]
            chosen = following[first : first + len(part)]
            logits = self._stage.gathered_logits(part)
            if logits is not None:
                entries += logprob_entries(logits, chosen, [likeliest] * len(part))
        return PromptLogprobs(row.slot, row.start + 1, tuple(entries))
