"""Draws the next token of every row of a batch, each by its own request's parameters.

A slot's parameters are set once; a step then works on the whole batch. Where all rows are
greedy and want nothing else, that is one argmax. The order is vLLM's: logprobs are of the raw
logits; then logit bias, min_tokens, penalties, temperature, min_p, top_k, top_p, typical_p; draw.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.kernels.paged import Ints
from shoal.kernels.sampling import (
    argmax_rows,
    count_tokens,
    draw,
    filter_min_p_,
    filter_top_k_,
    filter_top_p_,
    filter_typical_p_,
    penalize_,
    token_logprobs,
    uniforms,
)
from shoal.worker.request import SamplingParams
from shoal.worker.step import Sampled, TokenLogprobs

_WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class LogitBias:
    """What a request adds to the logits of some ids."""

    ids: Tensor  # [n] int64
    amounts: Tensor  # [n] float32


class Sampler:
    """Sampling parameters of all slots, as arrays over slots, and the batched draw."""

    def __init__(self, max_num_seqs: int, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.prompt_len = np.zeros(max_num_seqs, np.int64)
        self.plain = np.ones(max_num_seqs, np.bool_)  # greedy and nothing else
        self.greedy = np.ones(max_num_seqs, np.bool_)
        self.penalised = np.zeros(max_num_seqs, np.bool_)
        self.temperature = np.ones(max_num_seqs, np.float32)
        self.min_p = np.zeros(max_num_seqs, np.float32)
        self.top_k = np.zeros(max_num_seqs, np.int64)
        self.top_p = np.ones(max_num_seqs, np.float32)
        self.typical_p = np.ones(max_num_seqs, np.float32)
        self.repetition = np.ones(max_num_seqs, np.float32)
        self.frequency = np.zeros(max_num_seqs, np.float32)
        self.presence = np.zeros(max_num_seqs, np.float32)
        self.seed = np.zeros(max_num_seqs, np.uint64)
        self.min_tokens = np.zeros(max_num_seqs, np.int64)
        self.logprobs: dict[int, int] = {}  # slot -> how many of the likeliest
        self.bias: dict[int, LogitBias] = {}
        self.ends: dict[int, Tensor] = {}  # slot -> ids that min_tokens holds back

    def set_slot(self, slot: int, params: SamplingParams, seed: int, prompt_len: int) -> None:
        """A sequence enters the slot."""
        self.prompt_len[slot] = prompt_len
        self.greedy[slot] = params.greedy
        self.temperature[slot] = 1.0 if params.greedy else params.temperature
        self.min_p[slot] = params.min_p
        self.top_k[slot] = params.top_k if 0 < params.top_k < self.vocab_size else 0
        self.top_p[slot] = params.top_p
        self.typical_p[slot] = params.typical_p
        self.repetition[slot] = params.repetition_penalty
        self.frequency[slot] = params.frequency_penalty
        self.presence[slot] = params.presence_penalty
        self.seed[slot] = seed & _WORD
        self.min_tokens[slot] = params.min_tokens
        self.penalised[slot] = (
            params.repetition_penalty != 1.0
            or params.frequency_penalty != 0.0
            or params.presence_penalty != 0.0
        )
        for extras in (self.logprobs, self.bias, self.ends):
            extras.pop(slot, None)
        if params.logprobs is not None:
            self.logprobs[slot] = params.logprobs
        if params.logit_bias:
            self.bias[slot] = LogitBias(
                torch.tensor(list(params.logit_bias), dtype=torch.int64),
                torch.tensor(list(params.logit_bias.values()), dtype=torch.float32),
            )
        ends = {*self.eos_token_ids, *params.stop_token_ids}
        if params.min_tokens and ends:
            self.ends[slot] = torch.tensor(sorted(ends), dtype=torch.int64)
        self.plain[slot] = params.greedy and not (
            self.penalised[slot] or slot in self.logprobs or slot in self.bias or slot in self.ends
        )

    def sample(self, logits: Tensor, slots: Ints, lengths: Ints, tokens: Ints) -> list[Sampled]:
        """One `Sampled` a row.

        logits [rows, vocab] float32, changed in place; slots [rows]; lengths [rows]: tokens
        known, so that the token drawn is at that position; tokens [slots, positions]: the state.
        """
        ids, best = argmax_rows(logits)
        broken = ~np.isfinite(best.numpy())
        if self.plain[slots].all():
            return _results(slots, ids, {}, broken, np.zeros_like(broken))
        logits[torch.from_numpy(broken)] = 0.0
        raw = self._raw(logits, slots)
        changed = self._process_(logits, slots, lengths, tokens)
        forbidden = np.zeros_like(broken)
        if len(changed):
            part_ids, part_best = argmax_rows(logits[torch.from_numpy(changed)])
            ids[torch.from_numpy(changed)] = part_ids
            forbidden[changed] = part_best.numpy() == -np.inf
            logits[torch.from_numpy(forbidden)] = 0.0
        random = np.flatnonzero(~self.greedy[slots])
        if len(random):
            rows = torch.from_numpy(random)
            ids[rows] = self._draw(logits[rows], slots[random], lengths[random])
        return _results(slots, ids, self._logprobs(raw, slots, ids), broken, forbidden)

    def _raw(self, logits: Tensor, slots: Ints) -> tuple[list[int], Tensor]:
        """The rows that want logprobs, and a copy of their logits."""
        rows = [row for row, slot in enumerate(slots.tolist()) if slot in self.logprobs]
        return rows, logits[rows]

    def _process_(self, logits: Tensor, slots: Ints, lengths: Ints, tokens: Ints) -> Ints:
        """Bias, min_tokens and penalties. Returns the rows that changed."""
        changed = set()
        for row, slot in enumerate(slots.tolist()):
            if (bias := self.bias.get(slot)) is not None:
                logits[row].index_add_(0, bias.ids, bias.amounts)
                changed.add(row)
            early = lengths[row] - self.prompt_len[slot] < self.min_tokens[slot]
            if early and slot in self.ends:
                logits[row].index_fill_(0, self.ends[slot], -torch.inf)
                changed.add(row)
        penalised = np.flatnonzero(self.penalised[slots])
        if len(penalised):
            rows = torch.from_numpy(penalised)
            logits[rows] = self._penalize(
                logits[rows], slots[penalised], lengths[penalised], tokens
            )
        return np.union1d(penalised, np.fromiter(changed, np.int64, len(changed)))

    def _penalize(self, logits: Tensor, slots: Ints, lengths: Ints, tokens: Ints) -> Tensor:
        known = torch.from_numpy(tokens[slots, : int(lengths.max())])
        position = np.arange(known.shape[1])
        in_prompt = position < self.prompt_len[slots, None]
        generated = ~in_prompt & (position < lengths[:, None])
        penalize_(
            logits,
            count_tokens(known, torch.from_numpy(in_prompt), self.vocab_size),
            count_tokens(known, torch.from_numpy(generated), self.vocab_size),
            torch.from_numpy(self.repetition[slots]),
            torch.from_numpy(self.frequency[slots]),
            torch.from_numpy(self.presence[slots]),
        )
        return logits

    def _draw(self, logits: Tensor, slots: Ints, lengths: Ints) -> Tensor:
        """ids [rows] of the rows that are not greedy."""
        logits.div_(torch.from_numpy(self.temperature[slots]).unsqueeze(1))
        filters = (
            (self.min_p, self.min_p[slots] > 0, filter_min_p_),
            (self.top_k, self.top_k[slots] > 0, filter_top_k_),
            (self.top_p, self.top_p[slots] < 1, filter_top_p_),
            (self.typical_p, self.typical_p[slots] < 1, filter_typical_p_),
        )
        for values, active, apply in filters:
            if active.all():
                apply(logits, torch.from_numpy(values[slots]))
            elif active.any():
                rows = torch.from_numpy(np.flatnonzero(active))
                part = logits[rows]
                apply(part, torch.from_numpy(values[slots[active]]))
                logits[rows] = part
        drawn = uniforms(self.seed[slots], lengths.astype(np.uint64))
        return draw(logits, torch.from_numpy(drawn))

    def _logprobs(
        self, raw: tuple[list[int], Tensor], slots: Ints, ids: Tensor
    ) -> dict[int, TokenLogprobs]:
        rows, logits = raw
        if not rows:
            return {}
        wanted = [self.logprobs[slot] for slot in slots[rows].tolist()]
        return dict(zip(rows, logprob_entries(logits, ids[rows], wanted), strict=True))


def logprob_entries(logits: Tensor, chosen: Tensor, wanted: list[int]) -> list[TokenLogprobs]:
    """Logprobs of the chosen token and the `wanted` likeliest of each row.

    logits [rows, vocab] float32, chosen [rows] int64, wanted [rows], at most the vocabulary.
    """
    top = min(max(wanted), logits.shape[1])
    logprob, rank, ids, values = (part.tolist() for part in token_logprobs(logits, chosen, top))
    return [
        TokenLogprobs((token, *ids[row][:count]), (logprob[row], *values[row][:count]), rank[row])
        for row, (token, count) in enumerate(zip(chosen.tolist(), wanted, strict=True))
    ]


def _results(
    slots: Ints,
    ids: Tensor,
    logprobs: dict[int, TokenLogprobs],
    broken: npt.NDArray[np.bool_],
    forbidden: npt.NDArray[np.bool_],
) -> list[Sampled]:
    results = [
        Sampled(slot, token, logprobs.get(row))
        for row, (slot, token) in enumerate(zip(slots.tolist(), ids.tolist(), strict=True))
    ]
    for row in np.flatnonzero(broken).tolist():
        results[row] = Sampled(int(slots[row]), 0, error="the model's logits are not finite")
    for row in np.flatnonzero(forbidden & ~broken).tolist():
        message = "no token is left to draw: logit_bias, stop_token_ids and min_tokens forbid all"
        results[row] = Sampled(int(slots[row]), 0, error=message)
    return results
