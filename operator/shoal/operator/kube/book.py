"""The services of the scope, read once per change: parsed, or why they cannot be."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from shoal.api.types import InferenceService, InvalidManifest, parse_document
from shoal.operator.kube.claimbook import ClaimBook
from shoal.operator.kube.world import uid_of
from shoal.operator.observe import Claim

# What plans depend on; the rest of the metadata is other people's.
_METADATA: Final = ("name", "namespace", "generation", "uid", "creationTimestamp")


@dataclass(frozen=True, slots=True)
class Entry:
    """One service as its document says."""

    uid: str
    generation: int
    service: InferenceService | None  # None: it cannot be read
    problem: str = ""  # why not


class ServiceBook:
    """By `namespace/name`. A service that is being deleted is not in it."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._claims = ClaimBook()

    def get(self, key: str) -> Entry | None:
        return self._entries.get(key)

    def claims(self, key: str) -> tuple[Claim, ...]:
        return self._claims.claims(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def readable(self) -> Iterator[tuple[str, InferenceService]]:
        for key, entry in self._entries.items():
            if entry.service is not None:
                yield key, entry.service

    def note(self, key: str, live: Mapping[str, Any] | None) -> set[str]:
        """The live document, None where it is gone; returns other services that this concerns."""
        if live is None or live["metadata"].get("deletionTimestamp") is not None:
            self._entries.pop(key, None)
            return self._claims.drop(key)
        uid, generation = uid_of(live), live["metadata"].get("generation", 0)
        known = self._entries.get(key)
        if known is not None and (known.uid, known.generation) == (uid, generation):
            return set()
        entry = _read(live, uid, generation)
        self._entries[key] = entry
        # Ids of a document that cannot be read stay with whom they were.
        return self._claims.put(key, entry.service) if entry.service is not None else set()


def _read(live: Mapping[str, Any], uid: str, generation: int) -> Entry:
    meta = {key: live["metadata"][key] for key in _METADATA if key in live["metadata"]}
    document = {
        "apiVersion": live["apiVersion"],
        "kind": live["kind"],
        "metadata": meta,
        "spec": live.get("spec"),
    }
    try:
        return Entry(uid, generation, parse_document(document))
    except InvalidManifest as error:
        return Entry(uid, generation, None, "; ".join(map(str, error.problems)))
