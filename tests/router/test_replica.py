"""Connections, admission and the choice between live replicas, over real sockets."""

import asyncio

import pytest

from bench.scripted_engine import Engine, Script, byte_model, expected
from shoal.api.v1 import engine_pb2
from shoal.router.generation import GenerationError
from shoal.router.report import service_load

PROMPT = list(b"a prompt of some forty bytes, more or less")


def engine(revision: str = "r", script: Script | None = None, **model: int) -> Engine:
    return Engine(model=byte_model(revision, **model), script=script or Script())


def test_a_replica_of_another_revision_is_not_admitted(stage, run):
    """An address that serves what the table does not say gets no requests."""

    async def body():
        async with stage([engine("old"), engine("new")]) as s:
            s.route(endpoints=[s.endpoint(0, revision="new"), s.endpoint(1)])
            await asyncio.sleep(0.2)
            assert s.admitted == 1
            assert await s.answer(s.ask()) == expected(PROMPT, 8)
            assert not s.starts(0)

    run(body())


def test_a_replica_that_comes_later_is_admitted(stage, run):
    """An endpoint that refuses connections is dialled again until it listens."""

    async def body():
        async with stage(1) as s:
            await s.kill(0)
            await s.until(lambda: s.admitted == 0)
            generation = s.ask()
            await asyncio.sleep(0.2)
            await s.revive(0)
            assert await s.answer(generation) == expected(PROMPT, 8)

    run(body())


def test_a_draining_endpoint_finishes_and_gets_nothing_new(stage, run):
    """`draining` in the table keeps what flies and turns new requests away."""

    async def body():
        async with stage([engine(script=Script(step_seconds=0.01)), engine()]) as s:
            s.route(endpoints=[s.endpoint(0)])
            old = s.ask(max_tokens=30)
            s.route(endpoints=[s.endpoint(0, draining=True), s.endpoint(1)])
            await s.until(lambda: s.admitted == 1)
            for i in range(5):
                new = s.ask([*PROMPT, i])
                assert await s.answer(new) == expected([*PROMPT, i], 8)
                assert new.endpoint == "e1"
            assert await s.answer(old) == expected(PROMPT, 30)
            assert old.endpoint == "e0"
            assert s.dispatcher.stats.migrations == 0

    run(body())


def test_a_removed_endpoint_finishes_and_is_closed(stage, run):
    """What flies on an endpoint that left the table ends there; then its stream is closed."""

    async def body():
        async with stage([engine(script=Script(step_seconds=0.01)), engine()]) as s:
            s.route(endpoints=[s.endpoint(0)])
            old = s.ask(max_tokens=30)
            replica = s.dispatcher.replicas["e0"]
            s.route(endpoints=[s.endpoint(1)])
            assert await s.answer(old) == expected(PROMPT, 30)
            assert old.endpoint == "e0"
            await s.until(lambda: not replica.connected)
            assert s.dispatcher.stats.migrations == 0

    run(body())


def test_a_removed_endpoint_that_dies_hands_over(stage, run):
    """A replica that was removed and is killed before its requests ended loses none of them."""

    async def body():
        async with stage([engine(script=Script(step_seconds=0.01)), engine()]) as s:
            s.route(endpoints=[s.endpoint(0)])
            old = s.ask(max_tokens=30)
            await s.until(lambda: bool(old.first_at))
            s.route(endpoints=[s.endpoint(1)])
            await s.kill(0)
            assert await s.answer(old) == expected(PROMPT, 30)
            assert old.endpoint == "e1"

    run(body())


def test_a_name_that_moves_to_another_address_is_dialled_there(stage, run):
    """A restarted pod keeps its name: requests go to its new address."""

    async def body():
        async with stage(2) as s:
            s.route(endpoints=[s.endpoint(0)])
            s.route(endpoints=[s.endpoint(1, name="e0")])
            await s.until(lambda: s.admitted == 1)
            assert await s.answer(s.ask()) == expected(PROMPT, 8)
            assert len(s.starts(1)) == 1

    run(body())


