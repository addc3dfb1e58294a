"""The scheduler under random arrivals, cancels, failures and shortage: at least 10^5 steps.

The model of the device checks each row's reads; the rules here check everything else: blocks are
conserved, the budget holds, the first running sequence moves on with every step, cached hashes
name one content for ever, and every sequence that ends has the tokens of a direct computation.
"""

import random
from collections import Counter
from types import ModuleType

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from shoal.worker.request import EngineRequest, FinishReason, InvalidRequest, SequenceKey
from shoal.worker.sequence import Sequence, mix

MIN_STEPS = 100_000


def machine(kv: ModuleType, seen: Counter[str]) -> type[RuleBasedStateMachine]:
    """The state machine; `seen` counts what happened over all its runs."""

    class Scheduling(RuleBasedStateMachine):
        @initialize(
            num_blocks=st.integers(3, 40),
            block_size=st.sampled_from([1, 2, 4, 5, 8]),
            max_num_seqs=st.integers(1, 9),
            budget=st.integers(1, 40),
            cap=st.none() | st.integers(1, 30),
            caching=st.integers(0, 7).map(bool),
            depth=st.sampled_from([1, 1, 2, 3]),
            relays=st.booleans(),
        )
        def start(
            self,
            num_blocks: int,
            block_size: int,
            max_num_seqs: int,
            budget: int,
            cap: int | None,
            caching: bool,
            depth: int,
            relays: bool,
        ) -> None:
            self.engine, self.model = kv.build(
                num_blocks=num_blocks,
                block_size=block_size,
                max_model_len=96,
                depth=depth,
                relays=relays,
                max_num_seqs=max_num_seqs,
                max_batched_tokens=budget,
                max_prefill_tokens=cap,
                enable_prefix_caching=caching,
            )
            self.scheduler = self.engine._scheduler
            self.client = kv.Client(self.engine)
            self.depth = depth
            self.relays = relays
            self.budget, self.max_num_seqs = budget, max_num_seqs
            self.cap = cap or max(1, budget // 2)
            self.requests: dict[str, EngineRequest] = {}
            self.content: dict[bytes, int] = {}  # of block hashes, ever
            self.cancelled: set[SequenceKey] = set()
            self.poisoned: set[SequenceKey] = set()
            self.number = 0

        @rule(
            length=st.integers(1, 60),
            base=st.integers(0, 2),
            shared=st.integers(0, 60),
            max_tokens=st.integers(1, 40),
            n=st.sampled_from([1, 1, 1, 2, 3]),
            priority=st.sampled_from([0, 0, 0, 1, -1]),
            prompt_logprobs=st.sampled_from([None, None, None, 0]),
        )
        def arrive(
            self,
            length: int,
            base: int,
            shared: int,
            max_tokens: int,
            n: int,
            priority: int,
            prompt_logprobs: int | None,
        ) -> None:
            """A request whose first `shared` tokens are those of one of three documents."""
            self.number += 1
            document = random.Random(base)
            own = random.Random(self.number + 10)
            prompt = [
                (document if place < shared else own).randrange(kv.VOCAB) for place in range(length)
            ]
            request = kv.request(
                f"r{self.number}",
                prompt,
                max_tokens,
                n=n,
                priority=priority,
                prompt_logprobs=prompt_logprobs,
                salt=str(base),
                temperature=float(n > 1),
                seed=self.number,
            )
            try:
                self.engine.add(request)
            except InvalidRequest as error:
                assert error.field == "token_ids" and length >= self.engine.max_model_len
                seen["refused"] += 1
            else:
                self.requests[request.request_id] = request
                seen["sequences"] += n

        @rule(which=st.integers(0, 1000), index=st.none() | st.integers(0, 2))
        def cancel(self, which: int, index: int | None) -> None:
            if not self.requests:
                return
            request_id = sorted(self.requests)[which % len(self.requests)]
            self.engine.cancel(request_id, index)
            for sample in range(self.requests[request_id].sampling.n):
                key = SequenceKey(request_id, sample)
                if index in (None, sample) and key not in self.client.finish:
                    self.cancelled.add(key)
                    seen["cancelled"] += 1

        @rule(index=st.integers(0, 8))
        def poison(self, index: int) -> None:
            """One row's logits are not finite in the next step."""
            self.model.fault = lambda plan: self._row_errors(plan, index)
            self._step()
            self.model.fault = lambda plan: {}

        @rule()
        def lose_device(self) -> None:
            """One step fails on the device, and a later one succeeds: failures in a row would
            end the engine."""

            def fault(plan: object) -> dict[int, str]:
                raise kv.DeviceLost("lost")

            self.model.fault = fault
            self._step()
            self.model.fault = lambda plan: {}
            steps = self.model.num_steps
            while self.model.num_steps == steps:
                self.arrive(1, 0, 1, 1, 1, 0, None)
                self._step()
            seen["device failures"] += 1

        @rule(count=st.integers(1, 12))
        def steps(self, count: int) -> None:
            for _ in range(count):
                self._step()

        @rule(seed=st.integers(0, 2**32), busy=st.floats(0.05, 0.6), count=st.integers(100, 400))
        def storm(self, seed: int, busy: float, count: int) -> None:
            """Many steps with arrivals, cancels and faults between them."""
            rng = random.Random(seed)
            for _ in range(count):
                if self.scheduler.num_waiting < 20 and (
                    rng.random() < busy or not self.engine.has_work
                ):
                    self.arrive(
                        rng.randint(1, min(60, self.engine.max_model_len - 1)),
                        rng.randrange(3),
                        rng.choice((0, 8, 30, 60)),
                        rng.randint(1, 40),
                        rng.choice((1, 1, 1, 2, 4)),
                        rng.choice((0, 0, 0, 0, 1)),
                        0 if rng.random() < 0.05 else None,
                    )
                if rng.random() < 0.04:
                    self.cancel(rng.randrange(1000), rng.choice((None, 0, 1)))
                if rng.random() < 0.005:
                    self.poison(rng.randrange(9))
                if rng.random() < 0.002:
                    self.lose_device()
                self._step()

        @rule()
        def drain(self) -> None:
            """Nobody starves: what is in flight ends within a bound on its work."""
            tokens = sum(
                request.sampling.n * (len(request.token_ids) + (request.sampling.max_tokens or 0))
                for request in self.requests.values()
            )
            self.client.run(limit=2 * tokens + 10)
            for request in self.requests.values():
                for index in range(request.sampling.n):
                    self._check_end(request, SequenceKey(request.request_id, index))
            self.requests.clear()
            seen["drains"] += 1

        @invariant()
        def nothing_is_lost(self) -> None:
            if hasattr(self, "engine"):
                self.scheduler.check_integrity()
                assert set(self.engine.cached_blocks()) == self.client.known | set(
                    self.scheduler.blocks.cache._stored
                ) - set(self.scheduler.blocks.cache._removed)
                self._check_content()

        def teardown(self) -> None:
            if hasattr(self, "engine"):
                self.drain()
                assert self.engine.load().blocks_used == 0
                stats = self.engine.stats()
                seen["steps"] += self.model.num_steps
                seen[f"depth {self.depth}"] += self.model.num_steps
                seen["relayed"] += self.relays and self.depth > 1 and self.model.num_steps
                seen["preemptions"] += stats.preemptions
                seen["prefix hits"] += stats.prefix_hit_tokens

        def _step(self) -> None:
            if not self.engine.has_work:
                return
            steps = self.model.num_steps
            first = self._first_running() if self.depth == 1 else None
            self.client.step()
            if self.model.num_steps == steps:
                return  # only ends to report
            plan = self.model.plans[-1]
            slots = {row.slot for row in plan.rows}
            assert 0 < plan.num_tokens <= self.budget
            assert max(row.count for row in plan.rows) <= self.cap
            assert self.engine.load().running <= min(self.max_num_seqs, self.budget)
            if first is not None and first.key not in self.client.finish:
                assert first.slot in slots, "the first running sequence does not move on"

        def _first_running(self) -> Sequence | None:
            running = [*self.scheduler._decoding, *self.scheduler._prefilling]
            return min(running, key=lambda seq: seq.order, default=None)

        def _row_errors(self, plan, index: int) -> dict[int, str]:
            rows = [row for row in plan.rows if row.sample]
            if not rows:
                return {}
            slot = rows[index % len(rows)].slot
            for seq in (*self.scheduler._decoding, *self.scheduler._prefilling):
                if seq.slot == slot:
                    self.poisoned.add(seq.key)
            seen["row errors"] += 1
            return {slot: "logits are not finite"}

        def _check_content(self) -> None:
            """A hash names one content for ever, and findable blocks hold it once the plans under
            way are computed."""
            if self.model.under_way:
                return
            cache = self.scheduler.blocks.cache
            for block_hash in self.engine.cached_blocks():
                (block,) = cache.find([block_hash], 1)
                stored = self.model.stored(block)
                assert self.content.setdefault(block_hash, stored) == stored

        def _check_end(self, request: EngineRequest, key: SequenceKey) -> None:
            finish, tokens = self.client.finish[key], self.client.tokens[key]
            limit = min(
                request.sampling.max_tokens or 0,
                self.engine.max_model_len - len(request.token_ids),
            )
            seed = 0 if request.sampling.greedy else mix(request.sampling.seed or 0, key.index)
            want = kv.expected(request.token_ids, limit, seed=seed)
            if finish in (FinishReason.STOP, FinishReason.LENGTH):
                assert tokens == want, f"{key}: wrong tokens"
                assert (finish is FinishReason.STOP) == (tokens[-1] == kv.EOS)
                seen[finish.value] += 1
            else:
                assert tokens == want[: len(tokens)], f"{key}: wrong tokens before its end"
            if finish is FinishReason.CANCELLED:
                assert key in self.cancelled
            if request.sampling.prompt_logprobs is not None and tokens:
                entries = self.client.first[key].prompt_logprobs
                assert entries is not None and entries[0] is None
                got = [entry.token_ids[0] for entry in entries[1:]]
                assert got == list(request.token_ids[1:]), "prompt logprobs have gaps"

    return Scheduling


def test_random_schedules_keep_every_promise(kv: ModuleType) -> None:
    """At least 10^5 steps, and each kind of event among them often enough to mean something."""
    seen: Counter[str] = Counter()
    run_state_machine_as_test(
        machine(kv, seen),
        settings=settings(
            max_examples=200,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert seen["steps"] >= MIN_STEPS, seen
    for depth in (1, 2, 3):
        assert seen[f"depth {depth}"] >= MIN_STEPS // 10, seen
    assert seen["relayed"] >= MIN_STEPS // 10, seen
    for event in ("preemptions", "cancelled", "stop", "length", "drains", "sequences"):
        assert seen[event] >= 500, (event, seen)
    for event in ("row errors", "device failures", "refused"):
        assert seen[event] >= 50, (event, seen)
    assert seen["prefix hits"] >= 10_000, seen
