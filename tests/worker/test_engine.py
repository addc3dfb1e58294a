"""The engine over the model of the device: what requests get, and what becomes of bad ones."""

import random
from types import ModuleType

import pytest

from shoal.worker.engine import MAX_FAILURES, EngineDead
from shoal.worker.executor import DeviceLost
from shoal.worker.loop import EngineLoop
from shoal.worker.request import ErrorCode, FinishReason, InvalidRequest, SequenceKey
from shoal.worker.sequence import mix
from shoal.worker.step import StepPlan, StepResult


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(90) for _ in range(length)]


def key(name: str, index: int = 0) -> SequenceKey:
    return SequenceKey(name, index)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_tokens_are_those_of_a_direct_computation(kv: ModuleType) -> None:
    """Thirty requests in mixed batches get what each would get alone."""
    engine, _ = kv.build()
    client = kv.Client(engine)
    for number in range(30):
        engine.add(kv.request(f"{number}", prompt(number + 1, number), 12))
    client.run()
    for number in range(30):
        want = kv.expected(prompt(number + 1, number), 12)
        assert client.tokens[key(f"{number}")] == want


def test_an_end_token_ends_and_is_reported(kv: ModuleType) -> None:
    """EOS and stop tokens are the last of the delta's ids, with STOP."""
    tokens = kv.expected(prompt(5), 12, stop=frozenset())
    stop = next(token for token in tokens if tokens.count(token) == 1 and token != kv.EOS)
    place = tokens.index(stop)
    engine, _ = kv.build()
    client = kv.Client(engine)
    engine.add(kv.request("a", prompt(5), 12, ignore_eos=True, stop_token_ids=(stop,)))
    client.run()
    assert client.tokens[key("a")] == tokens[: place + 1]
    assert client.finish[key("a")] is FinishReason.STOP


def test_min_tokens_hold_a_stop_token_back(kv: ModuleType) -> None:
    """Before min_tokens a stop token that the device drew all the same ends nothing."""
    tokens = kv.expected(prompt(5), 12, stop=frozenset())
    engine, _ = kv.build()
    client = kv.Client(engine)
    engine.add(kv.request("a", prompt(5), 12, stop_token_ids=tuple(range(kv.VOCAB)), min_tokens=5))
    client.run()
    assert client.tokens[key("a")] == tokens[:5]


@pytest.mark.parametrize("max_tokens", [1, 7, None, 500])
def test_length_ends_at_the_smaller_limit(kv: ModuleType, max_tokens: int | None) -> None:
    """max_tokens, or what max_model_len leaves, whichever is less."""
    engine, _ = kv.build(max_model_len=30)
    client = kv.Client(engine)
    engine.add(kv.request("a", prompt(20), max_tokens, ignore_eos=True))
    client.run()
    assert len(client.tokens[key("a")]) == min(max_tokens or 10, 10)
    assert client.finish[key("a")] is FinishReason.LENGTH


def test_a_migrated_request_goes_on(kv: ModuleType) -> None:
    """Tokens generated elsewhere are context; limits are what is left of them."""
    want = kv.expected(prompt(9), 12, stop=frozenset())
    engine, model = kv.build()
    client = kv.Client(engine)
    fields = {"prompt_len": 9, "first_index": 3, "seed": 5, "ignore_eos": True}
    engine.add(kv.request("a", [*prompt(9), *want[:5]], 7, min_tokens=2, **fields))
    client.run()
    assert client.tokens[key("a", 3)] == want[5:]
    (init,) = model.plans[0].init
    assert init.prompt_len == 9 and init.seed == mix(5, 3)
    assert init.sampling.min_tokens == 7  # from the prompt's end, as the sampler counts


