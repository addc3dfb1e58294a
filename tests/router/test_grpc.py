"""The gRPC front, spoken to by a plain gRPC client."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from bench.scripted_engine import EOS, Engine, Script, byte_model, expected
from shoal.api.v1 import engine_pb2, router_pb2, router_pb2_grpc
from shoal.router.grpc_front import start_grpc


@asynccontextmanager
async def front(stage, **script):
    engine = Engine(model=byte_model("r"), script=Script(**script))
    async with stage([engine]) as s:
        server, port = await start_grpc(s.core, "127.0.0.1:0")
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield s, channel
        finally:
            await server.stop(0)


def complete(text: str, **fields: object) -> router_pb2.CompleteRequest:
    request = router_pb2.CompleteRequest(model="chat", text=text, **fields)
    request.sampling.temperature = 0
    return request


async def chunks(call) -> list[router_pb2.TextChunk]:
    return [chunk async for chunk in call]


def test_complete_streams_text(stage, run):
    """Text, token ids, finish reason and usage arrive in chunks of one id."""

    async def body():
        async with front(stage, step_seconds=0.005) as (_, channel):
            request = complete("hello there")
            request.sampling.max_tokens = 12
            received = await chunks(router_pb2_grpc.RouterStub(channel).Complete(request))
            tokens = expected(list(b"hello there"), 12)
            assert [t for c in received for t in c.token_ids] == tokens
            assert "".join(c.text for c in received) == bytes(tokens).decode()
            assert len({c.id for c in received}) == 1
            assert len(received) > 1
            last = received[-1]
            assert last.finish_reason == engine_pb2.FINISH_REASON_LENGTH
            assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (11, 12)

    run(body())


def test_complete_takes_token_ids(stage, run):
    """Token ids instead of text; the end-of-sequence token has no text."""

    async def body():
        async with front(stage, tokens=5) as (_, channel):
            request = router_pb2.CompleteRequest(model="chat")
            request.token_ids.ids.extend([1, 2, 3])
            request.sampling.temperature = 0
            received = await chunks(router_pb2_grpc.RouterStub(channel).Complete(request))
            assert [t for c in received for t in c.token_ids] == [*expected([1, 2, 3], 4), EOS]
            assert len("".join(c.text for c in received)) == 4
            assert received[-1].finish_reason == engine_pb2.FINISH_REASON_STOP

    run(body())


def test_chat_applies_the_template(stage, run):
    """The engine sees the rendered messages."""

    async def body():
        async with front(stage) as (s, channel):
            request = router_pb2.ChatRequest(
                model="chat", messages=[router_pb2.ChatMessage(role="user", content="hi")]
            )
            assert await chunks(router_pb2_grpc.RouterStub(channel).Chat(request))
            assert bytes(s.starts(0)[0].token_ids) == b"user: hi\nassistant: "

    run(body())


def test_a_stop_string_ends_text_and_engine(stage, run):
    """Text ends before the stop string and the engine is told to stop."""

    async def body():
        async with front(stage, step_seconds=0.005, tokens=500) as (s, channel):
            text = bytes(expected(list(b"hello"), 100)).decode()
            request = complete("hello", stop=[text[10:12]])
            received = await chunks(router_pb2_grpc.RouterStub(channel).Complete(request))
            assert "".join(c.text for c in received) == text[: text.index(text[10:12])]
            assert received[-1].finish_reason == engine_pb2.FINISH_REASON_STOP
            await s.until(lambda: len(s.peers[0].engine.cancels) == 1)
            assert dict(s.dispatcher.stats.of("r").codes) == {200: 1}

    run(body())


def test_hanging_up_cancels(stage, run):
    """A client that goes away frees the engine."""

    async def body():
        async with front(stage, step_seconds=0.005, tokens=2000) as (s, channel):
            call = router_pb2_grpc.RouterStub(channel).Complete(complete("hello"))
            await call.read()
            call.cancel()
            await s.until(lambda: len(s.peers[0].engine.cancels) == 1)
            await s.until(lambda: s.dispatcher.stats.open == 0)

    run(body())


@pytest.mark.parametrize(
    ("method", "request_", "code", "words"),
    [
        ("Complete", {"model": "nope", "text": "x"}, "NOT_FOUND", "chat"),
        ("Complete", {"model": "chat", "text": ""}, "INVALID_ARGUMENT", "empty"),
        ("Complete", {"model": "chat", "text": "x" * 5000}, "INVALID_ARGUMENT", "4096"),
        ("Complete", {"model": "chat", "text": "x" * 10**6}, "INVALID_ARGUMENT", "4096"),
        ("Complete", {"model": "chat", "text": "x", "stop": [""]}, "INVALID_ARGUMENT", "stop"),
        (
            "Complete",
            {"model": "chat", "text": "x", "stop": ["s"] * 65},
            "INVALID_ARGUMENT",
            "at most 64",
        ),
        (
            "Complete",
            {"model": "chat", "text": "x", "sampling": {"logprobs": 2}},
            "INVALID_ARGUMENT",
            "sampling.logprobs is 2",
        ),
        (
            "Chat",
            {
                "model": "chat",
                "messages": [{"role": "user", "content": "x"}],
                "sampling": {"prompt_logprobs": 0},
            },
            "INVALID_ARGUMENT",
            "sampling.prompt_logprobs is 0",
        ),
        (
            "Complete",
            {"model": "chat", "text": "x", "sampling": {"max_tokens": 5000}},
            "INVALID_ARGUMENT",
            "max_tokens is 5000",
        ),
        ("Chat", {"model": "chat"}, "INVALID_ARGUMENT", "messages"),
        ("GetLoad", {"service": "nope"}, "NOT_FOUND", "nope"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(stage, run, method, request_, code, words):
    """Status, and a sentence that names the value and its limit."""
    kind = {
        "Chat": router_pb2.ChatRequest,
        "Complete": router_pb2.CompleteRequest,
        "GetLoad": router_pb2.GetLoadRequest,
    }[method]

    async def body():
        async with front(stage) as (s, channel):
            call = getattr(router_pb2_grpc.RouterStub(channel), method)(kind(**request_))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (call if method == "GetLoad" else chunks(call))
            assert caught.value.code().name == code
            assert words in caught.value.details()
            assert not s.starts(0)

    run(body())


def test_the_engines_refusal_reaches_the_client(stage, run):
    """INVALID_ARGUMENT of the engine is the client's, with the field in the trailers."""

    async def body():
        async with front(stage, refuse=engine_pb2.Error.INVALID_ARGUMENT) as (_, channel):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await chunks(router_pb2_grpc.RouterStub(channel).Complete(complete("x")))
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert ("shoal-field", "sampling.top_p") in tuple(caught.value.trailing_metadata())

    run(body())


