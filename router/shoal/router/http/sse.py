"""Server-sent events: every chunk is a constant head, the text as JSON, a constant tail."""

from collections.abc import Callable
from dataclasses import dataclass

import orjson

from shoal.router.generation import GenerationError
from shoal.router.http.errors import ApiError, Headers, from_generation
from shoal.router.http.exchange import Exchange
from shoal.router.http.run import Run, Step
from shoal.router.text_stream import TextStream

SSE: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Shape:
    """How an endpoint writes the text of a choice."""

    object: str
    before: bytes
    after: bytes
    opening: bytes | None  # a chunk of its own before a choice's first text
    ending: bytes  # beside the finish reason


CHAT = Shape(
    "chat.completion.chunk",
    b'"delta":{"content":',
    b"}",
    b'"delta":{"role":"assistant","content":""}',
    b'"delta":{}',
)
COMPLETION = Shape("text_completion", b'"text":', b"", None, b'"text":""')


@dataclass(frozen=True, slots=True)
class Extras:
    """What a chunk carries beside text, where the client asked for it."""

    logprobs: object | None
    fields: dict[str, object]  # further keys of the choice

    @property
    def any(self) -> bool:
        """Whether they are worth a chunk without text."""
        return bool(self.logprobs) or any(self.fields.values())


class Chunks:
    """Writes the chunks of one response."""

    __slots__ = ("_continuous", "_head", "_run", "_shape", "_suffix", "_tail", "_usage")

    def __init__(
        self,
        shape: Shape,
        identity: tuple[str, int, str],
        run: Run,
        *,
        usage: bool,
        continuous: bool,
    ) -> None:
        """`identity`: id, created, model. `usage`: a last chunk tells it. `continuous`: each
        chunk tells it."""
        self._shape = shape
        self._run = run
        self._usage = usage
        self._continuous = continuous
        name, created, model = identity
        self._head = b'data: {"id":%b,"object":"%b","created":%d,"model":%b,"choices":[' % (
            orjson.dumps(name),
            shape.object.encode(),
            created,
            orjson.dumps(model),
        )
        self._tail = b',"usage":null}\n\n' if usage else b"}\n\n"
        self._suffix = shape.after + b',"logprobs":null,"finish_reason":null}]' + self._tail

    def opening(self, choice: int) -> bytes:
        """What comes before a choice's first text."""
        if self._shape.opening is None:
            return b""
        return b'%b{"index":%d,%b,"logprobs":null,"finish_reason":null}]%b' % (
            self._head,
            choice,
            self._shape.opening,
            self._end_of_chunk(),
        )

    def prefix(self, choice: int) -> bytes:
        """All that comes before the text in a chunk of this choice."""
        return b'%b{"index":%d,%b' % (self._head, choice, self._shape.before)

    def text(self, prefix: bytes, text: str, extras: Extras | None) -> bytes:
        """A chunk of text."""
        if extras is None and not self._continuous:
            return prefix + orjson.dumps(text) + self._suffix
        logprobs = fields = b""
        if extras is not None:
            logprobs = orjson.dumps(extras.logprobs)
            fields = _members(extras.fields)
        return b'%b%b%b,"logprobs":%b,"finish_reason":null%b}]%b' % (
            prefix,
            orjson.dumps(text),
            self._shape.after,
            logprobs or b"null",
            fields,
            self._end_of_chunk(),
        )

    def ending(self, choice: int, stream: TextStream) -> bytes:
        """The chunk with the finish reason."""
        return b'%b{"index":%d,%b,"logprobs":null,"finish_reason":"%b","stop_reason":%b}]%b' % (
            self._head,
            choice,
            self._shape.ending,
            (stream.finish or "stop").encode(),
            orjson.dumps(stream.stop_reason),
            self._end_of_chunk(),
        )

    def last(self) -> bytes:
        """The end of the stream."""
        if not self._usage:
            return _DONE
        return b'%b],"usage":%b}\n\n%b' % (
            self._head,
            orjson.dumps(self._run.usage().json()),
            _DONE,
        )

    def _end_of_chunk(self) -> bytes:
        if not self._continuous:
            return self._tail
        return b',"usage":%b}\n\n' % orjson.dumps(self._run.usage().json())


def _members(fields: dict[str, object]) -> bytes:
    """Further members of an object that has some already."""
    return b"," + orjson.dumps(fields)[1:-1] if fields else b""


async def stream(
    exchange: Exchange,
    run: Run,
    chunks: Chunks,
    extras: Callable[[Step], Extras] | None,
    echo: Callable[[Step], tuple[str, Extras | None]] | None = None,
) -> None:
    """Streams a run as it comes, in one write a step of the engine. The response begins with the
    first token: what fails before raises GenerationError, what fails later becomes an error event.

    `extras`: what a step carries beside its text. `echo`: what comes before a choice's first.
    """
    prefixes = [chunks.prefix(choice) for choice in range(len(run.streams))]
    unopened = set(range(len(run.streams)))

    def render(steps: list[Step]) -> bytes:
        parts = []
        for step in steps:
            choice, text, _ = step
            if choice in unopened:
                unopened.remove(choice)
                parts.append(chunks.opening(choice))
                if echo is not None:
                    parts.append(chunks.text(prefixes[choice], *echo(step)))
            extra = extras(step) if extras is not None else None
            if text or (extra is not None and extra.any):
                parts.append(chunks.text(prefixes[choice], text, extra))
            if run.streams[choice].finish is not None:
                parts.append(chunks.ending(choice, run.streams[choice]))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    rendered = b""  # but not sent

    def pass_on(steps: list[Step]) -> bool:
        nonlocal rendered
        rendered = render(steps)
        if run.done or (rendered and not exchange.write(rendered)):
            return False
        rendered = b""
        return True

    try:
        while not run.done:
            steps = await run.next(pass_on if exchange.started else None)
            body, rendered = rendered or render(steps), b""
            if run.done:
                body += chunks.last()
            if not exchange.started:
                if steps:
                    await exchange.begin([*SSE, *run.headers()], body, more=not run.done)
            elif body and not exchange.write(body, more=not run.done):
                await exchange.send(body, more=not run.done)
    except (GenerationError, ApiError) as error:
        if not exchange.started:
            raise
        if not exchange.gone:
            refusal = error if isinstance(error, ApiError) else from_generation(error)
            await exchange.send(b"data: %b\n\n%b" % (refusal.body(), _DONE), more=False)
    finally:
        run.cancel()