def test_seeds_differ_by_sample_and_repeat_by_request(kv: ModuleType) -> None:
    """Samples draw apart; a seeded request draws the same again; an unseeded one does not."""

    def seeds(seed: int | None) -> list[int]:
        engine, model = kv.build()
        for name in ("a", "b"):
            engine.add(kv.request(name, prompt(3), 1, n=3, seed=seed))
        engine.step()
        return [init.seed for init in model.plans[0].init]

    seeded = seeds(42)
    assert seeded[:3] == seeded[3:] == seeds(42)[:3]
    assert len(set(seeded)) == 3
    assert len(set(seeds(None))) == 6
    assert all(0 <= seed < 1 << 64 for seed in [*seeded, mix(-1, 0), mix(2**64 - 1, 127)])


def test_cancel_frees_at_once_and_reports_next(kv: ModuleType) -> None:
    """A cancelled request, waiting, prefilling or decoding, holds nothing after the call."""
    engine, _ = kv.build(max_num_seqs=2)
    client = kv.Client(engine)
    engine.add(kv.request("decoding", prompt(4, 1), 50, ignore_eos=True))
    engine.add(kv.request("prefilling", prompt(90, 2), 5))
    engine.add(kv.request("waiting", prompt(4, 3), 5))
    client.step()
    assert (engine.load().running, engine.load().waiting) == (2, 1)
    for name in ("decoding", "prefilling", "waiting", "unknown"):
        engine.cancel(name)
        engine.cancel(name)
    load = engine.load()
    assert (load.running, load.waiting, load.blocks_used) == (0, 0, 0)
    assert engine.has_work
    deltas = client.step()
    assert [delta.finish for delta in deltas] == [FinishReason.CANCELLED] * 3
    assert not engine.has_work


def test_one_sample_can_be_cancelled(kv: ModuleType) -> None:
    """The others of its request go on."""
    engine, _ = kv.build()
    client = kv.Client(engine)
    engine.add(kv.request("a", prompt(6), 6, n=3, seed=1, ignore_eos=True))
    client.step()
    engine.cancel("a", 1)
    client.run()
    finishes = [client.finish[key("a", index)] for index in range(3)]
    assert finishes == [FinishReason.LENGTH, FinishReason.CANCELLED, FinishReason.LENGTH]


def test_an_id_is_taken_until_its_last_delta(kv: ModuleType) -> None:
    """A duplicate is refused while the first is in flight, or its end not yet reported."""
    engine, _ = kv.build()
    client = kv.Client(engine)
    engine.add(kv.request("a", prompt(4), 2, ignore_eos=True))
    with pytest.raises(InvalidRequest, match="'a' is in flight") as refused:
        engine.add(kv.request("a", prompt(4), 2))
    assert refused.value.field == "id"
    engine.cancel("a")
    with pytest.raises(InvalidRequest):
        engine.add(kv.request("a", prompt(4), 2))
    client.step()
    engine.add(kv.request("a", prompt(4), 2))


def test_deadlines_end_requests(kv: ModuleType) -> None:
    """At its deadline a request ends with a code of its own; a later one with the id lives on."""
    clock = Clock()
    engine, _ = kv.build(clock=clock)
    engine.add(kv.request("a", prompt(4), 50, ignore_eos=True, deadline_seconds=2.0))
    engine.step()
    clock.now += 1.9
    assert engine.step().deltas[0].finish is None
    clock.now += 0.1
    (delta,) = engine.step().deltas
    assert delta.finish is FinishReason.ERROR and delta.code is ErrorCode.DEADLINE_EXCEEDED
    assert engine.load().blocks_used == 0

    engine.add(kv.request("b", prompt(4), 50, deadline_seconds=2.0))
    engine.cancel("b")
    engine.step()
    engine.add(kv.request("b", prompt(4), 3, ignore_eos=True, deadline_seconds=60.0))
    clock.now += 3.0
    assert engine.step().deltas[0].finish is None