def test_a_clients_deadline_ends_the_engines_work(stage, run):
    """The call's deadline travels on to the engine."""

    async def body():
        async with front(stage, step_seconds=0.02, tokens=2000) as (s, channel):
            call = router_pb2_grpc.RouterStub(channel).Complete(complete("x"), timeout=0.3)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await chunks(call)
            assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            assert 0 < s.starts(0)[0].deadline_seconds <= 0.3
            await s.until(lambda: s.dispatcher.stats.open == 0)

    run(body())


def test_load_health_and_reflection(stage, run):
    """What the autoscaler and grpcurl ask for."""

    async def body():
        async with front(stage) as (_, channel):
            stub = router_pb2_grpc.RouterStub(channel)
            await chunks(stub.Complete(complete("x")))
            load = await stub.GetLoad(router_pb2.GetLoadRequest(service="chat"))
            assert [s.service for s in load.services] == ["chat"]
            assert load.services[0].endpoints[0].admitted
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(service="shoal.v1.Router"))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            )
            listed = {s.name async for r in call for s in r.list_services_response.service}
            assert {"shoal.v1.Router", "grpc.health.v1.Health"} <= listed

    run(body())


def test_a_taken_port_is_an_os_error(stage, run):
    """Two routers cannot share a gRPC port by accident."""

    async def body():
        async with front(stage) as (s, _):
            server, port = await start_grpc(s.core, "127.0.0.1:0")
            with pytest.raises(OSError, match=str(port)):
                await start_grpc(s.core, f"127.0.0.1:{port}")
            await server.stop(0)
            await asyncio.sleep(0)

    run(body())
