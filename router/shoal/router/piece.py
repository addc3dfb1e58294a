"""Samples of one generation that travel together: the unit of dispatch."""

from typing import TYPE_CHECKING

from shoal.api.v1 import engine_pb2
from shoal.router.generation import Generation
from shoal.router.prefix_index import PromptBlocks
from shoal.router.queue import Ticket

if TYPE_CHECKING:
    from shoal.router.replica import Replica
    from shoal.router.selection import Lane


class Piece:
    """Either in the queue (`ticket`) or on a replica (`replica`, `id`)."""

    __slots__ = (
        "blocks",
        "failed_on",
        "generation",
        "id",
        "indexes",
        "migrations",
        "replica",
        "resumed_at",
        "retries",
        "share",
        "text_key",
        "ticket",
        "uncached_tokens",
        "wants_logprobs",
    )

    def __init__(
        self, generation: Generation, indexes: list[int], share: float, text_key: str
    ) -> None:
        self.generation = generation
        self.indexes = indexes  # unfinished samples
        self.share = share  # its place in [0, 1) between the revisions
        self.text_key = text_key
        self.wants_logprobs = generation.request.sampling.HasField("logprobs")
        self.id = ""  # on the wire, while on a replica
        self.replica: Replica | None = None
        self.ticket: Ticket[Piece, Lane] | None = None
        self.blocks: dict[tuple[str, int], PromptBlocks] = {}  # by hash seed and block size
        self.uncached_tokens = 0  # to prefill on the replica chosen last
        self.failed_on: frozenset[str] = frozenset()
        self.retries = 0
        self.migrations = 0
        self.resumed_at = 0  # tokens of a sample that its replica was given with the prompt

    @property
    def begun(self) -> bool:
        """A token of an unfinished sample has been delivered."""
        generation = self.generation
        if not generation.first_at:
            return False
        return any(generation.samples[index].generated for index in self.indexes)

    @property
    def progressed(self) -> bool:
        """Its replica has delivered a token of an unfinished sample."""
        samples = self.generation.samples
        return any(len(samples[index].generated) > self.resumed_at for index in self.indexes)

    def split(self) -> "list[Piece]":
        """Itself, or a piece for each sample where one Start cannot say them all any more."""
        whole = self.indexes == list(range(self.indexes[0], self.indexes[0] + len(self.indexes)))
        if len(self.indexes) == 1 or (whole and not self.begun):
            return [self]
        parts = []
        for index in self.indexes:
            part = Piece(self.generation, [index], self.share, self.text_key)
            part.failed_on, part.blocks = self.failed_on, self.blocks
            part.retries, part.migrations = self.retries, self.migrations
            parts.append(part)
        self.generation.pieces.remove(self)
        self.generation.pieces += parts
        return parts

    @property
    def tokens(self) -> int:
        """All that a replica has to know before it can go on."""
        generation = self.generation
        return generation.prompt_tokens + len(generation.samples[self.indexes[0]].generated)

    def fill(self, start: engine_pb2.Start, now: float) -> None:
        """Writes what a replica needs to begin with it, or to go on."""
        generation = self.generation
        request = generation.request
        generated = generation.samples[self.indexes[0]].generated
        start.token_ids.extend(request.token_ids)
        start.token_ids.extend(generated)
        self.resumed_at = len(generated)
        start.prompt_tokens = len(request.token_ids)
        start.sampling.CopyFrom(request.sampling)
        if generated:
            _shorten(start.sampling, len(generated))
        start.priority = request.priority
        start.salt = request.salt
        start.n = len(self.indexes)
        start.sample_index = self.indexes[0]
        if request.timeout_seconds is not None:
            spent = now - generation.arrived_at
            start.deadline_seconds = max(0.001, request.timeout_seconds - spent)


def _shorten(sampling: engine_pb2.Sampling, generated: int) -> None:
    """What is left of the limits, where this many tokens were generated before."""
    if sampling.HasField("max_tokens"):
        sampling.max_tokens = max(1, sampling.max_tokens - generated)
    if sampling.HasField("min_tokens"):
        sampling.min_tokens = max(0, sampling.min_tokens - generated)
    sampling.ClearField("prompt_logprobs")
