"""A model of the device: it stores what a KV cache would, and checks what every row reads.

In place of keys and values, a block's offset holds the rolling hash of all tokens up to that
position. A row that attends to anything but its own prefix, in whatever way the scheduler got
there, fails at once; and the next token is drawn from the hash of the full prefix (and
the seed, unless greedy), so that a wrong block would change the tokens as well.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from shoal.worker.config import EngineConfig
from shoal.worker.engine import Engine, SequenceDelta
from shoal.worker.executor import ModelInfo, SerialExecutor
from shoal.worker.request import EngineRequest, FinishReason, SamplingParams, SequenceKey
from shoal.worker.step import (
    PromptLogprobs,
    Row,
    Sampled,
    SlotInit,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

VOCAB = 97
EOS = 96
_PRIME = (1 << 61) - 1


def roll(state: int, token: int) -> int:
    return (state * 1_000_003 + token + 1) % _PRIME


def prefix_states(tokens: Sequence[int]) -> list[int]:
    """The rolling hash after each token."""
    states, state = [], 7
    for token in tokens:
        state = roll(state, token)
        states.append(state)
    return states


def next_token(state: int, seed: int) -> int:
    return ((state ^ seed) >> 7) % VOCAB


def continuation(tokens: Sequence[int], seed: int) -> Iterator[int]:
    """The tokens that the model draws after `tokens`, computed directly."""
    state = prefix_states(tokens)[-1]
    while True:
        token = next_token(state, seed)
        yield token
        state = roll(state, token)


def expected(
    prompt: Sequence[int],
    max_tokens: int,
    *,
    stop: frozenset[int] = frozenset({EOS}),
    seed: int = 0,
) -> list[int]:
    """What a request must get: up to a stop token or `max_tokens`. Greedy by default."""
    tokens = []
    for token in continuation(prompt, seed):
        tokens.append(token)
        if token in stop or len(tokens) == max_tokens:
            return tokens
    raise AssertionError


class DeviceLost(RuntimeError):
    pass


class _Slot:
    def __init__(self, init: SlotInit) -> None:
        self.states = prefix_states(init.token_ids)
        self.tokens = list(init.token_ids)
        self.table = list(init.block_ids)
        self.seed = 0 if init.sampling.greedy else init.seed


class KvModel(SerialExecutor):
    """An Executor over that model, of `depth` plans under way, each computed when it is collected.
    `fault` may raise for a plan, or name a slot's error."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        max_model_len: int = 128,
        depth: int = 1,
        relays: bool = False,
    ) -> None:
        self.depth = depth
        self.relays = relays
        self.under_way: deque[StepPlan] = deque()
        self.info = ModelInfo("model", VOCAB, max_model_len, (EOS,), None, "float32")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.content = [[-1] * block_size for _ in range(num_blocks)]
        self.slots: dict[int, _Slot] = {}
        self.plans: list[StepPlan] = []  # the last few
        self.num_steps = 0
        self.num_computed = 0
        self.fault: Callable[[StepPlan], dict[int, str]] = lambda plan: {}

    def submit(self, plan: StepPlan) -> None:
        assert plan.rows, "a plan without rows"
        self.under_way.append(plan)
        assert len(self.under_way) <= self.depth

    def collect(self) -> StepResult:
        try:
            return self.execute(self.under_way.popleft())
        except Exception:
            self.under_way.clear()
            raise

    def execute(self, plan: StepPlan) -> StepResult:
        errors = self.fault(plan)
        self.plans = [*self.plans[-7:], plan]
        self.num_steps += 1
        assert len({row.slot for row in plan.rows}) == len(plan.rows), "two rows of one slot"
        for init in plan.init:
            self.slots[init.slot] = _Slot(init)
        for grow in plan.grow:
            self.slots[grow.slot].table += grow.block_ids
        for row in plan.rows:
            self._store(row)
        for row in plan.rows:
            self._attend(row)
        sampled, prompt = [], []
        for row in plan.rows:
            slot = self.slots[row.slot]
            if row.sample:
                assert row.start + row.count == len(slot.tokens), "sampled before the end"
                sampled.append(self._draw(row.slot, slot, errors.get(row.slot)))
            else:
                assert row.start + row.count < len(slot.tokens), "the end, but no sample"
            entries = tuple(
                TokenLogprobs((slot.tokens[place + 1],), (float(-place - 1),), 1)
                for place in range(row.start, min(row.start + row.count, len(slot.tokens) - 1))
            )
            prompt.append(PromptLogprobs(row.slot, row.start + 1, entries))
        return StepResult(tuple(sampled), tuple(prompt))

    def close(self) -> None:
        self.slots.clear()

    def stored(self, block: int) -> int:
        """What a full block holds: the state after its last token."""
        return self.content[block][-1]

    def _store(self, row: Row) -> None:
        slot, size = self.slots[row.slot], self.block_size
        assert row.count > 0, "an empty row"
        self.num_computed += row.count
        for place in range(row.start, row.start + row.count):
            block = slot.table[place // size]
            assert block != 0, "the null block written"
            self.content[block][place % size] = slot.states[place]

    def _attend(self, row: Row) -> None:
        slot, size = self.slots[row.slot], self.block_size
        end = row.start + row.count
        for place, block in enumerate(slot.table[: -(-end // size)]):
            mine = slot.states[place * size : min(end, (place + 1) * size)]
            assert self.content[block][: len(mine)] == mine, (
                f"slot {row.slot} reads what is not its prefix in block {block}"
            )

    def _draw(self, index: int, slot: _Slot, error: str | None) -> Sampled:
        token = next_token(slot.states[-1], slot.seed)
        slot.tokens.append(token)
        slot.states.append(roll(slot.states[-1], token))
        return Sampled(index, token, None, error)


class Client:
    """Keeps what an engine reports, by sequence, and checks the order of what comes."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: dict[SequenceKey, list[int]] = {}
        self.finish: dict[SequenceKey, FinishReason] = {}
        self.last: dict[SequenceKey, SequenceDelta] = {}
        self.first: dict[SequenceKey, SequenceDelta] = {}
        self.known: set[bytes] = set()  # block hashes, by the events

    def step(self) -> list[SequenceDelta]:
        output = self.engine.step()
        for delta in output.deltas:
            assert delta.key not in self.finish, "a delta after the last one"
            self.first.setdefault(delta.key, delta)
            self.tokens.setdefault(delta.key, []).extend(delta.token_ids)
            self.last[delta.key] = delta
            if delta.finish is not None:
                self.finish[delta.key] = delta.finish
        assert self.known.isdisjoint(output.stored)
        assert self.known.issuperset(output.removed)
        self.known |= set(output.stored)
        self.known -= set(output.removed)
        return list(output.deltas)

    def run(self, limit: int = 10_000) -> None:
        """Steps until there is nothing to do."""
        for _ in range(limit):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError(f"still busy after {limit} steps")


def build(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_model_len: int = 128,
    depth: int = 1,
    relays: bool = False,
    clock: Callable[[], float] = lambda: 0.0,
    warm_up_rate: float = 0.0,
    **config: object,
) -> tuple[Engine, KvModel]:
    """An engine over a fresh model of the device."""
    model = KvModel(num_blocks, block_size, max_model_len, depth, relays)
    settings = EngineConfig(**{"max_num_seqs": 8, "max_batched_tokens": 32, **config})
    rng = random.Random(0)
    return Engine(model, settings, clock=clock, rng=rng, warm_up_rate=warm_up_rate), model


def request(
    request_id: str, prompt: Sequence[int], max_tokens: int | None = 8, **fields: object
) -> EngineRequest:
    """A request, greedy by default; `fields` go to EngineRequest where it has them, else to its
    sampling."""
    fields.setdefault("temperature", 0.0)
    own = {
        name: fields.pop(name)
        for name in ("prompt_len", "priority", "salt", "deadline_seconds", "first_index")
        if name in fields
    }
    return EngineRequest(
        request_id=request_id,
        token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, **fields),
        **{"prompt_len": len(prompt), **own},
    )
