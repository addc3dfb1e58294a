"""The executor of one device: slots, caches and one forward pass a step, in this process."""

import logging
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from shoal.kernels.flat import FlatBatch, Ints
from shoal.kernels.paged import CacheShape, flat_order
from shoal.kernels.quant import GROUP, quantize_int8
from shoal.worker.config import EngineConfig
from shoal.worker.executor import ModelInfo, SerialExecutor
from shoal.worker.foreign import create_foreign_backend
from shoal.worker.host import available_memory, resident_memory, usable_cores
from shoal.worker.memory import LOGIT_ROWS, MemoryPlan, plan_memory
from shoal.worker.model.backend import Backend, TorchBackend
from shoal.worker.model.loader import LoadTimes, Quantize, load_decoder, open_checkpoint
from shoal.worker.model.native import NativeBackend, unfit
from shoal.worker.model.packed import PackedStore
from shoal.worker.model.precision import Precision, choose_precision
from shoal.worker.model.spec import DecoderSpec
from shoal.worker.model.weights import UnknownArchitecture
from shoal.worker.request import SamplingParams
from shoal.worker.sampler import Sampler, logprob_entries
from shoal.worker.step import PromptLogprobs, Row, Sampled, SlotInit, StepPlan, StepResult

if TYPE_CHECKING:
    from shoal.worker.standby import Standby

log = logging.getLogger(__name__)

DEFAULT_MAX_MODEL_LEN = 8192
BACKENDS = ("auto", "native", "torch")  # of a CPU
QUANTIZATIONS = ("auto", "none", "int8")
_WARM_UP_TOKENS = 64


