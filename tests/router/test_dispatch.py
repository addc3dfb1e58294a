"""Requests over real sockets: answers, failures, and continuation elsewhere."""

import asyncio
import sys
import time
from pathlib import Path

import pytest

from bench.scripted_engine import Engine, Script, byte_model, expected
from shoal.api.v1 import engine_pb2
from shoal.router.generation import GenerationError

ROOT = Path(__file__).resolve().parents[2]
PROMPT = list(b"a prompt of some forty bytes, more or less")
SLOW = 0.01  # seconds a step, where something has to happen in the middle of an answer


def slow(engines: int, **script: object) -> list[Engine]:
    return [
        Engine(model=byte_model("r"), script=Script(step_seconds=SLOW, **script))
        for _ in range(engines)
    ]


def test_an_answer_comes_through_whole(stage, run):
    """Greedy tokens arrive in order, with finish reason and the replica's name."""

    async def body():
        async with stage(1) as s:
            generation = s.ask(max_tokens=20)
            outputs = []
            while not generation.done:
                outputs += await generation.next()
            assert [t for o in outputs for t in o.token_ids] == expected(PROMPT, 20)
            assert outputs[-1].finish == engine_pb2.FINISH_REASON_LENGTH
            assert (generation.endpoint, generation.revision) == ("e0", "r")
            assert generation.prompt_tokens == len(PROMPT)

    run(body())


def test_starts_of_one_turn_travel_in_one_message(stage, run):
    """Fifty requests submitted at once cost one gRPC message."""

    async def body():
        async with stage(1) as s:
            generations = [s.ask([*PROMPT, i]) for i in range(50)]
            for i, generation in enumerate(generations):
                assert await s.answer(generation) == expected([*PROMPT, i], 8)
            assert s.peers[0].engine.messages == 1

    run(body())


def test_a_slow_reader_gets_merged_outputs(stage, run):
    """What arrives while nobody reads is one output a sample."""

    async def body():
        async with stage(1) as s:
            generation = s.ask(max_tokens=50, n=2)
            await s.until(lambda: not generation.unfinished)
            outputs = await generation.next()
            assert sorted((o.index, len(o.token_ids)) for o in outputs) == [(0, 50), (1, 50)]
            assert generation.done

    run(body())


def test_a_killed_replica_is_a_pause(stage, run):
    """Greedy and seeded samples continue exactly where their replica died."""

    async def body():
        async with stage(slow(2)) as s:
            greedy = [s.ask([*PROMPT, i], max_tokens=40) for i in range(16)]
            seeded = [s.ask([*PROMPT, i], max_tokens=40, temperature=1, seed=i) for i in range(16)]
            several = s.ask(max_tokens=40, temperature=1, seed=7, n=3)
            await s.until(lambda: all(g.samples[0].generated for g in [*greedy, *seeded, several]))
            await s.kill(0)
            for i, generation in enumerate(greedy):
                assert await s.answer(generation) == expected([*PROMPT, i], 40)
            for i, generation in enumerate(seeded):
                assert await s.answer(generation) == expected([*PROMPT, i], 40, seed=i)
            assert await s.read(several) == [
                expected(PROMPT, 40, seed=7, index=index) for index in range(3)
            ]
            assert s.dispatcher.stats.migrations >= 16
            resumed = [start for start in s.starts(1) if len(start.token_ids) > start.prompt_tokens]
            assert resumed
            for start in resumed:
                generated = len(start.token_ids) - start.prompt_tokens
                assert start.sampling.max_tokens == 40 - generated

    run(body())


def test_an_unseeded_request_keeps_its_seed(stage, run):
    """The router draws the seed, so the second replica draws the same tokens."""

    async def body():
        async with stage(slow(2)) as s:
            generation = s.ask(max_tokens=30, temperature=1)
            await s.until(lambda: len(generation.samples[0].generated) > 5)
            await s.kill(int(generation.endpoint[1:]))
            answer = await s.answer(generation)
            seeds = {start.sampling.seed for index in (0, 1) for start in s.starts(index)}
            assert len(seeds) == 1
            assert answer == expected(PROMPT, 30, seed=seeds.pop())

    run(body())


