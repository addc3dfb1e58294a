"""A rank's layers as a backend, and the executor over it.

Every lane of a stage has the same residual, bit by bit: what its heads and inner columns add is a
share, and the sum of the shares is the same on all lanes.
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from shoal.kernels.flat import FlatBatch, Ints
from shoal.kernels.paged import CacheShape
from shoal.worker.memory import LOGIT_ROWS
from shoal.worker.model.backend import Backend, TorchBackend
from shoal.worker.model.decoder import Decoder
from shoal.worker.model.layers import DecoderLayer, ProjectedHeads
from shoal.worker.model.loader import Packer
from shoal.worker.model.reader import Checkpoint, Clock, WeightReader
from shoal.worker.model.spec import QkNorm
from shoal.worker.model.weights import WeightError
from shoal.worker.parallel.comm import Comm
from shoal.worker.parallel.heads import NormedTogether
from shoal.worker.parallel.layout import Share
from shoal.worker.parallel.messages import WirePlan
from shoal.worker.parallel.part import Part
from shoal.worker.runner import InProcessExecutor
from shoal.worker.sampler import logprob_entries
from shoal.worker.step import PromptLogprobs, Row, Sampled, StepResult

_WARM_UP_TOKENS = 64
WEIGHTS_STAY = "a model that several ranks compute keeps its weights"


class Timings:
    """Where a rank's time goes, in seconds since it was last asked."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last = clock()
        self._zero()

    def heard(self) -> None:
        """A plan came."""
        now = self._clock()
        self.waiting += now - self._last
        self._last = now

    def done(self) -> None:
        """It is computed, and answered."""
        now = self._clock()
        self.busy += now - self._last
        self._last = now
        self.steps += 1

    @contextmanager
    def of_lanes(self) -> Iterator[None]:
        started = self._clock()
        yield
        self.lanes += self._clock() - started

    @contextmanager
    def of_links(self) -> Iterator[None]:
        started = self._clock()
        yield
        self.links += self._clock() - started

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
        self._last = self._clock()
        return found

    def _zero(self) -> None:
        self.steps = 0
        self.waiting = self.busy = self.lanes = self.links = 0.0


class Exchange:
    """A rank's ways to the others, timed, and which rows of the vocabulary are its own."""

    def __init__(self, share: Share, comm: Comm, hidden: int, vocab: int, clock: Clock) -> None:
        """`hidden` and `vocab` are the whole model's."""
        self.place = share.place
        self.timings = Timings(clock)
        self._rows = share.vocab
        self._comm = comm
        self._hidden, self._vocab = hidden, vocab

    @property
    def begins(self) -> bool:
        """Whether the residual comes from tokens here, not from a stage before."""
        return self._comm.before is None

    def sum_(self, values: Tensor) -> Tensor:
        """values becomes its sum over the lanes."""
        if self.place.lanes > 1:
            with self.timings.of_lanes():
                self._comm.lanes.add_(values)
        return values

    def receive(self, tokens: int) -> Tensor:
        """The residual of the stage before: [tokens, hidden] float32."""
        assert self._comm.before is not None, "the first stage has none before it"
        with self.timings.of_links():
            return self._comm.before.receive(torch.empty(tokens, self._hidden))

    def pass_on(self, residual: Tensor) -> bool:
        """Sends [tokens, hidden] to the stage after; False where there is none."""
        if self._comm.after is None:
            return False
        with self.timings.of_links():
            self._comm.after.send(residual)
        return True

    def embedded(self, ids: Tensor, lookup: Callable[[Tensor], Tensor]) -> Tensor:
        """`lookup` gives [tokens, hidden] float32 for rows of this lane's part of the embedding."""
        if self.place.lanes == 1:
            return lookup(ids)
        own = ids - self._rows.first
        foreign = (own < 0) | (own >= self._rows.size)
        residual = lookup(own.masked_fill_(foreign, 0))
        residual.masked_fill_(foreign.unsqueeze(1), 0.0)
        return self.sum_(residual)

    def gathered(self, logits: Tensor) -> Tensor | None:
        """[rows, this lane's part of the vocabulary] -> [rows, vocab] on lane 0, None elsewhere."""
        if self.place.lanes == 1:
            return logits
        with self.timings.of_lanes():
            whole = self._comm.lanes.gather(logits)
        return None if whole is None else whole[:, : self._vocab].contiguous()


