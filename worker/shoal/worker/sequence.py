"""One sequence on its way through the engine, and what it reports.

A request of `n` samples becomes `n` sequences. Here is also the admission of a request: which
limits its sequences end at, and the seeds of their draws.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from shoal.api.blocks import BlockHash, block_hashes, root_hash
from shoal.worker.request import (
    EngineRequest,
    ErrorCode,
    FinishReason,
    SamplingParams,
    SequenceKey,
)
from shoal.worker.step import PromptLogprobs, TokenLogprobs
from shoal.worker.weight_sets import WeightSet

_MASK64 = (1 << 64) - 1


class SequenceDelta(NamedTuple):
    """What is new of one sequence. The last delta has `finish`; a stop token is the last of its
    token ids."""

    key: SequenceKey
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()  # one a token id, if asked for
    # With the first delta, one a prompt token, None for the first of them.
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish: FinishReason | None = None
    cached_tokens: int = 0  # prompt tokens found in the prefix cache; with the first delta
    error: str | None = None  # with FinishReason.ERROR
    code: ErrorCode | None = None  # with FinishReason.ERROR
    revision: str = ""  # with the first delta, where a swap moved the sequence to this one


class Order(NamedTuple):
    """Whose turn is first: the smaller. No two sequences are equal."""

    priority: int
    arrival: int


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one sequence. The scheduler owns and changes it; `num_computed` counts the tokens
    whose KV is stored, the steps in progress included: where the device relays, those that it has
    drawn and not yet told are among them."""

    key: SequenceKey
    order: Order
    sampling: SamplingParams
    seed: int
    tokens: list[int]
    prompt_len: int
    stop_ids: frozenset[int]
    min_len: int  # of all tokens, before a stop token ends the sequence
    max_len: int  # of all tokens
    root: BlockHash  # parent of the first block's hash
    hashes: list[BlockHash]  # of full blocks, as far as they are known
    block_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_registered: int = 0  # blocks that are in the prefix cache, or have an equal there
    capacity: int = 0  # tokens that `block_ids` hold
    slot: int | None = None  # None: waiting, or ended
    stay: int = 0  # counts the times it left a slot: what was planned in an earlier stay is void
    # A plan under way draws its next token. Of no account where the device relays.
    awaited: bool = False
    reported: bool = False  # the first delta went out
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    weights: int = 0  # number of the set that computes it
    moved_to: str = ""  # the revision that a swap moved it to

    @property
    def remaining(self) -> int:
        """Tokens to compute until the next one can be drawn."""
        return len(self.tokens) - self.num_computed

    @property
    def may_share(self) -> bool:
        """Whether cached blocks may stand in for computation. Prompt logprobs need every
        position's logits."""
        return self.prompt_logprobs is None

    def take_prompt_logprobs(self, part: PromptLogprobs) -> None:
        """Notes a chunk's logprobs; those already reported or beyond the prompt are dropped."""
        if self.prompt_logprobs is None:
            return
        end = min(part.start + len(part.entries), self.prompt_len)
        self.prompt_logprobs[part.start : end] = part.entries[: max(0, end - part.start)]

    def advance(self, token_id: int, logprobs: TokenLogprobs | None) -> SequenceDelta:
        """Takes the token drawn and says what is new."""
        tokens = self.tokens
        tokens.append(token_id)
        finish = None
        if token_id in self.stop_ids and len(tokens) >= self.min_len:
            finish = FinishReason.STOP
        elif len(tokens) >= self.max_len:
            finish = FinishReason.LENGTH
        entries = () if logprobs is None else (logprobs,)
        if self.reported:
            return SequenceDelta(self.key, (token_id,), entries, None, finish)
        self.reported = True
        prompt, self.prompt_logprobs = self.prompt_logprobs, None
        return SequenceDelta(
            self.key,
            (token_id,),
            entries,
            None if prompt is None else tuple(prompt),
            finish,
            self.cached_tokens,
            revision=self.moved_to,
        )

    def ending(
        self, finish: FinishReason, error: str | None = None, code: ErrorCode | None = None
    ) -> SequenceDelta:
        """The last delta of a sequence that ends without a token."""
        cached = 0 if self.reported else self.cached_tokens
        return SequenceDelta(self.key, (), (), None, finish, cached, error, code)


def begun_anew(seq: Sequence, weights: WeightSet, salt: str, block_size: int | None) -> Sequence:
    """The sequence as it was admitted, on other weights. None of its tokens was sampled yet.
    `block_size`: of the prefix cache; None: there is none."""
    root = root_hash(weights.revision, salt)
    hashes: list[BlockHash] = []
    if block_size is not None:
        hashes = block_hashes(root, seq.tokens, block_size)
    return Sequence(
        key=seq.key,
        order=seq.order,
        sampling=seq.sampling,
        seed=seq.seed,
        tokens=list(seq.tokens),
        prompt_len=seq.prompt_len,
        stop_ids=seq.stop_ids,
        min_len=seq.min_len,
        max_len=seq.max_len,
        root=root,
        hashes=hashes,
        prompt_logprobs=None if seq.prompt_logprobs is None else [None] * seq.prompt_len,
        weights=weights.number,
        moved_to=weights.revision,
    )


def sequences_of(
    request: EngineRequest,
    *,
    first_arrival: int,
    seed: int,
    eos_token_ids: Items[int],
    max_model_len: int,
    root: BlockHash,
    hashes: list[BlockHash],
    weights: int = 0,
) -> list[Sequence]:
    """The `n` sequences of a validated request, in the order of their indices."""
    brought = len(request.token_ids) - request.prompt_len  # generated elsewhere
    sampling = request.sampling
    if brought and sampling.min_tokens:
        # From here on it counts from the prompt's end, as what is generated does.
        sampling = replace(sampling, min_tokens=sampling.min_tokens + brought)
    eos = () if sampling.ignore_eos else eos_token_ids
    limit = max_model_len
    if sampling.max_tokens is not None:
        limit = min(limit, len(request.token_ids) + sampling.max_tokens)
    wants_prompt = sampling.prompt_logprobs is not None
    return [
        Sequence(
            key=SequenceKey(request.request_id, index),
            order=Order(request.priority, first_arrival + offset),
            sampling=sampling,
            seed=mix(seed, index),
            tokens=list(request.token_ids),
            prompt_len=request.prompt_len,
            stop_ids=frozenset((*eos, *sampling.stop_token_ids)),
            min_len=request.prompt_len + sampling.min_tokens,
            max_len=limit,
            root=root,
            hashes=list(hashes),
            prompt_logprobs=[None] * request.prompt_len if wants_prompt else None,
            weights=weights,
        )
        for offset, index in enumerate(range(request.first_index, request.first_index + sampling.n))
    ]


def mix(seed: int, index: int) -> int:
    """The 64-bit seed of sample `index`: splitmix64's finalizer over the request's seed, stepped
    by its increment (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014)."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
