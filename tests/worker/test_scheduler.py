"""What the scheduler decides, case by case, seen through the engine and the model of the device."""

import random
from types import ModuleType

import pytest

from shoal.worker.request import FinishReason, SequenceKey


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(90) for _ in range(length)]


def counts(plan) -> dict[int, int]:
    """Tokens of each slot in a plan."""
    return {row.slot: row.count for row in plan.rows}


def test_a_long_prompt_is_computed_in_capped_chunks(kv: ModuleType) -> None:
    """No step computes more than max_prefill_tokens of one prompt; the last chunk samples."""
    engine, model = kv.build(max_batched_tokens=32, max_prefill_tokens=12)
    engine.add(kv.request("a", prompt(40), 1))
    kv.Client(engine).run()
    rows = [row for plan in model.plans for row in plan.rows]
    assert [(row.start, row.count, row.sample) for row in rows] == [
        (0, 12, False),
        (12, 12, False),
        (24, 12, False),
        (36, 4, True),
    ]


def test_the_cap_is_half_the_budget_by_default(kv: ModuleType) -> None:
    """So that one prompt leaves as much for the others."""
    engine, model = kv.build(max_batched_tokens=32)
    engine.add(kv.request("a", prompt(40), 1))
    engine.step()
    assert counts(model.plans[-1]) == {0: 16}


def test_short_prompts_overtake_long_ones(kv: ModuleType) -> None:
    """Two long prompts ahead in the queue, one running: a short one starts at once, and the second
    long one only takes what is left."""
    engine, model = kv.build(max_batched_tokens=32)
    engine.add(kv.request("long", prompt(100, 1), 4))
    engine.add(kv.request("also long", prompt(100, 2), 4))
    engine.add(kv.request("short", prompt(10, 3), 4))
    client = kv.Client(engine)
    deltas = client.step()
    assert [delta.key.request_id for delta in deltas] == ["short"]
    assert sorted(counts(model.plans[-1]).values()) == [6, 10, 16]
    client.run()


def test_long_prompts_alone_use_the_whole_budget(kv: ModuleType) -> None:
    """What nobody short wants goes to the long ones behind the first, up to their cap each."""
    engine, model = kv.build(max_batched_tokens=32, max_prefill_tokens=8, num_blocks=200)
    for number in range(6):
        engine.add(kv.request(f"{number}", prompt(60, number), 1))
    for _ in range(3):
        engine.step()
        assert counts(model.plans[-1]) == {0: 8, 1: 8, 2: 8, 3: 8}


def test_a_long_prompt_moves_on_under_a_stream_of_short_ones(kv: ModuleType) -> None:
    """Arrivals without end do not starve it: it takes the steps that its cap says, no more."""
    engine, _ = kv.build(max_batched_tokens=32, num_blocks=200)
    client = kv.Client(engine)
    engine.add(kv.request("long", prompt(120, 1), 1))
    steps = 0
    while SequenceKey("long", 0) not in client.finish:
        for number in range(2):
            engine.add(kv.request(f"{steps}/{number}", prompt(14, 3 * steps + number), 2))
        client.step()
        steps += 1
    assert steps == 8  # 120 tokens, 16 a step


def test_decodes_never_wait_for_prompts(kv: ModuleType) -> None:
    """Every running generation gets its token in every step while prompts pour in."""
    engine, model = kv.build(max_batched_tokens=16, max_num_seqs=6, num_blocks=200)
    client = kv.Client(engine)
    for number in range(3):
        engine.add(kv.request(f"g{number}", prompt(4, number), 30, ignore_eos=True))
    client.step()
    for number in range(4):
        engine.add(kv.request(f"p{number}", prompt(100, 10 + number), 1))
    for _ in range(20):
        tokens = {delta.key.request_id for delta in client.step()}
        assert {"g0", "g1", "g2"} <= tokens
        assert model.plans[-1].num_tokens == 16


def test_more_sequences_than_budget_never_run(kv: ModuleType) -> None:
    """The budget bounds the running sequences, so that each of them can decode in each step."""
    engine, model = kv.build(max_batched_tokens=4, max_num_seqs=100)
    client = kv.Client(engine)
    for number in range(10):
        engine.add(kv.request(f"r{number}", prompt(3, number), 10, ignore_eos=True))
    while engine.has_work:
        client.step()
        assert engine.load().running <= 4
        assert model.plans[-1].num_tokens <= 4
    assert len(client.finish) == 10


def test_prompts_without_a_share_count_as_running(kv: ModuleType) -> None:
    """Long prompts that only wait for their turn hold a place each: when they come to decode, the
    budget still has a token for everyone."""
    engine, model = kv.build(max_batched_tokens=8, max_prefill_tokens=2, max_num_seqs=100)
    client = kv.Client(engine)
    for number in range(4):
        engine.add(kv.request(f"long{number}", prompt(10, number), 40, ignore_eos=True))
    client.step()
    for number in range(8):
        engine.add(kv.request(f"short{number}", prompt(1, 10 + number), 40, ignore_eos=True))
    while engine.has_work:
        client.step()
        assert engine.load().running <= 8
        assert model.plans[-1].num_tokens <= 8
    assert len(client.finish) == 12


