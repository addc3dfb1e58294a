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

Several plans may be under way at a time, for the stages of a pipeline. A decode waits for the token
that is being drawn for it, so each plan takes its share of the decodes; prompts need not wait, as
plans are computed in order. For the same reason blocks are free at once when a sequence leaves
while a plan under way still writes to them: whoever gets them writes later.

A device that relays reads the token that it drew itself, so a decode waits for nobody: every plan
has all of them, the newest token of each unknown here (`num_computed` runs ahead of `tokens`). The
end by length is foreseen; one by a stop token is seen a plan late, whose row was for nothing.
"""

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

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


class _Ticket(NamedTuple):
    """A sequence in a plan under way, and in which stay on which slot."""

    seq: Sequence
    slot: int
    stay: int

    @classmethod
    def of(cls, seq: Sequence) -> "_Ticket":
        assert seq.slot is not None
        return cls(seq, seq.slot, seq.stay)

    @property
    def void(self) -> bool:
        """The sequence has ended or was preempted since."""
        return self.seq.stay != self.stay


@dataclass(slots=True)
class _Flight:
    """A plan under way."""

    members: list[_Ticket]  # of all rows
    sampling: list[_Ticket]  # of these, whose rows have `sample`, in their order
    num_decodes: int  # of these, that were decoding


@dataclass(slots=True)
class _Draft:
    """A plan in the making."""

    budget: int  # tokens left
    rows: list[Row]
    flight: _Flight
    init: list[SlotInit] = field(default_factory=list)
    longs: int = 0  # long prompts that may still have a share in this round
    served: set[Order] = field(default_factory=set)  # prefills with a row


class Scheduler:
    """Owns the queues, the slots, the blocks and the prefix cache. Each plan of `schedule` that
    has rows is answered by `commit`, in order, or all of them by `fail`; at most `depth` are under
    way. `add` and `end` may come at any time."""

    def __init__(
        self,
        config: EngineConfig,
        num_blocks: int,
        block_size: int,
        depth: int = 1,
        *,
        relays: bool = False,
    ) -> None:
        """`depth` and `relays`: the executor's."""
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
        self._depth = depth
        self._relays = relays
        self._flights: deque[_Flight] = deque()

    @property
    def has_work(self) -> bool:
        """Whether anybody runs or waits, or a plan is under way."""
        return bool(self._decoding or self._prefilling or self._waiting or self._flights)

    @property
    def num_flights(self) -> int:
        """Plans under way."""
        return len(self._flights)

    @property
    def num_running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

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
        """Plans the next step. The plan has rows whenever a sequence is running or waiting and no
        plan is under way; one without rows is not a step and gets no answer."""
        assert self.num_running or not self.blocks.pool.num_used, "nobody runs, but blocks are held"
        preempted = self._make_room()
        decodes = self._ready()
        grow = self._grow_tables(decodes)
        rows = self._decode_rows(decodes)
        tickets = [_Ticket.of(seq) for seq in decodes]
        flight = _Flight(tickets, tickets[:], len(tickets))
        draft = _Draft(self._budget - len(rows), rows, flight)
        # A preemption says that blocks are short: those freed are not for newcomers.
        self._plan_prefills(draft, admit=not preempted)
        if draft.rows:
            self._step += 1
            self._flights.append(flight)
        if self._relays:
            for ticket in flight.sampling[flight.num_decodes :]:
                self._now_decodes(ticket.seq)
        return StepPlan(self._step, tuple(draft.init), tuple(grow), tuple(draft.rows))

    def check_result(self, result: StepResult) -> None:
        """Raises ValueError if the result does not answer the rows of the oldest plan."""
        flight = self._flights[0]
        if [ticket.slot for ticket in flight.sampling] != [part.slot for part in result.sampled]:
            raise ValueError("the executor's result does not match the plan's rows")
        if result.prompt_logprobs:
            slots = {ticket.slot for ticket in flight.members}
            if any(part.slot not in slots for part in result.prompt_logprobs):
                raise ValueError("the executor's prompt logprobs are of slots not in the plan")

    def commit(self, result: StepResult) -> list[SequenceDelta]:
        """Takes the tokens drawn by the oldest plan, of a result that was checked; sequences that
        end with them free their blocks. What was drawn for one that has left is dropped: where it
        resumes, it draws the same again."""
        flight = self._flights.popleft()
        by_slot = {ticket.slot: ticket for ticket in flight.members if result.prompt_logprobs}
        for part in result.prompt_logprobs:
            if not by_slot[part.slot].void:
                by_slot[part.slot].seq.take_prompt_logprobs(part)
        deltas = []
        for place, (ticket, sampled) in enumerate(
            zip(flight.sampling, result.sampled, strict=True)
        ):
            if ticket.void:
                continue
            seq = ticket.seq
            seq.awaited = False
            if sampled.error is not None:
                # What made the logits unusable may be in the blocks: nobody may find them.
                self.blocks.distrust(seq)
                self.end(seq)
                deltas.append(seq.ending(FinishReason.ERROR, sampled.error, ErrorCode.INTERNAL))
                continue
            delta = seq.advance(sampled.token_id, sampled.logprobs)
            deltas.append(delta)
            if self._relays:
                self.blocks.register(seq)
            if delta.finish is not None:
                self.end(seq)
            elif place >= flight.num_decodes and not self._relays:
                self._now_decodes(seq)
        self.counters.generated_tokens += sum(len(delta.token_ids) for delta in deltas)
        return deltas

    def fail(self, reason: str) -> list[SequenceDelta]:
        """A step failed on the device. No KV is trusted after that: the sequences of the plans
        under way end, other running ones are computed anew, and the prefix cache is emptied."""
        deltas = []
        for flight in self._flights:
            for ticket in flight.members:
                if not ticket.void:
                    self.end(ticket.seq)
                    deltas.append(ticket.seq.ending(FinishReason.ERROR, reason, ErrorCode.INTERNAL))
        self._flights.clear()
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
        return sum(seq.num_computed == seq.capacity for seq in self._ready())

    def _ready(self) -> list[Sequence]:
        """The decodes of the next plan: an equal share of all for each plan under way or, where
        the device relays, all but those whose last token is being drawn."""
        if self._relays:
            return [seq for seq in self._decoding if seq.num_computed + 1 < seq.max_len]
        if self._depth == 1:
            return self._decoding[:]
        ready = [seq for seq in self._decoding if not seq.awaited]
        return ready[: -(-len(self._decoding) // self._depth)]

    def _grow_tables(self, decodes: list[Sequence]) -> list[SlotBlocks]:
        grow = []
        for seq in decodes:
            if seq.num_computed == seq.capacity and seq.slot is not None:
                grow.append(SlotBlocks(seq.slot, self.blocks.grow(seq, 1)))
        return grow

    def _decode_rows(self, decodes: list[Sequence]) -> list[Row]:
        rows = []
        for seq in decodes:
            seq.awaited = True
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
                if seq.awaited or seq.order in draft.served:
                    continue
                if self._may_go(seq.remaining, draft):
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
        ticket = _Ticket.of(seq)
        draft.flight.members.append(ticket)
        if count == remaining:
            seq.awaited = True
            draft.flight.sampling.append(ticket)

    # Queues.

    def _now_decodes(self, seq: Sequence) -> None:
        """A prefill's last chunk is planned, or computed."""
        _discard(self._prefilling, seq)
        insort(self._decoding, seq, key=_ORDER)

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
        seq.stay += 1
        seq.awaited = False


def _place(queue: list[Sequence], seq: Sequence) -> int:
    return bisect_left(queue, seq.order, key=_ORDER)


def _has(queue: list[Sequence], seq: Sequence) -> bool:
    place = _place(queue, seq)
    return place < len(queue) and queue[place] is seq


def _discard(queue: list[Sequence], seq: Sequence) -> None:
    place = _place(queue, seq)
    assert queue[place] is seq, f"{seq.key} is not where its order says"
    del queue[place]
