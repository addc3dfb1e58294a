"""The engine: requests in, deltas out, one step at a time.

    expire -> schedule and submit, until the device is full -> collect the oldest step -> commit

Synchronous and used by one thread, which calls `step` while `has_work`. A fault of one request
ends that request. A failed step ends the sequences that were in it; a device that fails three
steps in a row, or says that it is gone, is given up: everything in flight ends, and the engine is
dead.
"""

import logging
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush

from shoal.api.blocks import BlockHash, block_hashes, root_hash
from shoal.worker.config import EngineConfig
from shoal.worker.executor import DeviceLost, Executor
from shoal.worker.request import (
    EngineRequest,
    ErrorCode,
    FinishReason,
    InvalidRequest,
    SequenceKey,
)
from shoal.worker.scheduler import EngineStats, Scheduler
from shoal.worker.sequence import Sequence, SequenceDelta, begun_anew, sequences_of
from shoal.worker.step_times import StepTimes
from shoal.worker.validate import check_config, validate_request
from shoal.worker.weight_sets import WeightSet, WeightSets

__all__ = [
    "Engine",
    "EngineDead",
    "EngineLoad",
    "EngineStats",
    "SequenceDelta",
    "StepOutput",
]

log = logging.getLogger(__name__)

# One failed step may be its content's fault (a kernel that a rare shape breaks), and ends only
# what was in it; the second may meet the same content's sibling. Three in a row, each with other
# sequences, have nothing in common but the device.
MAX_FAILURES = 3