def test_min_tokens_shrink_with_what_was_generated(stage, run):
    """A continued request asks for what is left of min_tokens, and for no prompt logprobs."""

    async def body():
        async with stage(slow(2)) as s:
            generation = s.ask(max_tokens=30)
            generation.cancel()
            request = generation.request
            request.sampling.min_tokens = 20
            request.sampling.prompt_logprobs = 0
            generation = s.core.submit(request)
            await s.until(lambda: len(generation.samples[0].generated) > 5)
            old = int(generation.endpoint[1:])
            await s.kill(old)
            await s.answer(generation)
            start = s.starts(1 - old)[-1]
            generated = len(start.token_ids) - start.prompt_tokens
            assert generated > 5
            assert start.sampling.min_tokens == 20 - generated
            assert not start.sampling.HasField("prompt_logprobs")

    run(body())


def test_requests_wait_while_all_replicas_are_down(stage, run):
    """With nobody left, requests wait in the queue and go on when a replica comes back."""

    async def body():
        async with stage(slow(2)) as s:
            generations = [s.ask([*PROMPT, i], max_tokens=30) for i in range(8)]
            await s.until(lambda: all(g.samples[0].generated for g in generations))
            await asyncio.gather(s.kill(0), s.kill(1))
            await s.until(lambda: len(s.dispatcher.queue) == 8)
            late = s.ask([*PROMPT, 99])
            await s.revive(1)
            for i, generation in enumerate(generations):
                assert await s.answer(generation) == expected([*PROMPT, i], 30)
            assert await s.answer(late) == expected([*PROMPT, 99], 8)

    run(body())


def test_a_killed_process_is_noticed_at_once(stage, run):
    """SIGKILL of a real process moves its request on within a second."""

    async def body():
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.scripted_engine", "--port", "0"),
            *("--step-seconds", "0.01", "--revision", "r"),
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
        )
        try:
            address = (await process.stdout.readline()).decode().rsplit(" ", 1)[1].strip()
            async with stage(slow(1)) as s:
                victim = s.endpoint(0, name="victim", address=address)
                s.route(endpoints=[victim])
                await s.until(lambda: s.admitted == 1)
                generation = s.ask(max_tokens=30)
                await s.until(lambda: len(generation.samples[0].generated) > 3)
                s.route(endpoints=[victim, s.endpoint(0)])
                await s.until(lambda: s.admitted == 2)
                process.kill()
                began = time.monotonic()
                assert await s.answer(generation) == expected(PROMPT, 30)
                assert time.monotonic() - began < 1.0
                assert generation.endpoint == "e0"
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    run(body())


def test_the_migration_limit_ends_a_request_that_kills_replicas(stage, run):
    """After `migration_limit` broken streams the client gets a 502 that says so."""

    async def body():
        async with stage(slow(2, die_after=3), migration_limit=1) as s:
            generation = s.ask(max_tokens=30)
            with pytest.raises(GenerationError, match="migrationLimit is 1") as caught:
                await s.answer(generation)
            assert caught.value.status == 502
            assert len(s.starts(0)) + len(s.starts(1)) == 2

    run(body())


def test_an_internal_error_is_retried_elsewhere(stage, run):
    """A request that fails on one replica before its first token succeeds on the other."""

    async def body():
        async with stage(2) as s:
            s.peers[0].engine.script.refuse = engine_pb2.Error.INTERNAL
            generations = [s.ask([*PROMPT, i]) for i in range(6)]
            for i, generation in enumerate(generations):
                assert await s.answer(generation) == expected([*PROMPT, i], 8)
            assert s.starts(0)
            assert s.dispatcher.stats.retries == len(s.starts(0))

    run(body())


def test_a_sample_that_fails_midway_continues_elsewhere(stage, run):
    """INTERNAL after some tokens migrates as a broken stream does."""

    async def body():
        async with stage(2) as s:
            s.peers[0].engine.script.fail_after = 3
            generations = [s.ask([*PROMPT, i], max_tokens=12) for i in range(6)]
            for i, generation in enumerate(generations):
                assert await s.answer(generation) == expected([*PROMPT, i], 12)

    run(body())