def test_prompt_logprobs_come_whole_with_the_first_delta(kv: ModuleType) -> None:
    """Over chunks and in spite of a warm cache: one a position, the first empty."""
    engine, _ = kv.build(max_batched_tokens=8)
    client = kv.Client(engine)
    engine.add(kv.request("warm", prompt(20), 2))
    client.run()
    engine.add(kv.request("a", prompt(20), 3, ignore_eos=True, prompt_logprobs=0))
    client.run()
    first = client.first[key("a")]
    assert first.cached_tokens == 0 and first.prompt_logprobs is not None
    assert first.prompt_logprobs[0] is None
    assert [entry.token_ids[0] for entry in first.prompt_logprobs[1:]] == prompt(20)[1:]
    assert client.last[key("a")].prompt_logprobs is None


def test_an_error_of_one_row_ends_that_sequence(kv: ModuleType) -> None:
    """The others of the step go on, and what the sequence stored is not found again."""
    engine, model = kv.build()
    client = kv.Client(engine)
    engine.add(kv.request("bad", prompt(12, 1), 9, ignore_eos=True))
    engine.add(kv.request("good", prompt(12, 2), 9, ignore_eos=True))
    client.step()
    model.fault = lambda plan: {0: "logits are not finite"}
    client.step()
    model.fault = lambda plan: {}
    last = client.last[key("bad")]
    assert last.finish is FinishReason.ERROR and last.code is ErrorCode.INTERNAL
    assert last.error == "logits are not finite"
    client.run()
    assert client.tokens[key("good")] == kv.expected(prompt(12, 2), 9, stop=frozenset())
    engine.add(kv.request("again", prompt(12, 1), 1))
    client.run()
    assert client.last[key("again")].cached_tokens == 0


def lost(plan: StepPlan) -> dict[int, str]:
    raise RuntimeError("device lost")


def test_a_failed_step_ends_what_was_in_it(kv: ModuleType) -> None:
    """Its sequences end with the reason; waiting ones are served; no old block is trusted."""
    engine, model = kv.build(max_num_seqs=1)
    client = kv.Client(engine)
    engine.add(kv.request("a", prompt(12), 9, ignore_eos=True))
    engine.add(kv.request("b", prompt(12), 9, ignore_eos=True))
    client.step()
    model.fault = lost
    client.step()
    model.fault = lambda plan: {}
    assert client.finish[key("a")] is FinishReason.ERROR
    assert "device lost" in (client.last[key("a")].error or "")
    assert engine.load().blocks_used == 0 and client.known == set()
    client.run()
    assert client.tokens[key("b")] == kv.expected(prompt(12), 9, stop=frozenset())
    assert client.last[key("b")].cached_tokens == 0
    assert engine.dead is None


def test_a_running_sequence_outside_the_failed_step_is_computed_anew(kv: ModuleType) -> None:
    """A prompt that had no share of the failed step starts over, and gets its tokens."""
    engine, model = kv.build(max_batched_tokens=8, num_blocks=100)
    client = kv.Client(engine)
    engine.add(kv.request("a", prompt(40, 1), 3))
    engine.add(kv.request("b", prompt(40, 2), 3))
    client.step()
    engine.add(kv.request("s0", prompt(4, 50), 3))
    model.fault = lost
    client.step()
    model.fault = lambda plan: {}
    assert client.finish == {key("a"): FinishReason.ERROR, key("s0"): FinishReason.ERROR}
    client.run()
    assert client.tokens[key("b")] == kv.expected(prompt(40, 2), 3)


def test_a_result_that_does_not_match_is_a_failed_step(kv: ModuleType) -> None:
    """An executor that answers for other slots is not believed."""
    engine, model = kv.build()
    client = kv.Client(engine)
    engine.add(kv.request("a", prompt(4), 9, ignore_eos=True))
    execute = model.execute

    def mixed_up(plan: StepPlan) -> object:
        result = execute(plan)
        return type(result)(tuple(sampled._replace(slot=7) for sampled in result.sampled))

    model.execute = mixed_up
    client.step()
    assert client.finish[key("a")] is FinishReason.ERROR
    assert "does not match" in (client.last[key("a")].error or "")