class InProcessExecutor(SerialExecutor):
    """Implements `shoal.worker.executor.Executor`. Used by one thread."""

    def __init__(
        self, backend: Backend, *, num_blocks: int, block_size: int, max_model_len: int, slots: int
    ) -> None:
        spec = backend.spec
        self.info = ModelInfo(
            architecture=spec.architecture,
            vocab_size=spec.vocab_size,
            max_model_len=max_model_len,
            eos_token_ids=spec.eos_token_ids,
            bos_token_id=spec.bos_token_id,
            dtype=backend.dtype,
        )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._backends = {0: backend}  # by number of the set of weights; they share the caches
        # A row a slot. The last token of a full sequence is stored, though never computed.
        self._tokens = np.zeros((slots, max_model_len + 1), np.int64)
        self._tables = np.zeros((slots, -(-max_model_len // block_size)), np.int64)
        self._table_len = np.zeros(slots, np.int64)
        self._weights = [0] * slots  # number of the set that computes the slot
        self._sampler = Sampler(slots, spec.vocab_size, spec.eos_token_ids)
        self._prompt_logprobs: dict[int, tuple[int, int]] = {}  # slot -> (prompt_len, likeliest)
        self._tainted: set[int] = set()  # blocks that may hold values that are not finite
        self.warm_up_rate = 0.0  # prompt tokens a second of `warm_up`; 0: there was none
        self.standby: Standby | None = None  # where other weights come from; None: nowhere

    def execute(self, plan: StepPlan) -> StepResult:
        with torch.inference_mode():
            for init in plan.init:
                self._enter(init)
            for grow in plan.grow:
                self._append_blocks(grow.slot, grow.block_ids)
            if self._tainted:
                self._scrub(plan.rows)
            return self._compute(plan.rows) if plan.rows else StepResult(())

    def warm_up(self, num_tokens: int, clock: Callable[[], float]) -> None:
        """A prefill and a decode step on the null block, whose content nobody reads unmasked."""
        init = SlotInit(0, (0,) * num_tokens, num_tokens, SamplingParams(temperature=0.0), 0, ())
        started = clock()
        self.execute(StepPlan(0, (init,), (), (Row(0, 0, num_tokens, sample=True),)))
        if (seconds := clock() - started) > 0:
            self.warm_up_rate = num_tokens / seconds
        self.execute(StepPlan(1, (), (), (Row(0, num_tokens, 1, sample=True),)))

    def backend(self, number: int) -> Backend:
        """The one that computes with a set of weights."""
        return self._backends[number]

    def adopt(self, number: int, backend: Backend) -> None:
        """Slots may run on this sibling's weights from now on. Any thread may call it."""
        self._backends[number] = backend

    def drop(self, number: int) -> None:
        """Lets a set of weights go that no slot runs on. One stays: it holds the caches too."""
        del self._backends[number]

    def close(self) -> None:
        backends, self._backends = self._backends, {}
        for backend in backends.values():
            backend.close()

    def _enter(self, init: SlotInit) -> None:
        slot, count = init.slot, len(init.token_ids)
        self._tokens[slot, :count] = init.token_ids
        self._tables[slot] = 0
        self._table_len[slot] = 0
        self._append_blocks(slot, init.block_ids)
        self._weights[slot] = init.weights
        self._sampler.set_slot(slot, init.sampling, init.seed, init.prompt_len)
        self._prompt_logprobs.pop(slot, None)
        if init.sampling.prompt_logprobs is not None:
            self._prompt_logprobs[slot] = (init.prompt_len, init.sampling.prompt_logprobs)

    def _append_blocks(self, slot: int, block_ids: tuple[int, ...]) -> None:
        have = int(self._table_len[slot])
        self._tables[slot, have : have + len(block_ids)] = block_ids
        self._table_len[slot] = have + len(block_ids)

    def _scrub(self, rows: tuple[Row, ...]) -> None:
        """Zeroes tainted blocks that this step begins to fill: what is masked must be finite,
        or one sequence's overflow would reach the next owner of its blocks."""
        for row in rows:
            first = -(-row.start // self.block_size)
            last = (row.start + row.count - 1) // self.block_size
            fresh = set(self._tables[row.slot, first : last + 1].tolist()) & self._tainted
            self._tainted -= fresh
            if fresh:
                next(iter(self._backends.values())).clear(sorted(fresh))

    def _compute(self, rows: tuple[Row, ...]) -> StepResult:
        """The rows of each set of weights as a batch of their own: no row reads what another
        set's row stores."""
        numbers = {self._weights[row.slot] for row in rows}
        if len(numbers) == 1:
            return self._run(rows, self._backends[numbers.pop()])
        parts = [
            self._run(
                tuple(row for row in rows if self._weights[row.slot] == number),
                self._backends[number],
            )
            for number in sorted(numbers)
        ]
        sampled = {found.slot: found for part in parts for found in part.sampled}
        return StepResult(
            tuple(sampled[row.slot] for row in rows if row.sample),
            tuple(prompt for part in parts for prompt in part.prompt_logprobs),
        )

    def _run(self, rows: tuple[Row, ...], backend: Backend) -> StepResult:
        slots = np.array([row.slot for row in rows])
        starts = np.array([row.start for row in rows])
        counts = np.array([row.count for row in rows])
        order = flat_order(starts, counts)
        ends = np.cumsum(counts[order])
        depth = int((starts + counts - 1).max()) // self.block_size + 1
        ids = [self._tokens[r.slot, r.start : r.start + r.count] for r in (rows[i] for i in order)]
        batch = FlatBatch.of(
            np.concatenate(ids), starts[order], counts[order], self._tables[slots[order], :depth]
        )
        last = np.empty_like(ends)  # flat row of each sequence's last token, in the plan's order
        last[order] = ends - 1
        asked = [(row, int(end)) for row, end in zip(rows, last, strict=True)]
        asked = [(row, end) for row, end in asked if row.slot in self._prompt_logprobs]
        wanted = [last, *(self._prompt_rows(row, end) for row, end in asked)]
        # Each row once: no step has more rows than tokens, which is what buffers are made for.
        distinct, places = np.unique(np.concatenate(wanted), return_inverse=True)
        hidden = backend.forward(batch, distinct)[torch.from_numpy(places)]
        self._note_overflow(hidden[: len(rows)], slots)
        bounds = np.cumsum([len(part) for part in wanted]).tolist()
        prompts = [
            self._prompt_entries(row, hidden[first:end], backend)
            for (row, _), (first, end) in zip(asked, pairwise(bounds), strict=True)
        ]
        sampling = np.flatnonzero([row.sample for row in rows])
        if not len(sampling):
            return StepResult((), tuple(part for part in prompts if part.entries))
        newest = hidden[torch.from_numpy(sampling)]
        sampled = self._sample(newest, slots[sampling], (starts + counts)[sampling], backend)
        return StepResult(tuple(sampled), tuple(part for part in prompts if part.entries))

    def _sample(
        self, hidden: torch.Tensor, slots: Ints, lengths: Ints, backend: Backend
    ) -> list[Sampled]:
        """Draws a token for each of these slots and notes it; `lengths`: the tokens they have."""
        logits = backend.logits(hidden)
        sampled = self._sampler.sample(logits, slots, lengths, self._tokens)
        self._tokens[slots, lengths] = [result.token_id for result in sampled]
        return sampled

    def _note_overflow(self, hidden: torch.Tensor, slots: np.ndarray) -> None:
        """Remembers the blocks of sequences whose newest hidden state is not finite."""
        finite = hidden.sum(-1).isfinite().numpy()
        for slot in () if finite.all() else slots[~finite]:
            self._tainted.update(self._tables[slot, : self._table_len[slot]].tolist())

    def _prompt_rows(self, row: Row, last: int) -> np.ndarray:
        """Flat rows of the tokens of `row` whose next token is of the prompt; `last` is the flat
        row of its last token."""
        prompt_len = self._prompt_logprobs[row.slot][0]
        count = max(0, min(row.count, prompt_len - 1 - row.start))
        first = last - row.count + 1
        return np.arange(first, first + count)

    def _prompt_entries(self, row: Row, hidden: torch.Tensor, backend: Backend) -> PromptLogprobs:
        likeliest = self._prompt_logprobs[row.slot][1]
        following = torch.from_numpy(self._tokens[row.slot, row.start + 1 :])
        entries = []
        for first in range(0, len(hidden), LOGIT_ROWS):
            part = hidden[first : first + LOGIT_ROWS]
            chosen = following[first : first + len(part)]
            entries += logprob_entries(backend.logits(part), chosen, [likeliest] * len(part))
        return PromptLogprobs(row.slot, row.start + 1, tuple(entries))


def create_executor(
    path: Path,
    config: EngineConfig,
    progress: Callable[[str, float], None],
    clock: Callable[[], float] = time.perf_counter,
    packed: Path | None = None,
) -> InProcessExecutor:
    """Loads the model at `path` (a .gguf file, or a folder of config.json and safetensors), to be
    computed on the CPU. `packed`: folder where packed weights are kept from one start to the next.

    `progress` is called with the name and seconds of each phase when it has ended: load, pack,
    kv, warm-up. Sets torch's threads, for the process. Raises WeightError for a checkpoint that
    cannot be used, NotEnoughMemory, and ValueError for a setting out of range.
    """
    torch.set_num_threads(config.threads or usable_cores())
    started = clock()
    precision = choose_precision(config.dtype)
    standby = True
    backend: Backend
    try:
        backend, memory, times = _known_backend(path, config, precision, clock, packed)
    except UnknownArchitecture as unknown:
        backend, memory = create_foreign_backend(
            path, config, precision, unknown, longest_sequence, clock
        )
        times, standby = LoadTimes(), False
    max_model_len = longest_sequence(backend.spec, config)
    progress("load", clock() - started - times.pack)
    progress("pack", times.pack)
    started = clock()
    executor = InProcessExecutor(
        backend,
        num_blocks=memory.num_blocks,
        block_size=config.block_size,
        max_model_len=max_model_len,
        slots=config.max_num_seqs,
    )
    progress("kv", clock() - started)
    started = clock()
    tokens = min(_WARM_UP_TOKENS, max_model_len - 1, config.max_batched_tokens)
    executor.warm_up(tokens, clock)
    if standby:
        from shoal.worker.standby import Standby  # here, as it speaks protobuf, which models do not

        executor.standby = Standby(executor, path, memory, config.memory_limit_bytes)
    progress("warm-up", clock() - started)
    return executor


def _known_backend(
    path: Path,
    config: EngineConfig,
    precision: Precision,
    clock: Callable[[], float],
    packed: Path | None,
) -> tuple[Backend, MemoryPlan, LoadTimes]:
    """For an architecture of the registry; UnknownArchitecture for another."""
    checkpoint = open_checkpoint(path)
    spec = checkpoint.spec
    max_model_len = longest_sequence(spec, config)
    quantize = quantizer(spec, config)
    native = _runs_native(spec, precision, config)
    memory = plan_memory(
        spec, precision, config, max_model_len, available_memory(), resident_memory(), native=native
    )
    log.info("memory: %s", memory.describe())
    if native:
        found = NativeBackend(
            checkpoint,
            precision,
            block_size=config.block_size,
            num_blocks=memory.num_blocks,
            max_model_len=max_model_len,
            max_tokens=config.max_batched_tokens,
            threads=torch.get_num_threads(),
            quantize=quantize,
            store=_store(packed, path, precision, config),
            clock=clock,
        )
        return found, memory, found.times
    decoder, times = load_decoder(checkpoint, precision, clock, quantize)
    shape = CacheShape(memory.num_blocks, config.block_size, spec.num_kv_heads, spec.head_dim)
    return TorchBackend(decoder, shape, max_model_len, quantize), memory, times


def _store(
    folder: Path | None, path: Path, precision: Precision, config: EngineConfig
) -> PackedStore | None:
    return (
        None if folder is None else PackedStore(folder, path, precision.name, config.quantization)
    )


def longest_sequence(spec: DecoderSpec, config: EngineConfig) -> int:
    """Tokens of any sequence, at most. ValueError for more than the model was trained for."""
    trained = spec.max_positions
    if (config.max_model_len or 0) > trained:
        raise ValueError(f"max_model_len is {config.max_model_len}, the model's limit is {trained}")
    return config.max_model_len or min(trained, DEFAULT_MAX_MODEL_LEN)


def quantizer(spec: DecoderSpec, config: EngineConfig) -> Quantize | None:
    """What `config.quantization` makes of a matrix; None: nothing. ValueError where it cannot."""
    if config.quantization not in QUANTIZATIONS:
        known = ", ".join(QUANTIZATIONS)
        raise ValueError(f"quantization is {config.quantization!r}, expected one of {known}")
    if config.quantization != "int8":
        return None
    for width in spec.input_widths:
        if width % GROUP:
            raise ValueError(
                f"quantization is int8, but {spec.architecture} has layers of {width} inputs, "
                f"expected a multiple of {GROUP}"
            )
    return quantize_int8


def _runs_native(spec: DecoderSpec, precision: Precision, config: EngineConfig) -> bool:
    """Whether the native library computes, as `config.backend` says. ValueError where it must
    and cannot."""
    if config.backend not in BACKENDS:
        raise ValueError(f"backend is {config.backend!r}, expected " + ", ".join(BACKENDS))
    if config.backend == "torch":
        return False
    why = unfit(spec, precision, config.block_size)
    if why is not None and config.backend == "native":
        raise ValueError(f"backend is native, but {why}")
    log.info("backend: %s", "native, AVX-512 BF16" if why is None else f"torch ({why})")
    return why is None
