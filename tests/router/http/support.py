"""A scripted core for the HTTP front, and small clients to talk to the application.

Token ids are the bytes of the text and 256 ends a sample (the scripted engine's tokenizer), so a
script can cut text anywhere.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry, Counter

from shoal.api.v1 import engine_pb2
from shoal.router.generation import Generation, GenerationError, GenerationRequest, Output
from shoal.router.http.app import App, create_app
from shoal.router.http.exchange import HttpSettings
from shoal.router.http.server import HttpProtocol
from shoal.router.text import TextModel

EOS = 256
STOP = engine_pb2.FINISH_REASON_STOP
LENGTH = engine_pb2.FINISH_REASON_LENGTH
PATIENCE = 20.0  # seconds; only a broken test waits so long


def model(tokenizer_json: bytes, **changes: Any) -> engine_pb2.Model:
    """A model over byte tokens."""
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    fields: dict[str, Any] = {
        "name": "bytes",
        "max_model_len": 512,
        "vocab_size": 257,
        "eos_token_ids": [EOS],
        "tokenizer": engine_pb2.Tokenizer(
            tokenizer_json=tokenizer_json, chat_template=template, eos_token="<|end|>"
        ),
    }
    return engine_pb2.Model(**{**fields, **changes})


def entry(token_id: int, top: int) -> engine_pb2.TokenLogprobs:
    """A token's logprobs: -0.5 for itself, then `top` likelier ones."""
    others = [(token_id + i) % 256 for i in range(1, top + 1)]
    return engine_pb2.TokenLogprobs(
        token_ids=[token_id, *others],
        logprobs=[-0.5, *[-0.1 * i for i in range(1, top + 1)]],
        rank=top + 1,
    )


Reply = Callable[[GenerationRequest, int], Sequence[bytes | BaseException]]


def says(*pieces: bytes | BaseException) -> Reply:
    """Every sample answers with these pieces, one a wake-up."""
    return lambda request, index: pieces


@dataclass
class FakeCore:
    """Answers at once with a script. A reply that ends before max_tokens ends with EOS; an
    exception in it fails the request there."""

    text_model: TextModel
    reply: Reply = field(default_factory=lambda: says(b"Hello", b" world"))
    names: tuple[str, ...] = ("m", "alias")
    is_ready: bool = True
    refuse: GenerationError | None = None
    hang: bool = False  # after the reply, instead of ending
    requests: list[GenerationRequest] = field(default_factory=list)
    cancelled: list[int | None] = field(default_factory=list)
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        self.counter = Counter("shoal_requests", "Requests.", registry=self.registry)

    @property
    def ready(self) -> bool:
        return self.is_ready

    def models(self) -> list[tuple[str, str]]:
        return [(name, "svc") for name in self.names]

    def find(self, model_id: str) -> str | None:
        return "svc" if model_id in self.names else None

    def session_header(self, service: str) -> str:
        return "x-session-id"

    def pinned(self, service: str, header: Callable[[bytes], bytes | None]) -> str | None:
        return None

    def known_text(self, service: str) -> TextModel | None:
        return None

    async def text(self, service: str, timeout: float | None = None) -> TextModel:  # noqa: ASYNC109
        return self.text_model

    def submit(self, request: GenerationRequest) -> Generation:
        if self.refuse is not None:
            raise self.refuse
        self.requests.append(request)
        self.counter.inc()
        generation = Generation(request, self, 0.0)
        generation.revision, generation.endpoint = "r1", "pod-1"
        for index in range(request.n):
            script = list(_outputs(request, index, self.reply(request, index), self.hang))
            self._play(generation, script)
        return generation

    def cancel(self, generation: Generation, index: int | None) -> None:
        self.cancelled.append(index)

    def _play(self, generation: Generation, script: list[Output | GenerationError]) -> None:
        if not script:
            return
        first = script.pop(0)
        if generation.settled:
            return
        if isinstance(first, GenerationError):
            generation.fail(first)
            return
        if not generation.samples[first.index].finished:
            generation.deliver(first)
        asyncio.get_running_loop().call_soon(self._play, generation, script)


def _outputs(
    request: GenerationRequest, index: int, pieces: Sequence[bytes | BaseException], hang: bool
) -> Iterator[Output | GenerationError]:
    sampling = request.sampling
    left = sampling.max_tokens
    first = True
    for place, piece in enumerate(pieces):
        if isinstance(piece, GenerationError):
            yield piece
            return
        assert isinstance(piece, bytes)
        ids = list(piece)[:left]
        left -= len(ids)
        over = place == len(pieces) - 1 and not hang
        finish = LENGTH if not left else 0
        if over and left:
            ids.append(EOS)
            finish = STOP
        output = Output(index, ids, finish=finish, cached_tokens=3 if first else 0)
        if sampling.HasField("logprobs"):
            output.logprobs = [entry(token_id, sampling.logprobs) for token_id in ids]
        if first and sampling.HasField("prompt_logprobs"):
            output.prompt_logprobs = [
                engine_pb2.TokenLogprobs(),
                *[entry(i, sampling.prompt_logprobs) for i in list(request.token_ids)[1:]],
            ]
        yield output
        first = False
        if finish:
            return


@dataclass(frozen=True)
class Answer:
    """A whole response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The documents of an event stream, which must end as it should."""
        lines = self.body.decode().split("\n\n")
        assert lines.pop() == ""
        assert all(line.startswith("data: ") for line in lines)
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]


async def call_async(
    app: App,
    method: str,
    path: str,
    body: object = None,
    headers: Sequence[tuple[str, str]] = (("content-type", "application/json"),),
    pieces: Sequence[bytes] | None = None,
) -> Answer:
    """One request straight into the application. `body`: JSON, or bytes as they are."""
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    incoming = list(pieces) if pieces is not None else [raw]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if incoming:
            piece = incoming.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(incoming)}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers],
    }
    async with asyncio.timeout(PATIENCE):
        await app(scope, receive, send)
    start, *bodies = sent
    assert start["type"] == "http.response.start"
    assert [message.get("more_body", False) for message in bodies] == [True] * (len(bodies) - 1) + [
        False
    ]
    answered = {name.decode(): value.decode() for name, value in start["headers"]}
    return Answer(start["status"], answered, b"".join(message["body"] for message in bodies))


def call(app: App, method: str, path: str, body: object = None, **more: Any) -> Answer:
    """`call_async` in a loop of its own."""
    return asyncio.run(call_async(app, method, path, body, **more))


def post(core: FakeCore, path: str, body: object, **more: Any) -> Answer:
    """A JSON POST to an application over this core."""
    return call(create_app(core, clock=lambda: 1700000000.0), "POST", path, body, **more)


@contextlib.asynccontextmanager
async def served(core: FakeCore, settings: HttpSettings | None = None) -> AsyncIterator[int]:
    """The application behind a real uvicorn; gives its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_app(core, settings), http=HttpProtocol, ws="none", log_config=None, lifespan="off"
    )
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(server._serve([listener]))
    while not server.started:  # noqa: ASYNC110 (uvicorn offers no event)
        await asyncio.sleep(0.005)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        server.force_exit = True
        await task
        listener.close()