def test_a_device_that_keeps_failing_ends_the_engine(kv: ModuleType) -> None:
    """After the last failure that is borne everybody hears of it, and nothing is accepted."""
    engine, model = kv.build(max_num_seqs=1)
    client = kv.Client(engine)
    model.fault = lost
    for number in range(MAX_FAILURES + 4):
        engine.add(kv.request(f"{number}", prompt(4), 9))
    for _ in range(MAX_FAILURES):
        assert engine.dead is None
        client.step()
    assert "device lost" in (engine.dead or "")
    assert set(client.finish.values()) == {FinishReason.ERROR}
    assert len(client.finish) == MAX_FAILURES + 4
    assert not engine.has_work and engine.load().blocks_used == 0
    with pytest.raises(EngineDead):
        engine.step()
    with pytest.raises(EngineDead):
        engine.add(kv.request("late", prompt(4), 9))


def test_a_step_that_succeeds_forgives_failures(kv: ModuleType) -> None:
    """Only failures in a row count."""
    engine, model = kv.build()
    client = kv.Client(engine)
    for number in range(2 * MAX_FAILURES):
        model.fault = lost if number % 2 else lambda plan: {}
        engine.add(kv.request(f"{number}", prompt(4), 1))
        client.step()
    assert engine.dead is None


def test_an_over_long_prompt_is_refused_with_both_numbers(kv: ModuleType) -> None:
    """The longest that fits leaves room for one token."""
    engine, _ = kv.build(max_model_len=20)
    engine.add(kv.request("fits", prompt(19), None))
    with pytest.raises(
        InvalidRequest, match=r"has 20 tokens.*at most 19.*limited to 20"
    ) as refused:
        engine.add(kv.request("a", prompt(20), None))
    assert refused.value.field == "token_ids"


def test_load_and_heartbeat_follow_the_clock(kv: ModuleType) -> None:
    """Figures for router and autoscaler: nothing before the first step, then measured ones."""
    clock = Clock()
    engine, model = kv.build(clock=clock, max_batched_tokens=16)
    load = engine.load()
    assert (load.blocks_total, load.step_seconds, load.prefill_tokens_per_second) == (63, 0, 0)

    def slow(plan: StepPlan) -> dict[int, str]:
        clock.now += 0.5
        return {}

    model.fault = slow
    engine.add(kv.request("a", prompt(24, 1), 3, ignore_eos=True))
    engine.add(kv.request("b", prompt(10, 2), 3, ignore_eos=True))
    assert engine.load().queued_prefill_tokens == 34
    engine.step()
    load = engine.load()
    assert load.queued_prefill_tokens == 34 - 16
    assert load.step_seconds == pytest.approx(0.5)
    assert load.prefill_tokens_per_second == pytest.approx(16 / 0.5)
    assert engine.heartbeat == clock.now
    before = engine.heartbeat
    model.fault = lost
    clock.now += 5
    engine.step()
    assert engine.heartbeat == before, "a failed step is no sign of life"


def test_ended_requests_leave_no_deadlines_behind(kv: ModuleType) -> None:
    """However many requests with a far deadline came and went, the engine keeps two or three."""
    engine, _ = kv.build(clock=Clock())
    client = kv.Client(engine)
    for i in range(50):
        engine.add(kv.request(str(i), prompt(4), 1, ignore_eos=True, deadline_seconds=1e6))
        client.run()
    assert len(engine._deadlines) <= 2


def test_deadlines_survive_compaction(kv: ModuleType) -> None:
    """The one request that goes on still ends at its deadline, after many others have ended."""
    clock = Clock()
    engine, _ = kv.build(clock=clock)
    engine.add(kv.request("long", prompt(4), 100, ignore_eos=True, deadline_seconds=5.0))
    for i in range(20):
        engine.add(kv.request(str(i), prompt(4), 1, ignore_eos=True, deadline_seconds=1e6))
        engine.step()
    clock.now += 5.0
    (delta,) = engine.step().deltas
    assert (delta.key.request_id, delta.code) == ("long", ErrorCode.DEADLINE_EXCEEDED)


