"""Which replica of a service a piece goes to: `pick` applied to the live replicas.

A piece is bound to a lane (a revision, a tokenizer); the rest is the policy's choice. Weights
share new requests between the revisions that can take any; where no weighted revision can, any
other may, since a rollout that went wrong is no reason to answer nobody.
"""

import random
from collections.abc import Collection, Mapping, Sequence
from time import perf_counter

from shoal.api.blocks import root_hash
from shoal.api.routes import RouteTable, RoutingPolicy
from shoal.router.histogram import Histogram
from shoal.router.pick import Demand, PickSettings, draw_revision, pick
from shoal.router.piece import Piece
from shoal.router.prefix_index import PrefixIndex, PromptBlocks
from shoal.router.replica import Replica

Lane = tuple[str, str]  # revision and text key that a piece is bound to; "": any


class Selection:
    """Owns the prefix index and what was drawn from the table's weights."""

    def __init__(self, load_limit_seconds: float, rng: random.Random, seconds: Histogram) -> None:
        self.index = PrefixIndex()
        self._load_limit_seconds = load_limit_seconds
        self._rng = rng
        self._seconds = seconds  # that choices take
        self._settings = PickSettings()
        self._open: frozenset[Lane] = frozenset()  # what can take requests now
        self._weights: dict[str, int] = {}  # of these revisions; empty: all are equal
        self._turn = 0

    def refresh(self, table: RouteTable, replicas: Collection[Replica]) -> bool:
        """Takes note of table and replicas; True if lanes may have changed by it."""
        self._settings = PickSettings(table.policy, self._load_limit_seconds)
        open_now = frozenset((r.revision, r.text_key) for r in replicas if r.available)
        weights = {
            revision: table.weights[revision]
            for revision, _ in open_now
            if table.weights.get(revision, 0) > 0
        }
        changed = (open_now, weights) != (self._open, self._weights)
        self._open, self._weights = open_now, weights
        return changed

    def lane(self, piece: Piece) -> Lane:
        """What binds a piece: its pin, the revision it began on, or its share of the weights."""
        generation = piece.generation
        text_key = piece.text_key
        if generation.request.revision is not None:
            return generation.request.revision, text_key
        if piece.begun and (generation.revision, text_key) in self._open:
            return generation.revision, text_key
        return self.draw(piece.share, text_key) or "", text_key

    def draw(self, share: float, text_key: str = "") -> str | None:
        """The revision that holds this place in [0, 1), of those that understand the text."""
        weights = self._weights
        if len(weights) > 1 and text_key:
            weights = {r: w for r, w in weights.items() if (r, text_key) in self._open}
        return draw_revision(weights, share)

    def choose(self, piece: Piece, lane: Lane, replicas: Mapping[str, Replica]) -> Replica | None:
        """The replica that a piece should go to now, or None where it had better wait."""
        began = perf_counter()
        revision, text = lane
        able = [
            replica
            for replica in replicas.values()
            if replica.available
            and (not text or replica.text_key == text)
            and (revision or not self._weights or replica.revision in self._weights)
        ]
        if not able:
            return None
        cached: Mapping[str, int] = {}
        if self._settings.policy is RoutingPolicy.PREFIX_AWARE and len(able) > 1:
            cached = self._cached_tokens(piece, able)
        tokens = piece.tokens
        session = piece.generation.request.session
        demand = Demand(tokens, len(piece.indexes), revision or None, session, piece.failed_on)
        candidates = [replica.candidate() for replica in able]
        choice = pick(candidates, demand, cached, self._settings, self._rng, self._turn)
        self._seconds.add(perf_counter() - began)
        if choice is None:
            return None
        self._turn += 1
        piece.uncached_tokens = tokens - cached.get(choice.name, 0)
        replica = replicas[choice.name]
        return replica if replica.available else None

    def _cached_tokens(self, piece: Piece, replicas: Sequence[Replica]) -> Mapping[str, int]:
        cached: dict[str, int] = {}
        if not len(self.index):
            return cached
        for kind in {(replica.hash_seed, replica.block_size) for replica in replicas}:
            blocks = piece.blocks.get(kind)
            seed, size = kind
            if blocks is None:
                request = piece.generation.request
                blocks = PromptBlocks(root_hash(seed, request.salt), request.token_ids, size)
                piece.blocks[kind] = blocks
            # Only replicas of this root can match: every hash begins with it.
            for name, matched in self.index.match(blocks).items():
                cached[name] = matched * size
        return cached
