"""Which tokens the next step computes. Pure: no tensors, no clock.

There is no prefill or decode phase: every sequence's `num_computed` catches up to its tokens
under one token budget a step. What a sequence is short of orders the work, nothing else:

1. Decodes (one token short) come first and always fit, as no more sequences run than the budget
   has tokens. A generation in progress never waits for a prompt.
2. Prefills, running ones then waiting ones, each by (priority, arrival), share what is left. A
   prompt longer than `max_prefill_tokens` gets at most that much a step, and only the first such
   prompt gets a share before the short ones behind it have had theirs: short prompts overtake a
   long one, and the first long one moves on with every step.

A sequence is admitted with the blocks of all its tokens, so that only decodes allocate. Where
they cannot, running sequences are preempted: see `Scheduler._victim`. The first running sequence
by (priority, arrival) is never a victim and always moves on, and fits the pool when alone, hence
within a priority nobody starves.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from operator import attrgetter

from shoal.worker.block_tables import BlockTables
from shoal.worker.config import EngineConfig
from shoal.worker.request import ErrorCode, FinishReason
from shoal.worker.sequence import Order, Sequence, SequenceDelta
from shoal.worker.step import Row, SlotBlocks, SlotInit, StepPlan, StepResult

_ORDER = attrgetter("order")
_MAX_OVERTAKEN = 32  # waiting sequences that may be passed over in one step


@dataclass(slots=True)
class EngineStats:
    """Totals since the start, for metrics."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefilled_tokens: int = 0  # computed in prefills, those of resumed sequences included
    preemptions: int = 0
    preempted_tokens: int = 0  # computed when their sequence was preempted


@dataclass(slots=True)
class _Draft:
    """A plan in the making."""

    budget: int  # tokens left
    rows: list[Row]
    init: list[SlotInit] = field(default_factory=list)
    longs: int = 0  # long prompts that may still have a share in this round
    served: set[Order] = field(default_factory=set)  # prefills with a row