def test_waiting_goes_by_priority_then_arrival(kv: ModuleType) -> None:
    """The smaller priority is sooner, whenever it came."""
    engine, _ = kv.build(max_num_seqs=1)
    client = kv.Client(engine)
    for name, priority in (("late", 1), ("first", 0), ("second", 0), ("urgent", -5)):
        engine.add(kv.request(name, prompt(4), 2, ignore_eos=True, priority=priority))
    client.run()
    assert [key.request_id for key in client.finish] == ["urgent", "first", "second", "late"]


def test_samples_share_the_prompt_within_one_step(kv: ModuleType) -> None:
    """The full blocks of the prompt are computed and held once, from the first step on."""
    engine, model = kv.build(max_batched_tokens=64, max_prefill_tokens=64)
    engine.add(kv.request("a", prompt(18), 4, n=4, seed=1))
    client = kv.Client(engine)
    client.step()
    assert sorted(counts(model.plans[-1]).values()) == [2, 2, 2, 18]
    assert engine.load().blocks_used == 4 + 4  # four shared, and a last one each
    client.run()
    assert len(client.finish) == 4


def test_samples_of_a_long_prompt_wait_for_its_blocks(kv: ModuleType) -> None:
    """A prompt that takes several steps is computed once, not once a sample."""
    engine, model = kv.build(max_batched_tokens=16, num_blocks=200)
    engine.add(kv.request("a", prompt(97), 1, n=5, seed=1))
    client = kv.Client(engine)
    client.run()
    assert model.num_computed == 97 + 4 * 1
    assert len(client.finish) == 5


def test_the_last_token_is_always_computed(kv: ModuleType) -> None:
    """A prompt that is cached to its end still computes its last block: its logits are needed."""
    engine, model = kv.build()
    client = kv.Client(engine)
    engine.add(kv.request("a", prompt(16), 1))
    client.run()
    engine.add(kv.request("b", prompt(16), 1))
    client.run()
    assert model.plans[-1].rows[0].start == 12
    assert client.last[SequenceKey("b", 0)].cached_tokens == 12
    assert engine.stats().prefix_hit_tokens == 12


def test_generated_blocks_are_found_again(kv: ModuleType) -> None:
    """The next turn of a conversation shares what the last one generated."""
    engine, _ = kv.build()
    client = kv.Client(engine)
    engine.add(kv.request("a", prompt(10), 20, ignore_eos=True))
    client.run()
    turn = [*prompt(10), *client.tokens[SequenceKey("a", 0)]]
    engine.add(kv.request("b", turn, 1))
    client.run()
    assert client.last[SequenceKey("b", 0)].cached_tokens == 28  # the 30th was never stored


def test_salts_and_switches_keep_prefixes_apart(kv: ModuleType) -> None:
    """Another tenant's blocks, or any while caching is off, are not found."""
    engine, _ = kv.build()
    client = kv.Client(engine)
    engine.add(kv.request("a", prompt(16), 1, salt="x"))
    client.run()
    engine.add(kv.request("b", prompt(16), 1, salt="y"))
    client.run()
    assert client.last[SequenceKey("b", 0)].cached_tokens == 0

    engine, _ = kv.build(enable_prefix_caching=False)
    client = kv.Client(engine)
    engine.add(kv.request("a", prompt(16), 2, n=2, seed=1))
    client.run()
    assert engine.cached_blocks() == [] and engine.stats().prefix_queried_tokens == 0
    assert engine.stats().prefilled_tokens == 32


def test_the_cache_is_evicted_end_first(kv: ModuleType) -> None:
    """Of a freed sequence the last blocks are reused first: a shared prefix lives longer."""
    engine, _ = kv.build(num_blocks=11, max_model_len=40)
    client = kv.Client(engine)
    engine.add(kv.request("a", prompt(33, 1), 1))
    client.run()
    engine.add(kv.request("b", prompt(15, 2), 1))
    client.run()
    engine.add(kv.request("c", prompt(33, 1), 1))
    client.run()
    assert client.last[SequenceKey("c", 0)].cached_tokens == 24


def test_preemption_takes_the_least_loss(kv: ModuleType) -> None:
    """A prompt half computed gives back ten blocks for twenty tokens: it goes, neither the oldest
    nor the newest sequence, and all get their tokens in the end."""
    engine, _ = kv.build(num_blocks=15, max_batched_tokens=16, max_prefill_tokens=4)
    client = kv.Client(engine)
    wanted = {"old": (4, 8), "prompt": (40, 4), "new": (3, 8)}
    for name, (length, max_tokens) in wanted.items():
        engine.add(kv.request(name, prompt(length, length), max_tokens, ignore_eos=True))
    deltas = []
    while not engine.stats().preemptions:
        deltas = client.step()
    assert [delta.key.request_id for delta in deltas] == ["old", "new"]
    assert engine.stats().preempted_tokens == 20
    client.run()
    for name, (length, max_tokens) in wanted.items():
        want = kv.expected(prompt(length, length), max_tokens, stop=frozenset())
        assert client.tokens[SequenceKey(name, 0)] == want