class StageBackend(Backend, Protocol):
    """What computes a rank's layers. All lanes of a stage make the same calls."""

    name: str
    exchange: Exchange

    def gathered_logits(self, hidden: Tensor) -> Tensor | None:
        """hidden [rows, hidden] -> [rows, vocab] on lane 0 of the last stage, None elsewhere."""
        ...


class TorchStage(TorchBackend):
    """Torch's operations, one by one."""

    name = "torch"

    def __init__(self, part: Part, exchange: Exchange, num_blocks: int) -> None:
        """Reads the rank's weights."""
        spec = part.spec
        shape = CacheShape(num_blocks, part.config.block_size, spec.num_kv_heads, spec.head_dim)
        self.exchange = exchange
        self._positions: Tensor | None = None  # [learned_positions, hidden]
        super().__init__(self._load(part), shape, part.max_model_len, part.quantize)
        self.spec = part.whole

    def forward(self, batch: FlatBatch, rows: Ints) -> Tensor:
        ids, positions = torch.from_numpy(batch.ids), torch.from_numpy(batch.positions)
        wanted = torch.from_numpy(rows)
        inputs = self.inputs(batch)
        if self.exchange.begins:
            residual = self.exchange.embedded(ids, lambda own: self._decoder.embed(own, positions))
            if self._positions is not None:
                residual.add_(self._positions.index_select(0, positions))
        else:
            residual = self.exchange.receive(len(ids))
        if self.exchange.place.last:
            return self._decoder.run(residual, inputs, wanted)
        residual = self._decoder.run(residual, inputs)
        self.exchange.pass_on(residual)
        return residual.index_select(0, wanted)

    def gathered_logits(self, hidden: Tensor) -> Tensor | None:
        if not self.exchange.place.last:
            return None
        return self.exchange.gathered(self._decoder.logits(hidden))

    def sibling(self, checkpoint: Checkpoint) -> "TorchStage":
        raise WeightError(WEIGHTS_STAY)

    def _load(self, part: Part) -> Decoder:
        place, spec = part.share.place, part.spec
        read = WeightReader(Checkpoint(spec, part.source), part.precision)
        pack = Packer(spec, part.precision, quantize=part.quantize)
        tied = place.last and spec.tied_embeddings
        embedding = read.embedding() if place.first or tied else None
        if place.first:
            self._positions = read.positions()
        layers = tuple(
            self._divided(pack.layer(layer, read.layer(index)), part)
            for index, layer in enumerate(spec.layers)
        )
        norm = head = None
        if place.last:
            norm = pack.norm(read.norm())
            head = pack.linear(read.head(embedding))
        return Decoder(
            spec=spec,
            precision=part.precision,
            embedding=embedding if place.first else None,
            positions=None,  # added once, after the sum over lanes
            layers=layers,
            norm=norm,
            head=head,
            reduce=self.exchange.sum_,
        )

    def _divided(self, layer: DecoderLayer, part: Part) -> DecoderLayer:
        """The layer, whose heads may be normed together with those of other lanes."""
        heads = layer.heads
        if part.share.place.lanes == 1 or part.spec.qk_norm is not QkNorm.ALL_HEADS:
            return layer
        assert isinstance(heads, ProjectedHeads), "latent heads are not normed"
        assert heads.query_norm is not None and heads.key_norm is not None
        together = NormedTogether(
            part.spec,
            part.whole,
            heads.qkv,
            heads.query_norm,
            heads.key_norm,
            part.share.kv_holders,
            self.exchange.sum_,
        )
        return replace(layer, heads=together)


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
        self.timings = backend.exchange.timings
        self.warm_up_tokens = min(
            _WARM_UP_TOKENS, part.max_model_len - 1, part.config.max_batched_tokens
        )
        self._stage = backend

    def digest(self) -> int:
        """Of all block tables: equal on all ranks after the same plans."""
        return zlib.crc32(self._tables.tobytes(), zlib.crc32(self._table_len.tobytes()))

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
