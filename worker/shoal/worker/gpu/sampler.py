"""Sampling parameters of all slots on the device, and the draw of a step's rows.

Parameters go to the device when a sequence enters its slot, once. What a step asks of the host is
only which kind of draw serves all its rows; the kinds without lists of ids can be recorded.
"""

import enum
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from shoal.kernels.flat import Ints
from shoal.kernels.gpu.logprobs import MOST, logprobs
from shoal.kernels.gpu.sampling import (
    Bias,
    Entries,
    Forbidden,
    Penalties,
    SamplingBatch,
    SamplingWorkspace,
    sample,
)
from shoal.kernels.gpu.step_inputs import SlotRows
from shoal.kernels.sampling import token_logprobs
from shoal.worker.gpu.answers import Likeliest
from shoal.worker.gpu.device import Device
from shoal.worker.model.spec import DecoderSpec
from shoal.worker.request import SamplingParams

_WORD = (1 << 64) - 1
_SIGN = 1 << 63


class Draw(enum.Enum):
    """What a draw asks of its rows."""

    GREEDY = "greedy"  # nothing
    PLAIN = "plain"  # their numbers
    PENALISED = "penalised"  # and what they hold so far
    LISTED = "listed"  # and lists of ids that are biased or forbidden


class DeviceSampler:
    """Used by one thread. The slot behind the last is that of rows that pad a step."""

    def __init__(self, state: SlotRows, spec: DecoderSpec, device: Device, slots: int) -> None:
        self._state = state
        self._device = device
        self._vocab = spec.vocab_size
        self._eos = spec.eos_token_ids
        home = device.home
        # temperature, top_p, min_p, typical_p, repetition, frequency, presence
        self._floats = torch.ones(7, slots + 1, device=home)
        # top_k, prompt length, seed, greedy
        self._ints = torch.zeros(4, slots + 1, dtype=torch.int64, device=home)
        self._top_k = torch.zeros(slots + 1, dtype=torch.int32, device=home)
        self._greedy = torch.ones(slots + 1, dtype=torch.bool, device=home)
        self._floats[[2, 5, 6]] = 0.0
        self._workspace = SamplingWorkspace.allocate(slots, spec.vocab_size, home)
        self._entered: dict[int, tuple[list[float], list[int]]] = {}
        self._greedily = np.ones(slots, np.bool_)
        self._penalised = np.zeros(slots, np.bool_)
        self._listed = np.zeros(slots, np.bool_)
        self._likeliest: dict[int, int] = {}  # slot -> how many logprobs
        self._biased: dict[int, dict[int, float]] = {}
        self._held: dict[int, tuple[list[int], int]] = {}  # ids, and the length they wait for
        self._bias: Bias | None = None
        self._forbidden: Forbidden | None = None

    def enter(self, slot: int, params: SamplingParams, seed: int, prompt_len: int) -> None:
        """A sequence enters the slot. The device knows after `upload`."""
        numbers = [
            1.0 if params.greedy else params.temperature,
            params.top_p,
            params.min_p,
            params.typical_p,
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
        ]
        top_k = params.top_k if 0 < params.top_k < self._vocab else 0
        bits = (seed & _WORD ^ _SIGN) - _SIGN  # read as a signed number
        self._entered[slot] = numbers, [top_k, prompt_len, bits, int(params.greedy)]
        for extras in (self._likeliest, self._biased, self._held):
            extras.pop(slot, None)
        if params.logprobs is not None:
            self._likeliest[slot] = params.logprobs
        if params.logit_bias:
            self._biased[slot] = dict(params.logit_bias)
        ends = {*self._eos, *params.stop_token_ids}
        if params.min_tokens and ends:
            self._held[slot] = (sorted(ends), prompt_len + params.min_tokens)
        self._listed[slot] = slot in self._biased or slot in self._held
        self._greedily[slot] = params.greedy
        self._penalised[slot] = numbers[4:] != [1.0, 0.0, 0.0]

    def upload(self) -> None:
        """Sends what entered."""
        floats = np.array([each for each, _ in self._entered.values()], np.float32).T.copy()
        ints = np.array(
            [(slot, *each) for slot, (_, each) in self._entered.items()], np.int64
        ).T.copy()
        listed = any(self._listed[slot] for slot in self._entered)
        self._entered.clear()
        columns = self._device.upload(ints)
        slots = columns[0]
        self._floats.index_copy_(1, slots, self._device.upload(floats))
        self._ints.index_copy_(1, slots, columns[1:])
        self._top_k.index_copy_(0, slots, columns[1].to(torch.int32))
        self._greedy.index_copy_(0, slots, columns[4] != 0)
        if listed:
            self._upload_lists()

    def kind(self, slots: Ints) -> Draw:
        """The least that serves these."""
        if self._listed[slots].any():
            return Draw.LISTED
        if self._penalised[slots].any():
            return Draw.PENALISED
        return Draw.GREEDY if self._greedily[slots].all() else Draw.PLAIN

    def draw(
        self, kind: Draw, logits: Tensor, slots: Tensor, positions: Tensor, ids: Tensor, how: Tensor
    ) -> None:
        """Draws for each row: logits [rows, vocab]; slots and positions [rows] int64, those of
        the tokens that were computed; into ids [rows] int64 and how [rows] int32."""
        temperature, top_p, min_p, typical_p, repetition, frequency, presence = self._floats
        _, prompts, seeds, _ = self._ints
        penalties = None
        if kind in (Draw.PENALISED, Draw.LISTED):
            penalties = Penalties(repetition, frequency, presence, self._state.tokens, prompts)
        listed = kind is Draw.LISTED
        batch = SamplingBatch(
            slots=slots,
            positions=positions + 1,
            greedy=self._greedy,
            temperature=temperature,
            top_k=self._top_k,
            top_p=top_p,
            min_p=min_p,
            typical_p=typical_p,
            seeds=seeds,
            penalties=penalties,
            bias=self._bias if listed else None,
            forbidden=self._forbidden if listed else None,
            all_greedy=kind is Draw.GREEDY,
        )
        sample(logits, batch, ids=ids, status=how, workspace=self._workspace)

    def likeliest(self, logits: Tensor, ids: Tensor, slots: Ints) -> Likeliest | None:
        """Logprobs of the rows that want them, on their way to the host: logits [rows, vocab], ids
        [rows] drawn."""
        if not self._likeliest:
            return None
        rows = [row for row, slot in enumerate(slots.tolist()) if slot in self._likeliest]
        if not rows:
            return None
        wanted = [self._likeliest[int(slots[row])] for row in rows]
        chosen = self._device.upload(np.array(rows, np.int64))
        part = logits.index_select(0, chosen)
        return self._part(rows, wanted, part, ids.index_select(0, chosen))

    def prompt_part(
        self, slot: int, start: int, logits: Tensor, chosen: Tensor, wanted: int
    ) -> Likeliest:
        """Logprobs of the prompt tokens from `start` on: logits [n, vocab] of the positions
        before them, chosen [n] their ids."""
        return self._part([slot], [wanted] * len(logits), logits, chosen, start)

    def _part(
        self,
        owners: Sequence[int],
        wanted: Sequence[int],
        logits: Tensor,
        chosen: Tensor,
        start: int = 0,
    ) -> Likeliest:
        send = self._device.download
        top = min(max(wanted), self._vocab)
        if top <= MOST:
            # A power of two, so that few kernels are compiled.
            top = min(1 << (top - 1).bit_length() if top else 0, self._vocab)
            logprob, rank, ids, values = logprobs(logits, chosen, top)
        else:
            logprob, rank, ids, values = token_logprobs(logits.float(), chosen, top)
        return Likeliest(
            owners, wanted, send(chosen), send(logprob), send(rank), send(ids), send(values), start
        )

    def _upload_lists(self) -> None:
        slots = len(self._greedy)
        bias = self._entries({slot: list(each) for slot, each in self._biased.items()}, slots)
        amounts = [
            amount for slot in sorted(self._biased) for amount in self._biased[slot].values()
        ]
        self._bias = Bias(bias, self._device.upload(np.array([*amounts, 0.0], np.float32)))
        until = np.zeros(slots, np.int64)
        for slot, (_, length) in self._held.items():
            until[slot] = length
        self._forbidden = Forbidden(
            self._entries({slot: ids for slot, (ids, _) in self._held.items()}, slots),
            self._device.upload(until),
        )

    def _entries(self, lists: Mapping[int, Iterable[int]], slots: int) -> Entries:
        """One pool of all lists by slot; it ends with an id that is nobody's, so as to be one."""
        counts, pool = np.zeros(slots, np.int64), []
        for slot in sorted(lists):
            ids = list(lists[slot])
            counts[slot] = len(ids)
            pool += ids
        sizes = self._device.upload(np.stack((np.cumsum(counts) - counts, counts)))
        starts, count = sizes.to(torch.int32)
        return Entries(starts, count, self._device.upload(np.array([*pool, 0])).to(torch.int32))
