"""The router for gRPC clients: `shoal.v1.Router`, with health and reflection."""

import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, TypeAlias

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shoal.api.v1 import engine_pb2, router_pb2, router_pb2_grpc
from shoal.router.chat_template import ChatTemplateError
from shoal.router.core import RouterCore
from shoal.router.generation import Generation, GenerationError, GenerationRequest
from shoal.router.report import service_load
from shoal.router.stop import MAX_STOP_LENGTH, MAX_STOP_STRINGS
from shoal.router.text import TextModel
from shoal.router.text_stream import TextStream

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 10 << 20
# What TextChunk has no place for.
UNANSWERED: Final = ("logprobs", "prompt_logprobs")
SERVER_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Two routers that share a port by accident would each get half of the clients.
    ("grpc.so_reuseport", 0),
    # A client that vanished without a word would hold its replica until this notices.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
)
STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE,
}

Request = router_pb2.ChatRequest | router_pb2.CompleteRequest
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class RouterServicer(router_pb2_grpc.RouterServicer):
    """Streams text. Errors are gRPC statuses whose details say what HTTP would say."""

    def __init__(self, core: RouterCore) -> None:
        self._core = core

    async def Chat(
        self, request: router_pb2.ChatRequest, context: Context
    ) -> AsyncIterator[router_pb2.TextChunk]:
        try:
            service, text = await self._text(request.model)
            messages = [{"role": m.role, "content": m.content} for m in request.messages]
            if not messages:
                raise _invalid("messages", "messages is empty, but must have at least one")
            try:
                prompt = text.apply_chat_template(messages)
            except ChatTemplateError as error:
                raise _invalid("messages", str(error)) from error
            token_ids = await _encode(text, prompt, special=False)
            generation = self._submit(service, text, request, token_ids, context)
            async for chunk in _chunks(generation, text, request.stop):
                yield chunk
        except GenerationError as error:
            await _abort(context, error)

    async def Complete(
        self, request: router_pb2.CompleteRequest, context: Context
    ) -> AsyncIterator[router_pb2.TextChunk]:
        try:
            service, text = await self._text(request.model)
            if request.WhichOneof("prompt") == "token_ids":
                token_ids = list(request.token_ids.ids)
            else:
                token_ids = await _encode(text, request.text, special=True)
            if not token_ids:
                raise _invalid("prompt", "the prompt is empty, but must have at least one token")
            generation = self._submit(service, text, request, token_ids, context)
            async for chunk in _chunks(generation, text, request.stop):
                yield chunk
        except GenerationError as error:
            await _abort(context, error)

    async def GetLoad(
        self, request: router_pb2.GetLoadRequest, context: Context
    ) -> router_pb2.RouterLoad:
        services = self._core.services
        if request.service and request.service not in services:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"there is no service {request.service!r}"
            )
        now = self._core.clock()
        return router_pb2.RouterLoad(
            services=[
                service_load(service, now)
                for name, service in services.items()
                if request.service in ("", name)
            ]
        )

    async def _text(self, model_id: str) -> tuple[str, TextModel]:
        service = self._core.find(model_id)
        if service is None:
            known = ", ".join(name for name, _ in self._core.models()) or "none"
            raise GenerationError(
                404,
                "model_not_found",
                f"model {model_id!r} does not exist; there are: {known}",
                field="model",
            )
        return service, await self._core.text(service)

    def _submit(
        self,
        service: str,
        text: TextModel,
        request: Request,
        token_ids: Sequence[int],
        context: Context,
    ) -> Generation:
        room = text.model.max_model_len - len(token_ids)
        if room < 1:
            raise _invalid(
                "prompt",
                f"the prompt has {len(token_ids)} tokens, but the model holds "
                f"{text.model.max_model_len} with at least one to generate",
            )
        _check_stop(request.stop)
        sampling = request.sampling
        for name in UNANSWERED:
            if sampling.HasField(name):
                raise _invalid(
                    f"sampling.{name}",
                    f"sampling.{name} is {getattr(sampling, name)}, but gRPC answers carry none: "
                    "leave it out, or ask over HTTP",
                )
        if sampling.HasField("max_tokens") and sampling.max_tokens > room:
            raise _invalid(
                "sampling.max_tokens",
                f"sampling.max_tokens is {sampling.max_tokens}, but the prompt's {len(token_ids)} "
                f"tokens leave {room} of the model's {text.model.max_model_len}",
            )
        defaults: dict[str, Any] = {**text.default_sampling}
        sampling = engine_pb2.Sampling(**defaults)
        sampling.MergeFrom(request.sampling)
        return self._core.submit(
            GenerationRequest(
                service=service,
                token_ids=token_ids,
                sampling=sampling,
                priority=request.priority,
                tenant=request.user,
                timeout_seconds=context.time_remaining(),
                text=text,
            )
        )