def test_the_retry_limit_holds(stage, run):
    """`max_retries` failures before the first token end in a 502."""

    async def body():
        async with stage(1, max_retries=2) as s:
            s.peers[0].engine.script.refuse = engine_pb2.Error.INTERNAL
            with pytest.raises(GenerationError, match="maxRetries is 2") as caught:
                await s.answer(s.ask())
            assert caught.value.status == 502
            assert len(s.starts(0)) == 3

    run(body())


def test_an_invalid_request_is_never_retried(stage, run):
    """INVALID_ARGUMENT is the client's 400 with its field, after one attempt."""

    async def body():
        async with stage(2) as s:
            for peer in s.peers:
                peer.engine.script.refuse = engine_pb2.Error.INVALID_ARGUMENT
            with pytest.raises(GenerationError) as caught:
                await s.answer(s.ask(n=2))
            assert (caught.value.status, caught.value.field) == (400, "sampling.top_p")
            assert len(s.starts(0)) + len(s.starts(1)) == 1
            assert s.dispatcher.replicas["e0"].in_flight == 0

    run(body())


def test_one_failing_request_loses_no_other(stage, run):
    """Deltas that nobody asked for and errors of one request leave the others whole."""

    async def body():
        async with stage(slow(1, junk=True), max_retries=0) as s:
            good = [s.ask([*PROMPT, i], max_tokens=20) for i in range(8)]
            await asyncio.sleep(0.05)
            s.peers[0].engine.script.refuse = engine_pb2.Error.INTERNAL
            with pytest.raises(GenerationError):
                await s.answer(s.ask())
            for i, generation in enumerate(good):
                assert await s.answer(generation) == expected([*PROMPT, i], 20)

    run(body())


def test_a_draining_engine_costs_no_retry(stage, run):
    """A refusal for draining sends the request elsewhere even with no retries allowed."""

    async def body():
        async with stage(slow(2), max_retries=0) as s:
            old = s.ask(max_tokens=30)
            await s.until(lambda: old.first_at > 0)
            index = int(old.endpoint[1:])
            s.peers[index].engine.draining = True
            new = [s.ask([*PROMPT, i]) for i in range(6)]
            for i, generation in enumerate(new):
                assert await s.answer(generation) == expected([*PROMPT, i], 8)
                assert generation.endpoint == f"e{1 - index}"
            assert await s.answer(old) == expected(PROMPT, 30)
            assert old.endpoint == f"e{index}"

    run(body())


def test_a_replica_that_keeps_failing_is_ejected(stage, run):
    """After three failures in a row new requests avoid it, while the other has room."""

    async def body():
        async with stage(2) as s:
            s.peers[0].engine.script.refuse = engine_pb2.Error.INTERNAL
            for i in range(30):
                await s.answer(s.ask([*PROMPT, i]))
            assert len(s.starts(0)) == 3
            assert s.dispatcher.replicas["e0"].candidate().ejected

    run(body())


def test_a_hung_replica_is_given_up(stage, run):
    """Silence plus a failing health check moves its requests on."""

    async def body():
        async with stage(slow(2)) as s:
            generation = s.ask(max_tokens=30)
            await s.until(lambda: len(generation.samples[0].generated) > 3)
            index = int(generation.endpoint[1:])
            s.peers[index].engine.script.silent = True
            await s.peers[index].engine.say_alive(False)
            assert await s.answer(generation) == expected(PROMPT, 30)
            assert generation.endpoint == f"e{1 - index}"

    run(body())


def test_a_silent_but_healthy_replica_is_waited_for(stage, run):
    """A long step is no death: while health says it lives, nothing is migrated."""

    async def body():
        async with stage(slow(2)) as s:
            generation = s.ask(max_tokens=10)
            await s.until(lambda: len(generation.samples[0].generated) > 3)
            script = s.peers[int(generation.endpoint[1:])].engine.script
            script.silent, script.heartbeat_seconds = True, 0.05
            await asyncio.sleep(0.8)
            script.silent = False
            assert await s.answer(generation) == expected(PROMPT, 10)
            assert s.dispatcher.stats.migrations == 0

    run(body())


