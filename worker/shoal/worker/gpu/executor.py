"""The executor of one device: plans in, steps queued, answers when they are there.

The host is a step ahead: it prepares and queues step N + 1 while the device computes step N, and
waits for nothing but the tokens that step N drew. The device reads those itself (`relays`). A step
of decodes is a replayed graph over buffers that stay; any other is queued kernel by kernel.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shoal.kernels.flat import Ints
from shoal.worker.executor import DeviceLost, ModelInfo
from shoal.worker.gpu.answers import Answer, Likeliest, result_of
from shoal.worker.gpu.device import Device, Event
from shoal.worker.gpu.graphs import Graphs, drawn_of
from shoal.worker.gpu.model import DeviceModel
from shoal.worker.gpu.sampler import DeviceSampler
from shoal.worker.gpu.steps import (
    MixedStep,
    PromptAsk,
    decode_rows,
    even,
    graph_sizes,
    history_parts,
    joined,
    mixed_step,
    padded,
)
from shoal.worker.memory import LOGIT_ROWS
from shoal.worker.request import SamplingParams
from shoal.worker.step import Row, SlotInit, StepPlan, StepResult

DEPTH = 2  # a step that runs, and one behind it


# One for each kind of draw.
_EACH_DRAW = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0, top_p=0.9),
    SamplingParams(temperature=1.0, presence_penalty=0.1),
    SamplingParams(temperature=1.0, logit_bias={0: 1.0}),
)


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step under way."""

    answer: Answer
    done: Event