def test_preemption_takes_the_lowest_priority(kv: ModuleType) -> None:
    """Priority comes before loss."""
    engine, _ = kv.build(num_blocks=9, max_batched_tokens=64, max_prefill_tokens=64)
    client = kv.Client(engine)
    engine.add(kv.request("low", prompt(12, 1), 12, ignore_eos=True, priority=1))
    client.step()
    engine.add(kv.request("high", prompt(5, 2), 20, ignore_eos=True, priority=0))
    client.run()
    assert engine.stats().preemptions >= 1
    assert next(iter(client.finish)).request_id == "high"
    for name, tokens, count in (("low", prompt(12, 1), 12), ("high", prompt(5, 2), 20)):
        assert client.tokens[SequenceKey(name, 0)] == kv.expected(tokens, count, stop=frozenset())


def test_admission_leaves_headroom(kv: ModuleType) -> None:
    """A newcomer waits while its blocks would leave less than one for each that runs."""
    engine, _ = kv.build(num_blocks=11, max_batched_tokens=64, max_prefill_tokens=64)
    client = kv.Client(engine)
    engine.add(kv.request("a", prompt(15, 1), 3, ignore_eos=True))  # 4 of 10 blocks
    engine.add(kv.request("b", prompt(16, 2), 3, ignore_eos=True))  # 4, leaves 2 for one
    engine.add(kv.request("c", prompt(4, 3), 3, ignore_eos=True))  # 1 would leave 1 for two
    client.step()
    assert (engine.load().running, engine.load().waiting) == (2, 1)
    client.run()
    assert len(client.finish) == 3 and engine.stats().preemptions == 0


def test_a_preempted_sequence_finds_its_blocks_again(kv: ModuleType) -> None:
    """Preemption frees blocks but forgets only those that are reused."""
    engine, _ = kv.build(num_blocks=14, max_batched_tokens=64, max_prefill_tokens=64)
    client = kv.Client(engine)
    for name in ("a", "b", "c"):
        engine.add(kv.request(name, prompt(17, ord(name)), 12, ignore_eos=True))
    client.run()
    stats = engine.stats()
    assert stats.preemptions >= 1
    assert stats.prefilled_tokens - stats.prompt_tokens < stats.preempted_tokens


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8])
def test_one_sequence_may_fill_the_whole_pool(kv: ModuleType, length: int) -> None:
    """A pool smaller than the model's length lowers the limit, and a sequence gets there."""
    engine, _ = kv.build(num_blocks=4, max_model_len=500)
    assert engine.max_model_len == 12
    client = kv.Client(engine)
    engine.add(kv.request("a", prompt(length), None, ignore_eos=True))
    engine.add(kv.request("b", prompt(length, 1), None, ignore_eos=True))
    client.run()
    for name, seed in (("a", 0), ("b", 1)):
        key = SequenceKey(name, 0)
        assert client.finish[key] is FinishReason.LENGTH
        want = kv.expected(prompt(length, seed), 12 - length, stop=frozenset())
        assert client.tokens[key] == want


def test_a_device_that_relays_decodes_in_every_plan(kv: ModuleType) -> None:
    """The next plan has the row of a token that nobody knows yet, and the end by length is
    foreseen: no row is for nothing."""
    engine, model = kv.build(depth=2, relays=True)
    client = kv.Client(engine)
    engine.add(kv.request("a", prompt(9), 6, ignore_eos=True))
    client.step()
    assert [row.start for plan in model.under_way for row in plan.rows] == [9]
    client.run()
    assert client.tokens[SequenceKey("a", 0)] == kv.expected(prompt(9), 6, stop=frozenset())
    rows = [row for plan in model.plans for row in plan.rows]
    assert [(row.start, row.count) for row in rows] == [(0, 9), *((9 + i, 1) for i in range(5))]


@pytest.mark.parametrize("depth", [2, 3])
def test_a_stop_token_costs_a_relaying_device_the_plans_under_way(
    kv: ModuleType, depth: int
) -> None:
    """They have a row of the ended sequence, whose draw nobody sees; its blocks are free and its
    prefix can be shared."""
    engine, model = kv.build(depth=depth, relays=True)
    client = kv.Client(engine)
    tokens = kv.expected(prompt(9), 7, stop=frozenset())
    assert tokens[-1] not in tokens[:-1]
    engine.add(kv.request("a", prompt(9), 40, ignore_eos=True, stop_token_ids=(tokens[-1],)))
    client.run()
    assert client.tokens[SequenceKey("a", 0)] == tokens
    assert model.num_steps == len(tokens) + depth - 1
    assert engine.load().blocks_used == 0
    engine.add(kv.request("b", prompt(9) + tokens, 1))
    client.run()
    assert client.last[SequenceKey("b", 0)].cached_tokens == 12
