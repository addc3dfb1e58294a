"""One request on its way through the router, as the fronts (HTTP, gRPC) see it.

A front builds a `GenerationRequest`, hands it to `RouterCore.submit` and then reads the
`Generation`:

    generation = core.submit(request)                # GenerationError: refused at once
    while not generation.done:
        for output in await generation.next():       # GenerationError: failed for good
            ...                                      # all that arrived since the last call

Deltas that arrive while the reader is busy are merged, so a slow reader costs one list a sample
and no queue. Where a replica dies the reader sees a pause: the dispatcher resends prompt and
generated ids elsewhere (see `dispatch`) and keeps delivering here. One event loop owns all this.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from shoal.api.v1 import engine_pb2

if TYPE_CHECKING:
    from shoal.router.piece import Piece
    from shoal.router.text import TextModel


class GenerationError(Exception):
    """Why a request ended without an answer, in HTTP's terms.

    `status` is the HTTP status, `code` a stable word for programs, `field` the request field at
    fault, `retry_after` the seconds after which trying again makes sense.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        retry_after: float | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after = retry_after
        self.field = field


@dataclass(slots=True)
class GenerationRequest:
    """Token ids in. Nobody changes it once it is submitted, but `sampling` passes into the
    router's hands, which may set its seed."""

    service: str
    token_ids: Sequence[int]
    sampling: engine_pb2.Sampling
    n: int = 1
    priority: int = 0  # smaller is sooner
    tenant: str = ""  # shares of the queue are fair between tenants
    session: str | None = None  # requests of one session prefer one replica
    revision: str | None = None  # pin: only replicas of this revision
    salt: str = ""  # shares cached prefixes only with requests of the same salt
    timeout_seconds: float | None = None  # from submit to the last token
    # What made the token ids. With it, a request never meets a replica that has another
    # tokenizer, which can be while a rollout changes the model.
    text: "TextModel | None" = None


@dataclass(slots=True)
class Output:
    """What one sample brought since the last `Generation.next`. Owned by the reader."""

    index: int
    token_ids: list[int]
    # One a token id if the request asked for logprobs, else empty.
    logprobs: list[engine_pb2.TokenLogprobs] = field(default_factory=list)
    # With the first output of a sample, one a prompt token (the first is empty), if asked for.
    prompt_logprobs: list[engine_pb2.TokenLogprobs] | None = None
    finish: int = 0  # engine_pb2.FinishReason: 0 (not finished), STOP or LENGTH
    cached_tokens: int = 0  # prompt tokens that the first replica had cached


class Sample:
    """Where one of the `n` samples stands. `generated` is all that migration needs."""

    __slots__ = ("cached_tokens", "finished", "generated", "index", "last_at")

    def __init__(self, index: int) -> None:
        self.index = index
        self.generated: list[int] = []
        self.finished = False
        self.cached_tokens = 0
        self.last_at = 0.0  # when the last token came; 0: none yet


def _nobody() -> None:
    """Nobody listens yet."""


class Canceller(Protocol):
    """Who runs a generation, told that nobody wants (a sample of) it any more."""

    def cancel(self, generation: "Generation", index: int | None) -> None: ...


class Generation:
    """The answer to one request. Fronts use the public names; the rest is the dispatcher's."""

    __slots__ = (
        "_canceller",
        "_closed",
        "_error",
        "_ready",
        "_wake",
        "arrived_at",
        "endpoint",
        "first_at",
        "pieces",
        "request",
        "revision",
        "samples",
        "unfinished",
    )

    def __init__(self, request: GenerationRequest, canceller: Canceller, now: float) -> None:
        self.request = request
        self.samples = [Sample(index) for index in range(request.n)]
        self.unfinished = request.n
        self.pieces: list[Piece] = []  # where the unfinished samples are: queued or on a replica
        self.arrived_at = now
        self.first_at = 0.0  # when the first token came; 0: none yet
        self.revision = ""  # of the replica that serves it; empty while it is queued
        self.endpoint = ""  # and its name
        self._canceller = canceller
        self._ready: list[Output] = []
        self._wake: Callable[[], object] = _nobody
        self._error: GenerationError | None = None
        self._closed = False  # cancelled as a whole

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.token_ids)

    @property
    def done(self) -> bool:
        """Every sample has ended and everything it brought has been read."""
        return self._closed or (not self.unfinished and not self._ready and self._error is None)

    @property
    def settled(self) -> bool:
        """Nothing more will come from replicas: finished, failed or cancelled."""
        return self._closed or not self.unfinished or self._error is not None

    @property
    def ready(self) -> bool:
        """`take` returns something, and does not raise."""
        return bool(self._ready)

    def listen(self, wake: Callable[[], object] | None) -> None:
        """From now on `wake` is called, on the event loop, whenever `take` has something new to
        say, and now where it has already. One listener at a time; it must not raise. None: nobody
        listens any more."""
        self._wake = wake or _nobody
        if self._ready or self.settled:
            self._wake()

    def take(self) -> list[Output]:
        """All that is there, at most one output a sample; [] where nothing is, yet.

        Raises GenerationError when the request has failed (after everything that came before),
        was cancelled, or is done.
        """
        outputs = self._ready
        if outputs:
            self._ready = []
        elif self._error is not None:
            raise self._error
        elif self._closed or not self.unfinished:
            raise GenerationError(499, "cancelled", "the request was cancelled or is done")
        return outputs

    async def next(self) -> list[Output]:
        """Waits until `take` has something. Never returns an empty list."""
        while not (outputs := self.take()):
            news = asyncio.Event()
            self.listen(news.set)
            await news.wait()
        return outputs

    def cancel(self, index: int | None = None) -> None:
        """Ends the request, or one sample: its replica frees it within a step. Idempotent.

        With an index: the reader has enough of that sample (a stop string, say), which counts as
        success. Without: the client is gone.
        """
        settled = self.settled
        if index is None:
            self._closed = True
            self._ready.clear()
        else:
            self._ready = [output for output in self._ready if output.index != index]
            sample = self.samples[index]
            if sample.finished:
                return
            sample.finished = True
            self.unfinished -= 1
        if not settled:
            self._canceller.cancel(self, index)
            self._wake()

    def deliver(self, output: Output) -> None:
        """Takes what a sample brought; the last delta of a sample has `finish` set."""
        if output.finish:
            self.samples[output.index].finished = True
            self.unfinished -= 1
        for waiting in self._ready:
            if waiting.index == output.index:
                waiting.token_ids += output.token_ids
                waiting.logprobs += output.logprobs
                waiting.finish = output.finish
                break
        else:
            self._ready.append(output)
        self._wake()

    def fail(self, error: GenerationError) -> None:
        """Ends the request with an error, which `next` raises."""
        if not self.settled:
            self._error = error
            self._wake()