def test_cancel_frees_the_engine(stage, run):
    """A cancelled request, and a cancelled sample alone, end at the engine."""

    async def body():
        async with stage(slow(1)) as s:
            whole, part = s.ask(max_tokens=500), s.ask(max_tokens=20, n=2)
            await s.until(lambda: bool(whole.first_at and part.first_at))
            whole.cancel()
            part.cancel(0)
            await s.until(lambda: len(s.peers[0].engine.cancels) == 2)
            assert s.peers[0].engine.cancels == [("1", None), ("2", 0)]
            assert whole.done
            assert (await s.read(part))[1] == expected(PROMPT, 20)
            assert s.dispatcher.replicas["e0"].in_flight == 0
            assert s.dispatcher.stats.open == 0
            assert dict(s.dispatcher.stats.of("r").codes) == {499: 1, 200: 1}

    run(body())


def test_cancel_wakes_the_reader_and_leaves_the_queue(stage, run):
    """A queued request that is cancelled is gone, and its reader is told."""

    async def body():
        async with stage(0, wait=False) as s:
            generation = s.ask()
            reader = asyncio.create_task(generation.next())
            await asyncio.sleep(0)
            generation.cancel()
            generation.cancel()
            with pytest.raises(GenerationError) as caught:
                await reader
            assert caught.value.status == 499
            assert len(s.dispatcher.queue) == 0
            assert s.dispatcher.stats.open == 0

    run(body())


def test_more_samples_than_slots_hold_up_nobody(stage, run):
    """Forty samples where 32 fit do not wait until a busy replica is idle, nor do those behind."""

    async def body():
        engine = Engine(model=byte_model("r", max_num_seqs=32), script=Script(step_seconds=SLOW))
        async with stage([engine]) as s:
            long = [s.ask(max_tokens=2000) for _ in range(20)]
            await s.until(lambda: all(generation.first_at for generation in long))
            big = s.ask(max_tokens=4, n=40)
            behind = s.ask(max_tokens=4)
            async with asyncio.timeout(5):
                assert await s.read(big) == [expected(PROMPT, 4)] * 40
                assert await s.answer(behind) == expected(PROMPT, 4)
            assert all(generation.unfinished for generation in long)
            for generation in long:
                generation.cancel()
            assert s.dispatcher.replicas["e0"].in_flight == 0

    run(body())


def test_a_continuation_that_is_refused_costs_no_migration(stage, run):
    """A replica that drains before it continued anything has not failed."""

    async def body():
        async with stage(slow(3), migration_limit=1) as s:
            generation = s.ask(max_tokens=30)
            await s.until(lambda: len(generation.samples[0].generated) > 3)
            index = int(generation.endpoint[1:])
            others = [i for i in range(3) if i != index]
            for other in others:
                s.peers[other].engine.script.refuse = engine_pb2.Error.UNAVAILABLE
            await s.kill(index)
            await s.until(lambda: any(s.starts(other) for other in others))
            for other in others:
                s.peers[other].engine.script.refuse = None
            assert await s.answer(generation) == expected(PROMPT, 30)

    run(body())


def test_a_salt_reaches_the_engine_and_keeps_prefixes_apart(stage, run):
    """Requests follow the cached prefix of their own salt only."""

    async def body():
        async with stage(2, policy="PrefixAware") as s:
            index = s.dispatcher.selection.index
            prompt = list(range(97, 97 + 24)) * 8
            first = s.ask(prompt, salt="a")
            await s.answer(first)
            await s.until(lambda: len(index) > 0)
            home = int(first.endpoint[1:])
            assert {start.salt for start in s.starts(home)} == {"a"}
            for _ in range(6):
                again = s.ask(prompt, salt="a")
                await s.answer(again)
                assert again.endpoint == first.endpoint
                assert again.samples[0].cached_tokens > 0
            other = s.ask(prompt, salt="b")
            await s.answer(other)
            assert other.samples[0].cached_tokens == 0

    run(body())