def _check_stop(stop: Sequence[str]) -> None:
    if len(stop) > MAX_STOP_STRINGS:
        raise _invalid(
            "stop", f"stop has {len(stop)} strings, but must have at most {MAX_STOP_STRINGS}"
        )
    for place, one in enumerate(stop):
        if not 0 < len(one) <= MAX_STOP_LENGTH:
            raise _invalid(
                f"stop[{place}]",
                f"stop[{place}] has {len(one)} characters, but must have from 1 to "
                f"{MAX_STOP_LENGTH}",
            )


async def _encode(text: TextModel, prompt: str, *, special: bool) -> list[int]:
    limit = text.max_prompt_bytes
    if len(prompt) > limit:
        raise _invalid(
            "prompt",
            f"the prompt has {len(prompt)} characters, but no text over {limit} bytes fits into "
            f"the model's {text.model.max_model_len} tokens",
        )
    return await text.encode_async(prompt, special)


async def _chunks(
    generation: Generation, text: TextModel, stop: Sequence[str]
) -> AsyncIterator[router_pb2.TextChunk]:
    """One chunk for all that came since the last. A client that goes away cancels."""
    name = f"gen-{secrets.token_hex(8)}"
    stream = TextStream(text, stop=tuple(stop), min_tokens=generation.request.sampling.min_tokens)
    try:
        while not generation.done:
            for output in await generation.next():
                shown = stream.feed(output.token_ids, output.finish)
                chunk = router_pb2.TextChunk(id=name, text=shown, token_ids=output.token_ids)
                if stream.finish is not None:
                    chunk.finish_reason = (
                        engine_pb2.FINISH_REASON_LENGTH
                        if stream.finish == "length"
                        else engine_pb2.FINISH_REASON_STOP
                    )
                    chunk.usage.prompt_tokens = generation.prompt_tokens
                    chunk.usage.completion_tokens = stream.num_tokens
                    chunk.usage.cached_tokens = output.cached_tokens
                    generation.cancel(output.index)
                yield chunk
    finally:
        if not generation.settled:
            generation.cancel()


def _invalid(field: str, message: str) -> GenerationError:
    return GenerationError(400, "invalid_request", message, field=field)


async def _abort(context: Context, error: GenerationError) -> None:
    metadata = [("shoal-code", error.code)]
    if error.field is not None:
        metadata.append(("shoal-field", error.field))
    if error.retry_after is not None:
        metadata.append(("retry-after", str(max(1, round(error.retry_after)))))
    code = STATUS.get(error.status, grpc.StatusCode.INTERNAL)
    await context.abort(code, error.message, tuple(metadata))


async def start_grpc(core: RouterCore, address: str) -> tuple[grpc.aio.Server, int]:
    """Starts the server; returns it and its port. Raises OSError where the port is taken."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    router_pb2_grpc.add_RouterServicer_to_server(RouterServicer(core), server)
    state = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs lack it
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    services = [service.full_name for service in router_pb2.DESCRIPTOR.services_by_name.values()]
    reflection.enable_server_reflection(
        [*services, health.SERVICE_NAME, reflection.SERVICE_NAME], server
    )
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"{address}: {error}") from error
    await server.start()
    for service in ("", *services):
        await state.set(service, health_pb2.HealthCheckResponse.SERVING)
    return server, port