def test_a_large_step_may_take_long(kv: ModuleType) -> None:
    """Ten times what the step's tokens take at the rate known: of the warm-up, then measured."""
    clock = Clock()
    engine, model = kv.build(clock=clock, warm_up_rate=2.0, max_batched_tokens=16)
    allowed: list[float] = []

    def slow(plan: StepPlan) -> dict[int, str]:
        allowed.append(engine.step_allowance)
        clock.now += 4.0
        return {}

    model.fault = slow
    engine.add(kv.request("a", prompt(20), 2, ignore_eos=True))
    while engine.has_work:
        engine.step()
    # 8 tokens a step at most: 8 / 2 a second; then 8 in 4 s, and 4 s that a step takes.
    assert allowed[:2] == [pytest.approx(10 * 4.0), pytest.approx(10 * (4.0 + 4.0))]
    assert len(allowed) == 4 and allowed[3] < allowed[1], "one token is allowed less"


def test_a_slow_step_is_no_hang_and_a_stuck_one_is(kv: ModuleType) -> None:
    """The loop counts as stalled beyond the seconds given and beyond what the step's size
    explains."""
    clock = Clock()
    engine, model = kv.build(clock=clock, warm_up_rate=0.1)
    loop = EngineLoop(engine, lambda report: None, lambda reason: None, clock)
    stalled: list[bool] = []

    def stuck(plan: StepPlan) -> dict[int, str]:
        started = clock.now
        for seconds in (29.0, 31.0, 399.0, 401.0):
            clock.now = started + seconds
            stalled.append(loop.stalled(30.0))
        return {}

    model.fault = stuck
    engine.add(kv.request("a", prompt(4), 1, ignore_eos=True))
    engine.step()
    assert stalled == [False, False, False, True]


def test_no_more_sequences_are_promised_than_a_step_has_tokens(kv: ModuleType) -> None:
    """Routers are told what the scheduler lets run, not what the settings wish for."""
    engine, _ = kv.build(max_num_seqs=8, max_batched_tokens=3)
    assert engine.max_num_seqs == 3
    for i in range(5):
        engine.add(kv.request(str(i), prompt(1, i), 4, ignore_eos=True))
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, engine.load().running)
    assert most == engine.max_num_seqs


def test_a_device_that_says_it_is_gone_ends_the_engine_at_once(kv: ModuleType) -> None:
    """No second try: everything in flight ends with a status that another replica may mend."""
    engine, model = kv.build(depth=2)
    client = kv.Client(engine)
    for number in range(12):
        engine.add(kv.request(f"{number}", prompt(9, number), 20))
    client.step()

    def fault(plan: StepPlan) -> dict[int, str]:
        raise DeviceLost("rank 2 on host b is lost")

    model.fault = fault
    client.step()
    assert engine.dead == "rank 2 on host b is lost"
    assert set(client.finish.values()) == {FinishReason.ERROR} and len(client.finish) == 12
    assert {delta.code for delta in client.last.values()} == {ErrorCode.INTERNAL}
    with pytest.raises(EngineDead, match="rank 2"):
        engine.step()


def test_an_answer_that_fits_no_plan_ends_the_engine_while_others_are_due(
    kv: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers that are on the way would be taken for those of later plans."""
    engine, model = kv.build(depth=2)
    client = kv.Client(engine)
    for number in range(12):
        engine.add(kv.request(f"{number}", prompt(9, number), 20))
    client.step()
    monkeypatch.setattr(model, "collect", lambda: StepResult(()))
    client.step()
    assert "does not fit its plan" in (engine.dead or "")
    assert set(client.finish.values()) == {FinishReason.ERROR} and len(client.finish) == 12


def test_a_device_that_is_gone_while_nobody_asks_is_known(kv: ModuleType) -> None:
    """Without a step: the engine is dead, and takes nothing on."""
    engine, model = kv.build()
    model.lost = "rank 1 is lost"
    assert engine.dead == "rank 1 is lost"
    with pytest.raises(EngineDead, match="rank 1 is lost"):
        engine.add(kv.request("a", prompt(3), 3))