def test_weights_share_new_requests(stage, run):
    """A quarter of the weight is about a quarter of the requests; no weight is none."""

    async def body():
        async with stage(
            [engine("a", max_num_seqs=512), engine("b", max_num_seqs=512), engine("c")],
            weights={"a": 75, "b": 25},
        ) as s:
            await asyncio.gather(*(s.answer(s.ask([*PROMPT, i % 250])) for i in range(400)))
            assert len(s.starts(0)) + len(s.starts(1)) == 400
            assert 70 <= len(s.starts(1)) <= 130

    run(body())


def test_weights_of_dead_revisions_do_not_count(stage, run):
    """When the weighted revision cannot take requests, another serves them."""

    async def body():
        async with stage([engine("a"), engine("b")], weights={"a": 100}) as s:
            assert await s.answer(s.ask()) == expected(PROMPT, 8)
            assert not s.starts(1)
            await s.kill(0)
            await s.until(lambda: s.admitted == 1)
            assert await s.answer(s.ask()) == expected(PROMPT, 8)
            assert len(s.starts(1)) == 1

    run(body())


def test_a_pinned_revision_is_kept(stage, run):
    """A pin wins over weights; a pin to what does not exist is a 404."""

    async def body():
        async with stage([engine("a"), engine("b")], weights={"a": 100}) as s:
            await s.answer(s.ask(revision="b"))
            assert len(s.starts(1)) == 1
            with pytest.raises(GenerationError, match="'z'") as caught:
                s.ask(revision="z")
            assert caught.value.status == 404

    run(body())


def test_a_session_keeps_its_replica(stage, run):
    """Requests of one session meet one replica, other sessions others."""

    async def body():
        async with stage(4) as s:
            homes = {}
            for session in "abcdefghij":
                generations = [s.ask(session=session) for _ in range(5)]
                for generation in generations:
                    await s.answer(generation)
                homes[session] = {generation.endpoint for generation in generations}
            assert all(len(places) == 1 for places in homes.values())
            assert len(set.union(*homes.values())) > 1

    run(body())


def test_a_known_prefix_attracts(stage, run):
    """Cache events make requests with a shared prefix meet at the replica that holds it."""

    async def body():
        shared = list(range(97, 123)) * 20
        script = Script(prefill_tokens_per_second=1000.0)
        async with stage([engine(script=script), engine(script=script)], policy="PrefixAware") as s:
            first = s.ask(shared)
            await s.answer(first)
            home = first.endpoint
            index = s.dispatcher.selection.index
            await s.until(lambda: index.held(home) > 30)
            for i in range(10):
                generation = s.ask([*shared, i])
                outputs = []
                while not generation.done:
                    outputs += await generation.next()
                assert generation.endpoint == home
                assert outputs[0].cached_tokens == 512

            await s.kill(int(home[1:]))
            await s.until(lambda: s.admitted == 1)
            assert index.held(home) == 0

    run(body())


def test_replicas_get_only_what_they_can_start(stage, run):
    """Late binding: beyond its slots (and one spare) requests wait in the router, by priority."""

    async def body():
        async with stage([engine(script=Script(step_seconds=0.01), max_num_seqs=2)]) as s:
            low = [s.ask([*PROMPT, i], priority=5) for i in range(8)]
            urgent = s.ask([*PROMPT, 99], priority=-5)
            await asyncio.sleep(0.03)
            assert s.dispatcher.replicas["e0"].in_flight == 3
            assert len(s.dispatcher.queue) == 6
            for generation in [*low, urgent]:
                await s.answer(generation)
            order = [start.token_ids[-1] for start in s.starts(0)]
            assert order[3] == 99

    run(body())


def test_a_full_queue_is_a_429(stage, run):
    """Beyond max_queued a request is refused at once, with a time to come back."""

    async def body():
        async with stage(
            [engine(script=Script(step_seconds=0.05), max_num_seqs=1)], max_queued=2
        ) as s:
            running = [s.ask(max_tokens=100) for _ in range(4)]
            with pytest.raises(GenerationError, match="maxQueued") as caught:
                s.ask()
            assert (caught.value.status, caught.value.code) == (429, "queue_full")
            assert caught.value.retry_after >= 1
            for generation in running:
                generation.cancel()
            assert await s.answer(s.ask()) == expected(PROMPT, 8)

    run(body())


