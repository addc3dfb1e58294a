"""The text models of one service: learned from its replicas, built once, in a thread.

Replicas of one revision describe the same model, and most revisions share one. The last model
stays known when the last replica goes, so that requests to a service at zero replicas are
tokenized while they wait.
"""

import asyncio
import logging
from collections.abc import Callable, Collection
from hashlib import blake2b

from shoal.api.v1 import engine_pb2
from shoal.router.generation import GenerationError
from shoal.router.text import TextModel

log = logging.getLogger(__name__)

LoadText = Callable[[engine_pb2.Model], TextModel]


class _Known:
    """One model: what the replica said, and what became of it."""

    def __init__(self, model: engine_pb2.Model, text_key: str) -> None:
        self.model = model
        self.text_key = text_key
        self.text: TextModel | None = None
        self.error = ""
        self.revisions: set[str] = set()
        self.task: asyncio.Task[None] | None = None


class ServiceTexts:
    """Owned by the core, on its event loop."""

    def __init__(self, load: LoadText) -> None:
        self._load = load
        self._known: dict[str, _Known] = {}  # by digest; the one learned last is the last
        self._waiters: set[asyncio.Future[None]] = set()

    @property
    def waiting(self) -> int:
        """Requests that wait for a model to become known."""
        return len(self._waiters)

    def learn(self, revision: str, text_key: str, model: engine_pb2.Model) -> None:
        """A replica of the revision says that this is its model."""
        digest = _digest(text_key, model)
        for known in self._known.values():
            known.revisions.discard(revision)
        known = self._known[digest] = (
            self._known.pop(digest) if digest in self._known else _Known(model, text_key)
        )
        known.revisions.add(revision)
        if known.text is None and (known.task is None or known.task.done()):
            known.task = asyncio.create_task(self._build(known))

    def prune(self, revisions: Collection[str]) -> None:
        """Forgets models that none of these revisions has, but never the last one."""
        for digest, known in list(self._known.items()):
            known.revisions.intersection_update(revisions)
            if not known.revisions and len(self._known) > 1:
                del self._known[digest]

    def model(self, revision: str | None) -> engine_pb2.Model | None:
        """What replicas of a revision serve; else what was learned last."""
        known = self._of(revision)
        return known.model if known is not None else None

    def text(self, revision: str | None) -> TextModel | None:
        """Like `model`; None also while it is being built."""
        known = self._of(revision)
        return known.text if known is not None else None

    def key_of(self, text: TextModel | None) -> str:
        """The key of the replicas that understand what this text model encodes; "": unknown."""
        for known in self._known.values():
            if known.text is text and text is not None:
                return known.text_key
        return ""

    def failure(self, revision: str | None) -> str:
        """Why the model cannot be used, or empty."""
        known = self._of(revision)
        return known.error if known is not None else ""

    async def news(self) -> None:
        """Returns when a model was built or could not be."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def close(self, error: GenerationError) -> None:
        """Whoever waits gets this error."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(error)

    def _of(self, revision: str | None) -> _Known | None:
        last = None
        for last in self._known.values():
            if revision in last.revisions:
                return last
        return last

    async def _build(self, known: _Known) -> None:
        try:
            known.text = await asyncio.to_thread(self._load, known.model)
            known.error = ""
        except ValueError as error:
            log.error("the model's text cannot be handled: %s", error)
            known.error = str(error)
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


def _digest(text_key: str, model: engine_pb2.Model) -> str:
    """Of everything that a text model depends on."""
    rest = engine_pb2.Model(
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        default_sampling=model.default_sampling,
    )
    if model.HasField("bos_token_id"):
        rest.bos_token_id = model.bos_token_id
    digest = blake2b(text_key.encode(), digest_size=16)
    digest.update(rest.SerializeToString(deterministic=True))
    return digest.hexdigest()
