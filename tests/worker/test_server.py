"""The engine's gRPC server over a real channel, around a real engine and a device that counts."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from shoal.api.blocks import BlockHash, block_hashes, root_hash, wire_id
from shoal.api.v1 import engine_pb2, engine_pb2_grpc
from shoal.worker.cache_watch import CacheWatch, Watcher
from shoal.worker.config import EngineConfig
from shoal.worker.engine import Engine, EngineLoad, StepOutput
from shoal.worker.executor import ModelInfo, SerialExecutor
from shoal.worker.loop import Command, Report, Snapshot
from shoal.worker.server import EngineServer, ListenError, ServerSettings
from shoal.worker.step import Sampled, StepPlan, StepResult

BLOCK = 4
REVISION = "abc12"
SERVING = health_pb2.HealthCheckResponse.SERVING
INFO = ModelInfo("Counting", 1000, 256, (999,), None, "float32")
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass
class CountingExecutor(SerialExecutor):
    """A device whose next token is always the position it stands at."""

    num_blocks: int = 65
    block_size: int = BLOCK
    info: ModelInfo = INFO
    gate: threading.Event = field(default_factory=threading.Event)
    fail: bool = False
    step_seconds: float = 0.001

    def __post_init__(self) -> None:
        self.gate.set()

    def execute(self, plan: StepPlan) -> StepResult:
        self.gate.wait()
        time.sleep(self.step_seconds)
        if self.fail:
            raise RuntimeError("the device is on fire")
        return StepResult(
            tuple(Sampled(row.slot, row.start + row.count) for row in plan.rows if row.sample)
        )

    def close(self) -> None:
        self.gate.set()


@dataclass
class Client:
    """What a test holds: the server, its channel, and the parts behind them."""

    server: EngineServer
    engine: Engine
    executor: CountingExecutor
    channel: grpc.aio.Channel

    @property
    def stub(self) -> Any:
        return engine_pb2_grpc.EngineStub(self.channel)

    async def health(self, service: str = "") -> int:
        stub: Any = health_pb2_grpc.HealthStub(self.channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


@asynccontextmanager
async def served(
    executor: CountingExecutor | None = None, **settings: Any
) -> AsyncIterator[Client]:
    executor = executor or CountingExecutor()
    engine = Engine(executor, EngineConfig(max_num_seqs=8, block_size=BLOCK), revision=REVISION)
    quick = {"stall_seconds": 5.0, "beat_seconds": 0.1, "health_seconds": 0.02}
    server = EngineServer(ServerSettings(**(quick | settings)))
    await server.start()
    server.serve(engine, engine_pb2.Model(name="counting", revision=REVISION))
    channel = grpc.aio.insecure_channel(server.address)
    try:
        yield Client(server, engine, executor, channel)
    finally:
        executor.gate.set()
        await channel.close()
        await server.stop(0.0)


def start(request_id: str, length: int = 5, max_tokens: int = 3, **fields: Any) -> Any:
    sampling = fields.pop("sampling", None) or engine_pb2.Sampling(
        temperature=0.0, max_tokens=max_tokens
    )
    token_ids = fields.pop("token_ids", range(100, 100 + length))
    return engine_pb2.Start(id=request_id, token_ids=token_ids, sampling=sampling, **fields)


def begin(*starts: Any) -> Any:
    return engine_pb2.GenerateRequest(start=starts)


def stop(request_id: str, **fields: Any) -> Any:
    return engine_pb2.GenerateRequest(cancel=[engine_pb2.Cancel(id=request_id, **fields)])


class Reader:
    """Collects what a stream says, by request and sample."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.last: dict[tuple[str, int], Any] = {}
        self.loads: list[Any] = []

    async def batch(self) -> Any:
        batch = await asyncio.wait_for(self.call.read(), 10)
        if batch is grpc.aio.EOF:
            return None
        self.loads.append(batch.load)
        for delta in batch.deltas:
            key = (delta.id, delta.index)
            self.tokens.setdefault(key, []).extend(delta.token_ids)
            if delta.finish_reason:
                assert key not in self.last, "a sequence ends once"
                self.last[key] = delta
        return batch

    async def until(self, done: Callable[["Reader"], bool]) -> "Reader":
        while not done(self):
            assert await self.batch() is not None, "the stream ended early"
        return self

    async def finished(self, *keys: tuple[str, int]) -> "Reader":
        return await self.until(lambda reader: all(key in reader.last for key in keys))