def test_waiting_in_vain_ends_with_the_reason(stage, run):
    """No replica is a 503, busy ones a 429, the client's own timeout a 408."""

    async def body():
        async with stage(0, wait=False, queue_timeout_seconds=0.2) as s:
            with pytest.raises(GenerationError) as caught:
                await s.answer(s.ask())
            assert (caught.value.status, caught.value.code) == (503, "no_replica")
            assert caught.value.retry_after
            with pytest.raises(GenerationError) as caught:
                await s.answer(s.ask(timeout_seconds=0.05))
            assert caught.value.status == 408
        slow = engine(script=Script(step_seconds=0.05), max_num_seqs=1)
        async with stage([slow], queue_timeout_seconds=0.2) as s:
            running = [s.ask(max_tokens=100) for _ in range(2)]
            with pytest.raises(GenerationError) as caught:
                await s.answer(s.ask())
            assert (caught.value.status, caught.value.code) == (429, "queue_timeout")
            assert not any(generation.settled for generation in running)

    run(body())


def test_text_waits_for_a_first_replica(stage, run):
    """At zero replicas text is waited for, counted as queued, and bounded in time."""

    async def body():
        async with stage(1, wait=False) as s:
            s.route(endpoints=[])
            with pytest.raises(GenerationError) as caught:
                await s.core.text("chat", 0.05)
            assert caught.value.status == 503
            waiting = asyncio.create_task(s.core.text("chat"))
            await asyncio.sleep(0.01)
            report = service_load(s.core.services["chat"], s.core.clock())
            assert (report.queued, report.idle_seconds) == (1, 0)
            s.route()
            text = await waiting
            assert text.encode("ab") == [97, 98]
            assert await s.core.text("chat") is text

    run(body())


def test_text_is_kept_at_zero_replicas(stage, run):
    """Once known, a model's text serves requests that wake the service."""

    async def body():
        async with stage(1) as s:
            text = await s.core.text("chat")
            s.route(endpoints=[])
            assert await s.core.text("chat", 0) is text

    run(body())


def test_a_request_never_meets_another_tokenizer(stage, run):
    """While a rollout changes the model, token ids go only where they mean the same."""

    async def body():
        other = byte_model("new")
        other.tokenizer.chat_template = "{{ messages }}"
        async with stage([engine("old"), Engine(model=other)], weights={"old": 1, "new": 1}) as s:
            texts = set()
            for _ in range(40):
                text = await s.core.text("chat")
                texts.add(text)
                generation = s.ask(text=text)
                await s.answer(generation)
                assert generation.revision == text.model.revision
            assert len(texts) == 2

    run(body())


def test_a_deleted_service_ends_its_requests(stage, run):
    """Whoever is queued, or waits for text, is told with a 503; then the model is unknown."""

    async def body():
        async with stage(0, wait=False) as s:
            generation = s.ask()
            waiting = asyncio.create_task(s.core.text("chat"))
            await asyncio.sleep(0)
            s.core.apply({})
            for wait in (s.answer(generation), waiting):
                with pytest.raises(GenerationError, match="deleted") as caught:
                    await wait
                assert caught.value.status == 503
            assert s.core.find("chat") is None
            assert s.core.ready

    run(body())


def test_the_report_says_what_happened(stage, run):
    """GetLoad's figures: arrivals, ends, errors, latencies by revision, admission."""

    async def body():
        async with stage([engine("r", script=Script(step_seconds=0.01))], max_retries=0) as s:
            for i in range(5):
                await s.answer(s.ask([*PROMPT, i]))
            s.peers[0].engine.script.refuse = engine_pb2.Error.INTERNAL
            with pytest.raises(GenerationError):
                await s.answer(s.ask())
            report = service_load(s.core.services["chat"], s.core.clock())
            assert (report.arrivals, report.queued) == (6, 0)
            (revision,) = report.revisions
            assert (revision.requests, revision.errors, revision.running) == (6, 1, 0)
            assert 0 < revision.ttft_p50_seconds <= revision.ttft_p95_seconds < 1
            assert 0.008 < revision.itl_p50_seconds < 0.1
            (endpoint,) = report.endpoints
            assert endpoint.admitted
            assert endpoint.load.blocks_total == 4096

    run(body())