class Scheduler:
    """Owns the queues, the slots, the blocks and the prefix cache. `schedule` and `commit` (or
    `fail`) alternate; `add` and `end` come between steps."""

    def __init__(self, config: EngineConfig, num_blocks: int, block_size: int) -> None:
        self.blocks = BlockTables(num_blocks, block_size, caching=config.enable_prefix_caching)
        self.counters = EngineStats()
        self._budget = config.max_batched_tokens
        half = max(1, self._budget // 2)
        self._prefill_cap = min(config.max_prefill_tokens or half, self._budget)
        self._waiting: list[Sequence] = []  # these three are sorted by order
        self._prefilling: list[Sequence] = []
        self._decoding: list[Sequence] = []
        self.max_running = min(config.max_num_seqs, self._budget)
        self._free_slots = list(range(self.max_running))[::-1]
        self._waiting_tokens = 0
        self._step = 0
        self._in_step: list[Sequence] = []  # of the plan handed out
        self._sampling: list[Sequence] = []  # of these, whose rows have `sample`, in their order

    @property
    def has_work(self) -> bool:
        return bool(self._decoding or self._prefilling or self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    @property
    def num_decoding(self) -> int:
        return len(self._decoding)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def queued_prefill_tokens(self) -> int:
        """Prompt tokens yet to be computed, those that the prefix cache may save included."""
        return self._waiting_tokens + sum(seq.remaining for seq in self._prefilling)

    def add(self, seq: Sequence) -> None:
        """Queues a new sequence. Its `max_len` fits the pool: the engine has seen to that."""
        self.counters.prompt_tokens += seq.prompt_len
        self._enqueue(seq)

    def end(self, seq: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its blocks."""
        if seq.slot is None:
            _discard(self._waiting, seq)
            self._waiting_tokens -= len(seq.tokens)
        else:
            self._vacate(seq)

    def replace(self, seq: Sequence, successor: Sequence) -> None:
        """Ends a sequence, and queues another in its place in the order."""
        self.end(seq)
        self._enqueue(successor)

    def schedule(self) -> StepPlan:
        """Plans the next step. The plan has rows whenever a sequence is running or waiting."""
        assert self.num_running or not self.blocks.pool.num_used, "nobody runs, but blocks are held"
        self._step += 1
        preempted = self._make_room()
        grow = self._grow_tables()
        rows = self._decode_rows()
        self._in_step, self._sampling = self._decoding[:], self._decoding[:]
        draft = _Draft(self._budget - len(rows), rows)
        # A preemption says that blocks are short: those freed are not for newcomers.
        self._plan_prefills(draft, admit=not preempted)
        return StepPlan(self._step, tuple(draft.init), tuple(grow), tuple(draft.rows))

    def check_result(self, result: StepResult) -> None:
        """Raises ValueError if the result does not answer the rows of the plan handed out."""
        if [seq.slot for seq in self._sampling] != [sampled.slot for sampled in result.sampled]:
            raise ValueError("the executor's result does not match the plan's rows")
        if result.prompt_logprobs:
            slots = {seq.slot for seq in self._in_step}
            if any(part.slot not in slots for part in result.prompt_logprobs):
                raise ValueError("the executor's prompt logprobs are of slots not in the plan")

    def commit(self, result: StepResult) -> list[SequenceDelta]:
        """Takes the tokens drawn, of a result that was checked; sequences that end with them free
        their blocks."""
        by_slot = {seq.slot: seq for seq in self._in_step} if result.prompt_logprobs else {}
        for part in result.prompt_logprobs:
            by_slot[part.slot].take_prompt_logprobs(part)
        deltas = []
        num_decodes = len(self._decoding)
        for place, (seq, sampled) in enumerate(zip(self._sampling, result.sampled, strict=True)):
            if sampled.error is not None:
                # What made the logits unusable may be in the blocks: nobody may find them.
                self.blocks.distrust(seq)
                self.end(seq)
                deltas.append(seq.ending(FinishReason.ERROR, sampled.error, ErrorCode.INTERNAL))
                continue
            delta = seq.advance(sampled.token_id, sampled.logprobs)
            deltas.append(delta)
            if delta.finish is not None:
                self.end(seq)
            elif place >= num_decodes:
                _discard(self._prefilling, seq)
                insort(self._decoding, seq, key=_ORDER)
        self.counters.generated_tokens += sum(len(delta.token_ids) for delta in deltas)
        self._in_step, self._sampling = [], []
        return deltas

    def fail(self, reason: str) -> list[SequenceDelta]:
        """The step failed on the device. No KV is trusted after that: the plan's sequences end,
        other running ones are computed anew, and the prefix cache is emptied."""
        deltas = []
        for seq in self._in_step:
            self.end(seq)
            deltas.append(seq.ending(FinishReason.ERROR, reason, ErrorCode.INTERNAL))
        self.blocks.cache.clear()
        for seq in (*self._decoding, *self._prefilling):
            self._preempt(seq)
        return deltas

    def check_integrity(self) -> None:
        """Asserts that blocks are conserved. O(blocks): for tests and idle moments."""
        running = (*self._prefilling, *self._decoding)
        self.blocks.check_integrity(running)
        slots = sorted([*self._free_slots, *(seq.slot for seq in running if seq.slot is not None)])
        assert slots == list(range(len(slots))), "slots lost or handed out twice"
        assert all(not seq.block_ids for seq in self._waiting), "a waiting sequence holds blocks"

    # Decodes.

    def _make_room(self) -> bool:
        """Preempts until every decode at the end of its last block can have another one."""
        preempted = False
        while self._num_at_border() > self.blocks.pool.num_free:
            self._preempt(self._victim())
            self.counters.preemptions += 1
            preempted = True
        return preempted

    def _num_at_border(self) -> int:
        return sum(seq.num_computed == seq.capacity for seq in self._decoding)

    def _grow_tables(self) -> list[SlotBlocks]:
        grow = []
        for seq in self._decoding:
            if seq.num_computed == seq.capacity and seq.slot is not None:
                grow.append(SlotBlocks(seq.slot, self.blocks.grow(seq, 1)))
        return grow

    def _decode_rows(self) -> list[Row]:
        rows = []
        for seq in self._decoding:
            start = seq.num_computed
            rows.append(Row(seq.slot, start, 1, True))  # type: ignore[arg-type]  # it runs: a slot
            seq.num_computed = start + 1
            if start + 1 == seq.capacity:
                self.blocks.register(seq)
        return rows

    def _victim(self) -> Sequence:
        """Of the lowest priority that runs, the sequence that loses least work for the blocks it
        frees: the smallest `tokens / blocks`, where `blocks` are those that nobody else holds and
        `tokens` the computed ones in them, which is what a resumed sequence computes again at
        worst. So prompts that have only begun go before generations, and short generations, whose
        last block is part of little, before long ones. Of equals the newest goes.
        """
        first = min(self._decoding[:1] + self._prefilling[:1], key=_ORDER)
        running = [seq for seq in (*self._decoding, *self._prefilling) if seq is not first]
        lowest = max(seq.order.priority for seq in running)
        candidates = [seq for seq in running if seq.order.priority == lowest]
        return min(candidates, key=lambda seq: (self.blocks.loss(seq), -seq.order.arrival))

    # Prefills.

    def _plan_prefills(self, draft: _Draft, *, admit: bool) -> None:
        """Shares what the decodes left of the budget. The second round is for long prompts behind
        the first one."""
        for longs in (1, len(self._prefilling) + len(self._waiting)):
            draft.longs = longs
            for seq in self._prefilling:
                if not draft.budget:
                    return
                if seq.order not in draft.served and self._may_go(seq.remaining, draft):
                    self._prefill(seq, draft)
            if admit:
                self._admit(draft)

    def _admit(self, draft: _Draft) -> None:
        """Lets waiting sequences in while budget, slots and blocks last. Long prompts and those
        that wait for another's blocks may be overtaken, but nobody overtakes a sequence that lacks
        blocks."""
        place = 0
        while draft.budget and self._free_slots and place < min(len(self._waiting), _MAX_OVERTAKEN):
            seq = self._waiting[place]
            shared = self.blocks.find_shared(seq)
            remaining = len(seq.tokens) - len(shared) * self.blocks.block_size
            if self.blocks.next_is_promised(seq, len(shared)) or not self._may_go(remaining, draft):
                place += 1
                continue
            # A block of headroom for each that runs: none is preempted within the next
            # `block_size` steps for a newcomer's sake.
            if not self.blocks.fits(seq, shared, headroom=self.num_running):
                break
            del self._waiting[place]
            self._waiting_tokens -= len(seq.tokens)
            draft.init.append(self._enter(seq, shared))
            self._prefill(seq, draft)

    def _may_go(self, remaining: int, draft: _Draft) -> bool:
        """Whether a prefill may have a share in this round."""
        return remaining <= self._prefill_cap or draft.longs > 0

    def _enter(self, seq: Sequence, shared: list[int]) -> SlotInit:
        """Gives a waiting sequence its slot and its blocks."""
        self.blocks.enter(seq, shared)
        seq.slot = slot = self._free_slots.pop()
        insort(self._prefilling, seq, key=_ORDER)
        if self.blocks.caching and seq.may_share:
            self.counters.prefix_queried_tokens += len(seq.tokens)
            self.counters.prefix_hit_tokens += seq.num_computed
        if not seq.reported:
            seq.cached_tokens = min(seq.num_computed, seq.prompt_len)
        return SlotInit(
            slot,
            tuple(seq.tokens),
            seq.prompt_len,
            seq.sampling,
            seq.seed,
            tuple(seq.block_ids),
            seq.weights,
        )

    def _prefill(self, seq: Sequence, draft: _Draft) -> None:
        """Adds the sequence's next chunk to the plan."""
        assert seq.slot is not None
        start, remaining = seq.num_computed, seq.remaining
        count = min(remaining, self._prefill_cap, draft.budget)
        draft.rows.append(Row(seq.slot, start, count, count == remaining))
        draft.budget -= count
        draft.longs -= remaining > self._prefill_cap
        draft.served.add(seq.order)
        seq.num_computed = start + count
        self.blocks.register(seq)
        self.counters.prefilled_tokens += count
        self._in_step.append(seq)
        if count == remaining:
            self._sampling.append(seq)

    # Queues.

    def _preempt(self, seq: Sequence) -> None:
        self.counters.preempted_tokens += seq.num_computed
        self._vacate(seq)
        self._enqueue(seq)

    def _enqueue(self, seq: Sequence) -> None:
        insort(self._waiting, seq, key=_ORDER)
        self._waiting_tokens += len(seq.tokens)

    def _vacate(self, seq: Sequence) -> None:
        """Takes a running sequence off its slot, and its blocks."""
        assert seq.slot is not None
        _discard(self._prefilling if _has(self._prefilling, seq) else self._decoding, seq)
        self.blocks.leave(seq)
        self._free_slots.append(seq.slot)
        seq.slot = None


def _place(queue: list[Sequence], seq: Sequence) -> int:
    return bisect_left(queue, seq.order, key=_ORDER)


def _has(queue: list[Sequence], seq: Sequence) -> bool:
    place = _place(queue, seq)
    return place < len(queue) and queue[place] is seq


def _discard(queue: list[Sequence], seq: Sequence) -> None:
    place = _place(queue, seq)
    assert queue[place] is seq, f"{seq.key} is not where its order says"
    del queue[place]