async def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


def test_generates_tokens_and_says_why_it_stopped() -> None:
    """Deltas carry the tokens, the last one the reason, every batch the load."""

    async def scenario() -> None:
        async with served() as client:
            call = client.stub.Generate()
            await call.write(begin(start("a"), start("b", length=7, max_tokens=2)))
            reader = await Reader(call).finished(("a", 0), ("b", 0))
            assert reader.tokens == {("a", 0): [5, 6, 7], ("b", 0): [7, 8]}
            assert reader.last["a", 0].finish_reason == engine_pb2.FINISH_REASON_LENGTH
            assert reader.loads[-1].blocks_total == 64

    asyncio.run(scenario())


def test_one_message_a_step_carries_all_requests() -> None:
    """Eight requests of three tokens take about three messages, not twenty-four."""

    async def scenario() -> None:
        async with served(CountingExecutor(step_seconds=0.02), beat_seconds=60.0) as client:
            call = client.stub.Generate()
            await call.write(begin(*(start(str(i)) for i in range(8))))
            reader = await Reader(call).finished(*((str(i), 0) for i in range(8)))
            assert len(reader.loads) <= 5

    asyncio.run(scenario())


def test_streams_may_use_the_same_ids() -> None:
    """An id belongs to its stream: two clients with id `a` get their own tokens."""

    async def scenario() -> None:
        async with served() as client:
            calls = [client.stub.Generate(), client.stub.Generate()]
            for length, call in zip((5, 9), calls, strict=True):
                await call.write(begin(start("a", length=length)))
            first, second = [await Reader(call).finished(("a", 0)) for call in calls]
            assert first.tokens["a", 0] == [5, 6, 7]
            assert second.tokens["a", 0] == [9, 10, 11]

    asyncio.run(scenario())


def test_samples_of_one_prompt_end_one_by_one() -> None:
    """`n` sequences count from `sample_index`, and each has an end of its own."""

    async def scenario() -> None:
        async with served() as client:
            call = client.stub.Generate()
            await call.write(begin(start("a", n=3, sample_index=2)))
            reader = await Reader(call).finished(*(("a", index) for index in (2, 3, 4)))
            assert set(reader.tokens) == {("a", 2), ("a", 3), ("a", 4)}

    asyncio.run(scenario())


def test_bad_requests_end_alone() -> None:
    """Each bad request gets an error that names its field; a good one beside them is served."""
    sampling = engine_pb2.Sampling
    bad = {
        "empty": (start("empty", token_ids=[]), "token_ids"),
        "long": (start("long", length=300), "token_ids"),
        "vocabulary": (start("vocabulary", token_ids=[5000]), "token_ids"),
        "prompt": (start("prompt", prompt_tokens=9), "prompt_tokens"),
        "nan": (start("nan", sampling=sampling(temperature=float("nan"))), "sampling.temperature"),
        "top_p": (start("top_p", sampling=sampling(top_p=0.0)), "sampling.top_p"),
        "n": (start("n", n=4_000_000_000), "n"),
        "index": (start("index", sample_index=4_294_967_295), "sample_index"),
        "late": (start("late", deadline_seconds=-1.0), "deadline_seconds"),
    }

    async def scenario() -> None:
        async with served() as client:
            call = client.stub.Generate()
            await call.write(begin(*(request for request, _ in bad.values()), start("good")))
            reader = Reader(call)
            ended: dict[str, Any] = {}
            while not ended.keys() >= {*bad, "good"}:
                await reader.batch()
                ended = {request_id: delta for (request_id, _), delta in reader.last.items()}
            assert reader.tokens["good", 0] == [5, 6, 7]
            for request_id, (_, name) in bad.items():
                error = ended[request_id].error
                assert error.code == engine_pb2.Error.INVALID_ARGUMENT, request_id
                assert error.field.split("[")[0] == name
                assert name.split(".")[-1] in error.message or "prompt" in error.message
            assert client.server.healthy

    asyncio.run(scenario())


