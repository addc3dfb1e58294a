"""Replicas whose weights are swapped: the router goes with the table, over the same connection."""

import asyncio

from bench.scripted_engine import Engine, Script, byte_model, expected
from shoal.api.v1 import engine_pb2
from shoal.router.dispatch import DispatchSettings
from shoal.router.replica import ReplicaSettings

PROMPT = list(b"a prompt of some forty bytes, more or less")


def engine(**script: float) -> Engine:
    return Engine(model=byte_model("old"), script=Script(**script))


async def swap(stage, index: int, revision: str) -> None:
    request = engine_pb2.SwapWeightsRequest(uri="other", revision=revision)
    async for progress in stage.peers[index].engine.SwapWeights(request, None):
        assert progress.phase == engine_pb2.SwapProgress.DONE


def test_requests_name_what_the_table_says_and_streams_go_on(stage, run):
    """Between swap and table the old revision is asked for and served; after the table the new
    one, over the connection that the old one's streams still end on."""

    async def body():
        engines = [engine(step_seconds=0.01)]
        async with stage(engines, settings=DispatchSettings(), weights={"old": 100}) as s:
            long = s.ask(max_tokens=60)
            await s.until(lambda: s.starts(0))
            await swap(s, 0, "new")
            between = s.ask(max_tokens=30)
            assert await s.answer(between) == expected(PROMPT, 30)
            s.route(weights={"new": 100})
            replica = s.dispatcher.replicas["e0"]
            await s.until(lambda: replica.revision == "new")
            after = s.ask()
            assert await s.answer(after) == expected(PROMPT, 8)
            assert await s.answer(long) == expected(PROMPT, 60)
            assert [start.revision for start in s.starts(0)] == ["old", "old", "new"]
            assert (long.revision, between.revision, after.revision) == ("old", "old", "new")
            assert s.dispatcher.stats.migrations == s.dispatcher.stats.retries == 0
            assert s.dispatcher.replicas["e0"] is replica

    run(body())


def test_no_request_waits_while_the_table_turns(stage, run):
    """Requests that come all the time while tables go there and back all end, with no retry."""

    async def body():
        engines = [engine(), engine()]
        async with stage(engines, settings=DispatchSettings(), weights={"old": 100}) as s:
            answers = []

            async def ask() -> None:
                for _ in range(150):
                    answers.append(await s.answer(s.ask(max_tokens=4)))
                    await asyncio.sleep(0.001)

            asking = asyncio.create_task(ask())
            for revision in ("new", "old", "new"):
                await asyncio.sleep(0.03)
                for index in range(2):
                    await swap(s, index, revision)
                    s.route(weights={"old": 0, "new": 0, revision: 100})
            await asking
            assert answers == [expected(PROMPT, 4)] * 150
            assert s.dispatcher.stats.retries == 0
            replicas = s.dispatcher.replicas.values()
            await s.until(lambda: all(replica.revision == "new" for replica in replicas))

    run(body())


def test_a_table_ahead_of_the_engine_gets_nothing_sent(stage, run):
    """Where the engine does not have the revision that the table names, the replica takes no
    requests until it has."""

    async def body():
        async with stage([engine(), Engine(model=byte_model("new"))]) as s:
            s.route(endpoints=[s.endpoint(0, revision="new"), s.endpoint(1)])
            await s.until(lambda: s.admitted == 1)
            assert await s.answer(s.ask()) == expected(PROMPT, 8)
            assert not s.starts(0)
            await swap(s, 0, "new")
            await s.until(lambda: s.admitted == 2)

    run(body())


def test_a_request_that_a_swap_moved_counts_for_where_it_ran(stage, run):
    """The first delta says that the engine computed it on another revision."""

    async def body():
        async with stage([engine()]) as s:
            generation = s.ask()
            moved = engine_pb2.Delta(id="1", index=0, token_ids=[65], revision="new")
            replica = s.dispatcher.replicas["e0"]
            s.dispatcher.batch(replica, engine_pb2.GenerateBatch(deltas=[moved]))
            assert generation.revision == "new"
            generation.cancel()

    run(body())


def test_an_engine_that_cannot_answer_at_once_keeps_its_streams(stage, run):
    """GetModel fails for a while after a swap: what flies there flies on, and the replica follows
    once it is told."""

    async def body():
        engines = [engine(step_seconds=0.01)]
        settings = DispatchSettings(ReplicaSettings(longest_pause=0.05))
        async with stage(engines, settings=settings) as s:
            long = s.ask(max_tokens=60)
            await s.until(lambda: s.starts(0))
            replica = s.dispatcher.replicas["e0"]
            s.route(endpoints=[s.endpoint(0, revision="new")])  # which the engine lacks as yet
            await asyncio.sleep(0.15)
            assert (replica.connected, replica.revision) == (True, "old")
            await swap(s, 0, "new")
            await s.until(lambda: replica.revision == "new")
            assert await s.answer(long) == expected(PROMPT, 60)
            assert s.dispatcher.stats.migrations == 0

    run(body())


def test_figures_go_to_the_revision_that_a_request_began_on(stage, run):
    """Tokens of an old request that come after the swap are the old revision's."""

    async def body():
        async with stage([engine(step_seconds=0.01)], settings=DispatchSettings()) as s:
            old = s.ask(max_tokens=40)
            await s.until(lambda: s.starts(0))
            await swap(s, 0, "new")
            s.route()
            await s.until(lambda: s.dispatcher.replicas["e0"].revision == "new")
            assert await s.answer(s.ask(max_tokens=5)) == expected(PROMPT, 5)
            await s.answer(old)
            stats = [s.dispatcher.stats.of(revision) for revision in ("old", "new")]
            assert [sum(of.ttft.counts()[1]) for of in stats] == [1, 1]
            assert [sum(of.itl.counts()[1]) for of in stats] == [39, 4]

    run(body())