class GpuExecutor:
    """Implements `shoal.worker.executor.Executor`. Used by one thread."""

    depth = DEPTH
    relays = True
    lost: str | None = None
    standby = None  # these weights stay

    def __init__(
        self, model: DeviceModel, device: Device, clock: Callable[[], float], slots: int
    ) -> None:
        spec = model.decoder.spec
        self.info = ModelInfo(
            architecture=spec.architecture,
            vocab_size=spec.vocab_size,
            max_model_len=model.max_model_len,
            eos_token_ids=spec.eos_token_ids,
            bos_token_id=spec.bos_token_id,
            dtype=model.decoder.precision.name,
        )
        self.num_blocks = model.num_blocks
        self.block_size = model.block_size
        self.warm_up_rate = 0.0  # prompt tokens a second of `warm_up`; 0: there was none
        self._model = model
        self._device = device
        self._clock = clock
        self._sampler = DeviceSampler(model.state, spec, device, slots)
        self._graphs = Graphs(model, self._sampler, device, clock, graph_sizes(slots))
        self._table_len = np.zeros(slots, np.int64)
        self._asks: dict[int, PromptAsk] = {}  # by slot
        self._flights: deque[_Flight] = deque()
        # One a step under way: none is written to while the device may still read it.
        width = even(slots)
        self._staging = [device.pinned(3 * width, torch.int64) for _ in range(DEPTH)]
        self._drawn = [device.pinned(2 * width, torch.int64) for _ in range(DEPTH)]
        self._turn = 0
        self._closed = False

    def submit(self, plan: StepPlan) -> None:
        assert len(self._flights) < DEPTH, "no more plans than the depth"
        with self._dropping_all(), torch.inference_mode():
            self._enter(plan.init)
            rows = decode_rows(plan)
            answer = self._mixed(plan) if rows is None else self._decode(rows)
            self._flights.append(_Flight(answer, self._device.record()))
        self._turn = (self._turn + 1) % DEPTH

    def collect(self) -> StepResult:
        with self._dropping_all():
            flight = self._flights.popleft()
            flight.done.wait()
            return result_of(flight.answer)

    def execute(self, plan: StepPlan) -> StepResult:
        """One plan, and its result."""
        self.submit(plan)
        return self.collect()

    def warm_up(self, num_tokens: int) -> None:
        """A prefill, twice since the first compiles, a draw of each kind, and the smallest and the
        largest step of decodes; all on the null block, whose content nobody reads."""
        greedy, *others = _EACH_DRAW
        prefill = _entering((0,), num_tokens, greedy)
        self.execute(prefill)
        started = self._clock()
        self.execute(prefill)
        if (seconds := self._clock() - started) > 0:
            self.warm_up_rate = num_tokens / seconds
        self.execute(StepPlan(1, (), (), (Row(0, num_tokens, 1, sample=True),)))
        for sampling in others:
            self.execute(_entering((0,), 1, sampling))
        everyone = range(len(self._table_len))
        self.execute(_entering(everyone, 1, greedy))
        self.execute(StepPlan(1, (), (), tuple(Row(slot, 1, 1, sample=True) for slot in everyone)))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with suppress(RuntimeError):  # of a device that is lost
            self._device.settle()
        self._flights.clear()
        # All that holds memory of the device.
        del self._graphs, self._sampler, self._model

    @contextmanager
    def _dropping_all(self) -> Iterator[None]:
        """A failure drops all plans under way, once none reads the host's buffers any more. A
        device that has a fault (an address that is not there, memory that fails) does not get that
        far, now or later."""
        try:
            yield
        except Exception as error:
            self._flights.clear()
            try:
                self._device.settle()
            except Exception as fault:
                raise DeviceLost(f"{self._device.name}: {error}") from fault
            raise

    def _enter(self, init: tuple[SlotInit, ...]) -> None:
        for each in init:
            self._sampler.enter(each.slot, each.sampling, each.seed, each.prompt_len)
            self._asks.pop(each.slot, None)
            if each.sampling.prompt_logprobs is not None:
                likeliest = each.sampling.prompt_logprobs
                self._asks[each.slot] = PromptAsk(each.token_ids, each.prompt_len, likeliest)
        if init:
            self._sampler.upload()

    def _decode(self, rows: Ints) -> Answer:
        """A step of decodes: one small copy in, the graphs, one small copy out."""
        self._table_len[rows[0]] += rows[2] > 0
        count = rows.shape[1]
        size = self._graphs.size_for(count)
        width = even(size)
        staging = self._staging[self._turn][: 3 * width]
        staging.numpy()[:] = padded(rows, width, self._model.state.padding).reshape(-1)
        self._graphs.step[: 3 * width].copy_(staging, non_blocking=True)
        self._graphs.forward(size)
        return self._draw(rows[0], size, graph=True)

    def _mixed(self, plan: StepPlan) -> Answer:
        """A step with prefills, queued kernel by kernel."""
        step = mixed_step(plan, self._table_len, self._asks)
        arrays = step.arrays
        flat, sizes = joined(arrays)
        parts = [
            part.view(*array.shape[:-1], even(array.shape[-1]))[..., : array.shape[-1]]
            for part, array in zip(
                torch.split(self._device.upload(flat), sizes), arrays, strict=True
            )
        ]
        sampling, chosen = parts[6], parts[8]
        for slot, first, end in history_parts(plan.init):
            self._model.state.tokens[slot, : end - first].copy_(parts[0][first:end])
        normed = self._model.prefill(step, parts)
        count = step.sampling.shape[1]
        prompts = self._prompts(plan, step, normed[count:], chosen)
        if not count:
            return Answer(prompts=prompts)
        self._graphs.load(sampling, self._model.decoder.logits(normed[:count]))
        return self._draw(step.sampling[0], count, prompts, graph=False)

    def _draw(
        self,
        slots: Ints,
        size: int,
        prompts: tuple[Likeliest, ...] = (),
        *,
        graph: bool,
    ) -> Answer:
        """Draws for the rows that `graphs` holds, `size` of them with padding, and queues the
        copies that bring the tokens to the host."""
        count = len(slots)
        self._graphs.draw(size, self._sampler.kind(slots), graph=graph)
        drawn = self._drawn[self._turn][: 2 * even(size)]
        drawn.copy_(self._graphs.drawn[: 2 * even(size)], non_blocking=True)
        ids, how = drawn_of(drawn, size)
        likeliest = self._sampler.likeliest(
            self._graphs.logits[:count], self._graphs.drawn[:count], slots
        )
        return Answer(slots.tolist(), ids[:count], how[:count], likeliest, prompts)

    def _prompts(
        self, plan: StepPlan, step: MixedStep, normed: Tensor, chosen: Tensor
    ) -> tuple[Likeliest, ...]:
        """Logprobs of the prompts' tokens; normed and chosen [n] as `MixedStep` orders them."""
        parts, first = [], 0
        for row in plan.rows:
            if (ask := self._asks.get(row.slot)) is None:
                continue
            end = first + ask.rows(row)
            for begin in range(first, end, LOGIT_ROWS):
                until = min(begin + LOGIT_ROWS, end)
                logits = self._model.decoder.logits(normed[begin:until])
                place = row.start + 1 + begin - first
                parts.append(
                    self._sampler.prompt_part(
                        row.slot, place, logits, chosen[begin:until], ask.likeliest
                    )
                )
            first = end
        return tuple(parts)


def _entering(slots: Sequence[int], tokens: int, sampling: SamplingParams) -> StepPlan:
    """A prefill of so many tokens in each of the slots, on the null block."""
    init = tuple(SlotInit(slot, (0,) * tokens, tokens, sampling, slot, ()) for slot in slots)
    return StepPlan(0, init, (), tuple(Row(slot, 0, tokens, sample=True) for slot in slots))