def test_an_id_in_flight_cannot_be_used_again() -> None:
    """The second request with the id is refused; another id goes through."""

    async def scenario() -> None:
        async with served(CountingExecutor(step_seconds=0.01)) as client:
            call = client.stub.Generate()
            await call.write(begin(start("a", max_tokens=50), start("a"), start("b")))
            reader = await Reader(call).finished(("a", 0), ("b", 0))
            assert reader.last["a", 0].error.field == "id"
            assert reader.tokens["b", 0] == [5, 6, 7]

    asyncio.run(scenario())


def test_another_revision_is_refused_as_unavailable() -> None:
    """A router that means another revision is told to go elsewhere."""

    async def scenario() -> None:
        async with served() as client:
            call = client.stub.Generate()
            await call.write(begin(start("a", revision="other"), start("b", revision=REVISION)))
            reader = await Reader(call).finished(("a", 0), ("b", 0))
            assert reader.last["a", 0].error.code == engine_pb2.Error.UNAVAILABLE
            assert reader.tokens["b", 0]

    asyncio.run(scenario())


def test_cancel_ends_a_request_and_frees_its_blocks() -> None:
    """A cancelled request reports CANCELLED, and nothing of it stays in the pool."""

    async def scenario() -> None:
        async with served() as client:
            call = client.stub.Generate()
            reader = Reader(call)
            await call.write(begin(start("a", max_tokens=240), start("b", max_tokens=240, n=2)))
            await reader.until(lambda r: len(r.tokens.get(("a", 0), ())) > 2)
            await call.write(stop("a"))
            await call.write(stop("b", index=1))
            await call.write(stop("unknown"))
            await reader.finished(("a", 0), ("b", 1))
            for key in (("a", 0), ("b", 1)):
                assert reader.last[key].finish_reason == engine_pb2.FINISH_REASON_CANCELLED
            await reader.finished(("b", 0))
            assert reader.last["b", 0].finish_reason == engine_pb2.FINISH_REASON_LENGTH
            await eventually(lambda: client.engine.load().blocks_used == 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_client_that_hangs_up_frees_everything(how: str) -> None:
    """Whether the call is cancelled or the whole connection goes, no request is left behind."""

    async def scenario() -> None:
        async with served(CountingExecutor(step_seconds=0.005)) as client:
            channel = grpc.aio.insecure_channel(
                client.server.address, options=[("grpc.use_local_subchannel_pool", 1)]
            )
            stub: Any = engine_pb2_grpc.EngineStub(channel)
            call = stub.Generate()
            await call.write(begin(*(start(str(i), max_tokens=200) for i in range(12))))
            await Reader(call).until(lambda r: len(r.tokens) > 2)
            assert client.engine.load().blocks_used > 0
            if how == "cancel":
                call.cancel()
            else:
                await channel.close()
            await eventually(lambda: client.engine.load().blocks_used == 0, 2.0)
            load = client.engine.load()
            assert (load.running, load.waiting) == (0, 0)
            await channel.close()

    asyncio.run(scenario())


def test_a_half_closed_stream_gets_the_rest_of_its_answers() -> None:
    """After the last request the client may close its side; the stream ends when all is said."""

    async def scenario() -> None:
        async with served() as client:
            call = client.stub.Generate()
            await call.write(begin(start("a", max_tokens=20)))
            await call.done_writing()
            reader = Reader(call)
            while await reader.batch() is not None:
                pass
            assert reader.tokens["a", 0] == list(range(5, 25))
            assert await call.code() == grpc.StatusCode.OK

    asyncio.run(scenario())


def test_an_idle_stream_hears_of_the_engine() -> None:
    """Load arrives about every beat although nothing happens."""

    async def scenario() -> None:
        async with served(beat_seconds=0.05) as client:
            call = client.stub.Generate()
            await call.write(engine_pb2.GenerateRequest())
            reader = Reader(call)
            for _ in range(4):
                assert len((await reader.batch()).deltas) == 0
            assert all(load.blocks_total == 64 for load in reader.loads)

    asyncio.run(scenario())


def test_a_client_too_slow_is_ended_rather_than_remembered() -> None:
    """Deltas beyond the limit end the stream and cancel its requests; others go on."""

    async def scenario() -> None:
        async with served(max_pending_deltas=4) as client:
            slow, quick = client.stub.Generate(), client.stub.Generate()
            # Six deltas a step in one message are more than may wait.
            await slow.write(begin(*(start(str(i), max_tokens=200) for i in range(6))))
            await quick.write(begin(start("a")))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await slow.read() is not grpc.aio.EOF:
                    pass
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            await Reader(quick).finished(("a", 0))
            await eventually(lambda: client.engine.load().blocks_used == 0)

    asyncio.run(scenario())


def test_deadlines_end_requests() -> None:
    """A request past its deadline ends with DEADLINE_EXCEEDED."""

    async def scenario() -> None:
        async with served(CountingExecutor(step_seconds=0.02)) as client:
            call = client.stub.Generate()
            await call.write(begin(start("a", max_tokens=200, deadline_seconds=0.1)))
            reader = await Reader(call).finished(("a", 0))
            assert reader.last["a", 0].error.code == engine_pb2.Error.DEADLINE_EXCEEDED

    asyncio.run(scenario())


def test_drain_refuses_the_new_and_finishes_the_old() -> None:
    """While draining, health is NOT_SERVING, requests in flight go on, new ones go elsewhere."""

    async def scenario() -> None:
        async with served(CountingExecutor(step_seconds=0.01)) as client:
            call = client.stub.Generate()
            reader = Reader(call)
            await call.write(begin(start("old", max_tokens=40)))
            await reader.until(lambda r: bool(r.tokens))
            at_once = await client.stub.Drain(engine_pb2.DrainRequest(deadline_seconds=0.0))
            assert at_once.unfinished == 1
            assert await client.health() == NOT_SERVING
            assert await client.health("live") == SERVING
            await call.write(begin(start("new")))
            drained = await client.stub.Drain(engine_pb2.DrainRequest(deadline_seconds=10.0))
            assert drained.unfinished == 0
            await reader.finished(("old", 0), ("new", 0))
            assert len(reader.tokens["old", 0]) == 40
            assert reader.last["new", 0].error.code == engine_pb2.Error.UNAVAILABLE
            assert reader.loads[-1].draining

    asyncio.run(scenario())


def test_a_second_drain_counts_from_the_first() -> None:
    """A preStop hook and then SIGTERM have one deadline between them, not one each."""

    async def scenario() -> None:
        async with served(CountingExecutor(step_seconds=0.01)) as client:
            call = client.stub.Generate()
            reader = Reader(call)
            await call.write(begin(start("long", max_tokens=1000)))
            await reader.until(lambda r: bool(r.tokens))
            hook = await client.stub.Drain(engine_pb2.DrainRequest(deadline_seconds=0.5))
            assert hook.unfinished == 1
            before = time.monotonic()
            again = await client.stub.Drain(engine_pb2.DrainRequest(deadline_seconds=0.5))
            assert again.unfinished == 1
            assert time.monotonic() - before < 0.3

    asyncio.run(scenario())


@pytest.mark.parametrize("deadline", [-1.0, float("nan"), float("inf")])
def test_drain_wants_a_sane_deadline(deadline: float) -> None:
    """A deadline nobody can wait for is refused, and nothing starts to drain."""

    async def scenario() -> None:
        async with served() as client:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await client.stub.Drain(engine_pb2.DrainRequest(deadline_seconds=deadline))
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert await client.health() == SERVING

    asyncio.run(scenario())


def wire_ids(tokens: list[int]) -> set[int]:
    return {wire_id(block) for block in block_hashes(root_hash(REVISION), tokens, BLOCK)}


def test_watching_the_cache_gives_a_snapshot_then_changes() -> None:
    """What was cached before comes with `reset`, what is cached later as it happens."""

    async def scenario() -> None:
        async with served() as client:
            call = client.stub.Generate()
            reader = Reader(call)
            await call.write(begin(start("a", token_ids=range(9), max_tokens=1)))
            await reader.finished(("a", 0))
            watch = client.stub.WatchCache(engine_pb2.WatchCacheRequest())
            snapshot = await asyncio.wait_for(watch.read(), 5)
            assert snapshot.reset
            assert set(snapshot.stored) == wire_ids(list(range(9)))
            await call.write(begin(start("b", token_ids=range(500, 509), max_tokens=1)))
            change = await asyncio.wait_for(watch.read(), 5)
            assert not change.reset
            assert set(change.stored) == wire_ids(list(range(500, 509)))

    asyncio.run(scenario())


def test_evicted_blocks_are_reported() -> None:
    """A watcher that applies every change knows exactly what the engine would find."""

    async def scenario() -> None:
        async with served(CountingExecutor(num_blocks=13)) as client:
            watch = client.stub.WatchCache(engine_pb2.WatchCacheRequest())
            known: set[int] = set()

            async def follow() -> None:
                async for events in watch:
                    if events.reset:
                        known.clear()
                    known.difference_update(events.removed)
                    known.update(events.stored)

            following = asyncio.create_task(follow())
            call = client.stub.Generate()
            reader = Reader(call)
            for i in range(20):
                prompt = range(20 * i, 20 * i + 13)
                await call.write(begin(start(str(i), token_ids=prompt, max_tokens=2)))
                await reader.finished((str(i), 0))
            truth = {wire_id(block) for block in client.engine.cached_blocks()}
            assert truth
            await eventually(lambda: known == truth)
            watch.cancel()
            await asyncio.gather(following, return_exceptions=True)

    asyncio.run(scenario())


def test_few_changes_of_the_cache_wait_for_more_and_many_do_not() -> None:
    """News within a pause come as one message; what would be a long one goes out at once."""

    async def scenario() -> None:
        watcher = Watcher(0, lambda: None, max_pending=10_000)
        watcher.reset([1])
        assert [list(each.stored) for each in await watcher.next_events()] == [[1]]
        waiting = asyncio.create_task(watcher.next_events())
        for block in (2, 3):
            watcher.apply([block], [])
            await asyncio.sleep(0)
        assert not waiting.done()
        watcher.apply(list(range(4, 1000)), [2])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert waiting.done()
        (message,) = waiting.result()
        assert list(message.stored) == list(range(3, 1000))
        assert list(message.removed) == [2]

    asyncio.run(scenario())


def test_a_slow_watcher_starts_over_from_a_snapshot() -> None:
    """Changes beyond the limit are dropped; a snapshot with `reset` makes up for them."""
    commands: list[Command] = []
    watch = CacheWatch(commands.append, max_pending=3)
    load = EngineLoad(0, 0, 0, 0, 0, 0.0, 0.0)
    stats: Any = None
    blocks = tuple(BlockHash(bytes([i] * 16)) for i in range(10))

    def report(stored: Any = (), removed: Any = (), snapshots: Any = ()) -> Report:
        return Report((), snapshots, StepOutput((), stored, removed), load, stats, 0.0)

    async def scenario() -> None:
        watcher = watch.open()
        assert commands == [Snapshot(watcher.number)]
        watch.take(report(stored=blocks[:1]))  # the snapshot on its way holds it
        watch.take(report(snapshots=((watcher.number, blocks[:2]),)))
        watch.take(report(stored=blocks[2:4]))
        watch.take(report(removed=blocks[3:4]))
        first, changes = await watcher.next_events()
        assert first.reset and list(first.stored) == [wire_id(block) for block in blocks[:2]]
        assert list(changes.stored) == [wire_id(blocks[2])]
        assert list(changes.removed) == [wire_id(blocks[3])]
        watch.take(report(stored=blocks[4:8]))  # more than three: too slow
        assert commands[1:] == [Snapshot(watcher.number)]
        watch.take(report(stored=blocks[8:9]))
        watch.take(report(snapshots=((watcher.number, blocks),)))
        (again,) = await watcher.next_events()
        assert again.reset and len(again.stored) == 10
        watch.close(watcher)

    asyncio.run(scenario())


def test_health_turns_when_a_step_hangs_and_turns_back() -> None:
    """A stuck device makes the worker unready and not alive, and no beat claims otherwise."""

    async def scenario() -> None:
        async with served(stall_seconds=0.3, beat_seconds=0.02) as client:
            assert await client.health() == SERVING
            assert await client.health("shoal.v1.Engine") == SERVING
            call = client.stub.Generate()
            client.executor.gate.clear()
            await call.write(begin(start("a")))
            await eventually(lambda: not client.server.healthy)
            await asyncio.sleep(0.1)
            assert await client.health() == NOT_SERVING
            assert await client.health("live") == NOT_SERVING
            client.executor.gate.set()
            await Reader(call).finished(("a", 0))
            await eventually(lambda: client.server.healthy)
            await asyncio.sleep(0.1)
            assert await client.health() == SERVING

    asyncio.run(scenario())


def test_a_failed_step_ends_its_requests_alone() -> None:
    """After one failed step the engine serves on."""

    async def scenario() -> None:
        async with served() as client:
            client.executor.fail = True
            call = client.stub.Generate()
            reader = Reader(call)
            await call.write(begin(start("a")))
            await reader.finished(("a", 0))
            assert reader.last["a", 0].error.code == engine_pb2.Error.INTERNAL
            assert "on fire" in reader.last["a", 0].error.message
            client.executor.fail = False
            await call.write(begin(start("b")))
            await reader.finished(("b", 0))
            assert reader.tokens["b", 0] == [5, 6, 7]

    asyncio.run(scenario())


def test_a_dead_engine_is_loud() -> None:
    """When the device keeps failing, requests end, health says so and `failed` is set."""

    async def scenario() -> None:
        async with served() as client:
            client.executor.fail = True
            call = client.stub.Generate()
            reader = Reader(call)
            for i in range(3):
                await call.write(begin(start(str(i))))
                await reader.finished((str(i), 0))
            await asyncio.wait_for(client.server.failed.wait(), 5)
            assert "on fire" in client.server.failure
            await call.write(begin(start("after")))
            await reader.finished(("after", 0))
            assert reader.last["after", 0].error.code == engine_pb2.Error.UNAVAILABLE
            await asyncio.sleep(0.1)
            assert await client.health() == NOT_SERVING
            assert await client.health("live") == NOT_SERVING

    asyncio.run(scenario())


def test_before_the_model_is_loaded() -> None:
    """The port answers early: alive but not ready, and calls are told to come back."""

    async def scenario() -> None:
        server = EngineServer(ServerSettings())
        await server.start()
        async with grpc.aio.insecure_channel(server.address) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            ready = await health.Check(health_pb2.HealthCheckRequest())
            live = await health.Check(health_pb2.HealthCheckRequest(service="live"))
            assert (ready.status, live.status) == (NOT_SERVING, SERVING)
            stub: Any = engine_pb2_grpc.EngineStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetModel(engine_pb2.GetModelRequest())
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            assert await server.drain(1.0) == 0
        await server.stop(0.0)

    asyncio.run(scenario())


def test_a_taken_port_is_refused_by_name() -> None:
    """A second server on the port fails at once and says what to change."""

    async def scenario() -> None:
        async with served() as client:
            port = int(client.server.address.rpartition(":")[2])
            with pytest.raises(ListenError, match=rf":{port}.*--port"):
                await EngineServer(ServerSettings(port=port)).start()

    asyncio.run(scenario())


def test_reflection_lists_the_services() -> None:
    """A generic client can discover Engine and Health, and fetch their descriptors."""

    async def scenario() -> None:
        async with served() as client:
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(client.channel)
            request = reflection_pb2.ServerReflectionRequest
            call = stub.ServerReflectionInfo()
            await call.write(request(list_services=""))
            answer = await call.read()
            listed = {service.name for service in answer.list_services_response.service}
            assert {"shoal.v1.Engine", "grpc.health.v1.Health"} <= listed
            await call.write(request(file_containing_symbol="shoal.v1.Engine"))
            answer = await call.read()
            assert answer.file_descriptor_response.file_descriptor_proto
            await call.done_writing()

    asyncio.run(scenario())


def test_a_prompt_of_megabytes_fits_one_message() -> None:
    """A message far over gRPC's default limit of 4 MB is answered, not torn down."""

    async def scenario() -> None:
        async with served() as client:
            call = client.stub.Generate()
            await call.write(begin(start("a", token_ids=[2**32 - 1] * 2_000_000)))
            reader = await Reader(call).finished(("a", 0))
            assert reader.last["a", 0].error.code == engine_pb2.Error.INVALID_ARGUMENT

    asyncio.run(scenario())