class EngineDead(RuntimeError):
    """The device failed for good; only a new process helps."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step brought: at most one delta a sequence, but for one that begins and is
    cancelled; and the prefix cache's changes."""

    deltas: tuple[SequenceDelta, ...]
    stored: tuple[BlockHash, ...]
    removed: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy the engine is. Sequences are counted, not requests."""

    running: int
    waiting: int
    blocks_used: int
    blocks_total: int
    queued_prefill_tokens: int
    step_seconds: float  # moving average; 0 before the first step
    prefill_tokens_per_second: float  # moving average over steps that prefilled; 0: not known yet


class Engine:
    """Owns the scheduler and drives the executor. Not thread-safe."""

    def __init__(
        self,
        executor: Executor,
        config: EngineConfig,
        *,
        revision: str = "",
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
        warm_up_rate: float = 0.0,
    ) -> None:
        """`revision` is the salt of every block hash; `warm_up_rate` says what is known of the
        device's prompt tokens a second (0: nothing). Raises ValueError for settings that no
        request could be served with."""
        check_config(config)
        self._executor = executor
        self._config = config
        self._weights = WeightSets(revision)
        self._clock = clock
        self._rng = rng or random.Random()
        self._scheduler = Scheduler(
            config,
            executor.num_blocks,
            executor.block_size,
            executor.depth,
            relays=executor.relays,
        )
        self._flights: deque[_Flight] = deque()
        self.max_model_len = self._limit_length()  # prompt and generated tokens, of any request
        self.heartbeat = clock()  # when the last step finished, by the clock given
        self._requests: dict[str, _InFlight] = {}
        self._deadlines: list[tuple[float, str]] = []  # a heap, some of requests that have ended
        self._pending: list[SequenceDelta] = []  # of sequences that ended between steps
        self._arrivals = 0
        self._times = StepTimes(warm_up_rate)
        # Seconds that the newest step takes even on a bad day. It stays after the step, until
        # whoever watches the turn has seen it end. Any thread may read it.
        self.step_allowance = 0.0
        self._failures = 0  # in a row
        self._dead: str | None = None

    @property
    def max_num_seqs(self) -> int:
        """Sequences that run at the same time, at most: no more than a step has tokens."""
        return self._scheduler.max_running

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to say."""
        return self._scheduler.has_work or bool(self._pending)

    @property
    def dead(self) -> str | None:
        """Why the engine was given up, or None while it serves."""
        return self._dead or self._executor.lost

    def stats(self) -> EngineStats:
        """A copy of the totals since the start."""
        return replace(self._scheduler.counters)

    def add(self, request: EngineRequest) -> None:
        """Queues a request. Raises InvalidRequest, RevisionGone or EngineDead."""
        self._check_alive()
        executor = self._executor
        validate_request(
            request, vocab_size=executor.info.vocab_size, max_model_len=self.max_model_len
        )
        request_id = request.request_id
        if request_id in self._requests or any(
            delta.key.request_id == request_id for delta in self._pending
        ):
            raise InvalidRequest("id", f"id {request_id!r} is in flight already")
        weights = self._weights.find(request.revision)
        root = root_hash(weights.revision, request.salt)
        hashes: list[BlockHash] = []
        if self._config.enable_prefix_caching:
            hashes = block_hashes(root, request.token_ids, executor.block_size)
        seed = request.sampling.seed
        sequences = sequences_of(
            request,
            first_arrival=self._arrivals,
            seed=self._rng.getrandbits(64) if seed is None else seed,
            eos_token_ids=executor.info.eos_token_ids,
            max_model_len=self.max_model_len,
            root=root,
            hashes=hashes,
            weights=weights.number,
        )
        self._arrivals += len(sequences)
        deadline = None
        if request.deadline_seconds is not None:
            deadline = self._clock() + request.deadline_seconds
            heappush(self._deadlines, (deadline, request_id))
        in_flight = {seq.key.index: seq for seq in sequences}
        self._requests[request_id] = _InFlight(in_flight, deadline, request.salt)
        if len(self._deadlines) > 2 * len(self._requests):
            self._compact_deadlines()
        for seq in sequences:
            self._scheduler.add(seq)

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one of its sequences, and frees its blocks now; a CANCELLED delta
        comes with the next step. What is unknown or has ended is ignored."""
        self._end(request_id, index, FinishReason.CANCELLED)

    def step(self) -> StepOutput:
        """Computes one step, if anybody is running or waiting. Raises EngineDead alone."""
        self._check_alive()
        self._expire()
        deltas, self._pending = self._pending, []
        if self._scheduler.has_work:
            deltas += self._run()
        for delta in deltas:
            if delta.finish is not None:
                self._forget(delta.key)
        changes = self._scheduler.blocks.cache.drain()
        return StepOutput(tuple(deltas), changes.stored, changes.removed)

    # Weights. All of these come between steps.

    @property
    def weights(self) -> WeightSets:
        """Which revisions requests may name."""
        return self._weights

    def activate(self, weights: WeightSet, *, recompute: bool) -> int:
        """New requests run on these weights, which the executor has; those in flight finish on
        the ones they began with. With `recompute` a request of which no token was drawn yet
        begins anew on these; returns the number of such sequences."""
        self._weights.activate(weights)
        moved = 0
        for request in self._requests.values() if recompute else ():
            for seq in list(request.sequences.values()) if request.silent else ():
                if seq.weights == weights.number:
                    continue
                size = self._executor.block_size if self._config.enable_prefix_caching else None
                successor = begun_anew(seq, weights, request.salt, size)
                self._scheduler.replace(seq, successor)
                request.sequences[seq.key.index] = successor
                moved += 1
        return moved

    def running_on(self, number: int) -> int:
        """Sequences in flight that are bound to a set of weights. O(sequences)."""
        return sum(
            seq.weights == number
            for request in self._requests.values()
            for seq in request.sequences.values()
        )

    def load(self) -> EngineLoad:
        """Cheap enough for every step."""
        scheduler, pool = self._scheduler, self._scheduler.blocks.pool
        return EngineLoad(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            blocks_used=pool.num_used,
            blocks_total=pool.num_usable,
            queued_prefill_tokens=scheduler.queued_prefill_tokens,
            step_seconds=self._times.step_seconds,
            prefill_tokens_per_second=self._times.prefill_rate,
        )

    def cached_blocks(self) -> list[BlockHash]:
        """All blocks that a new request could share, the changes not yet drained included."""
        return self._scheduler.blocks.cache.hashes()

    def _run(self) -> list[SequenceDelta]:
        """Fills the device with plans, and takes the oldest one's result."""
        scheduler = self._scheduler
        while scheduler.num_flights < self._executor.depth:
            known = scheduler.counters.prefilled_tokens
            plan = scheduler.schedule()
            if not plan.rows:
                break
            prefilled = scheduler.counters.prefilled_tokens - known
            allowance = self._times.allowance(plan.num_tokens)
            self._flights.append(_Flight(plan.step, prefilled, self._clock(), allowance))
            self.step_allowance = sum(flight.allowance for flight in self._flights)
            try:
                self._executor.submit(plan)
            except Exception as error:
                return self._failed(error)
        try:
            result = self._executor.collect()
        except Exception as error:
            return self._failed(error)
        try:
            scheduler.check_result(result)
        except Exception as error:
            if len(self._flights) > 1:
                # Their answers are on the way, and would be taken for those of later plans.
                return self._failed(DeviceLost(f"an answer does not fit its plan: {error}"))
            return self._failed(error)
        flight = self._flights.popleft()
        # A step that was submitted while another was computed began when that one was over.
        started = max(flight.submitted, self.heartbeat)
        self.heartbeat = self._clock()
        self._times.add(self.heartbeat - started, flight.prefill_tokens)
        self._failures = 0
        return scheduler.commit(result)

    def _failed(self, error: Exception) -> list[SequenceDelta]:
        """The sequences of the plans under way end; with the last failure that is borne, all do."""
        log.error("step %d failed on the device", self._flights[0].step, exc_info=error)
        self._flights.clear()
        reason = f"the step failed on the device: {type(error).__name__}: {error}"
        scheduler = self._scheduler
        deltas = scheduler.fail(reason)
        self._failures += 1
        if isinstance(error, DeviceLost):
            self._dead = str(error)
        elif self._failures == MAX_FAILURES:
            self._dead = f"{MAX_FAILURES} steps failed in a row, the last one with: {error}"
        if self._dead is not None:
            log.critical("giving the engine up: %s", self._dead)
            for delta in deltas:
                self._forget(delta.key)
            for request_id in list(self._requests):
                self._end(request_id, None, FinishReason.ERROR, reason, ErrorCode.INTERNAL)
            deltas += self._pending
            self._pending = []
        return deltas

    def _expire(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= self._clock():
            deadline, request_id = heappop(self._deadlines)
            request = self._requests.get(request_id)
            # An id may be in use again, by a request with a deadline of its own.
            if request is not None and request.deadline == deadline:
                reason = "the request was not finished before its deadline"
                self._end(request_id, None, FinishReason.ERROR, reason, ErrorCode.DEADLINE_EXCEEDED)

    def _compact_deadlines(self) -> None:
        """Drops the deadlines of requests that have ended: they are not to outnumber the others,
        however far away they are."""
        self._deadlines = [
            (request.deadline, request_id)
            for request_id, request in self._requests.items()
            if request.deadline is not None
        ]
        heapify(self._deadlines)

    def _end(
        self,
        request_id: str,
        index: int | None,
        finish: FinishReason,
        error: str | None = None,
        code: ErrorCode | None = None,
    ) -> None:
        """Ends a request's sequences, or one of them, between steps."""
        request = self._requests.get(request_id)
        if request is None:
            return
        for seq in list(request.sequences.values()):
            if index is None or index == seq.key.index:
                self._scheduler.end(seq)
                self._forget(seq.key)
                self._pending.append(seq.ending(finish, error, code))

    def _forget(self, key: SequenceKey) -> None:
        """A sequence is no longer in flight. Fine if it is not known (any more)."""
        request = self._requests.get(key.request_id)
        if request is not None:
            request.sequences.pop(key.index, None)
            if not request.sequences:
                del self._requests[key.request_id]

    def _check_alive(self) -> None:
        if (why := self.dead) is not None:
            raise EngineDead(why)

    def _limit_length(self) -> int:
        info, config, pool = self._executor.info, self._config, self._scheduler.blocks.pool
        wanted = min(info.max_model_len, config.max_model_len or info.max_model_len)
        fitting = pool.num_usable * self._executor.block_size
        if fitting < wanted:
            log.warning(
                "max_model_len is lowered from %d to %d: the KV cache of %d blocks of %d tokens "
                "holds no longer sequence",
                wanted,
                fitting,
                pool.num_usable,
                self._executor.block_size,
            )
        return min(wanted, fitting)


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step under way."""

    step: int
    prefill_tokens: int
    submitted: float  # by the engine's clock
    allowance: float  # seconds


@dataclass(slots=True)
class _InFlight:
    """A request some of whose sequences have not ended."""

    sequences: dict[int, Sequence]
    deadline: float | None  # by the engine's clock
    salt: str

    @property
    def silent(self) -> bool:
        """Nobody has seen a token of it, neither here nor where it may have been before."""
        return all(
            len(seq.tokens) == seq.prompt_len and len(self.sequences) == seq.sampling.n
            for seq in self.sequences.values()
        )
