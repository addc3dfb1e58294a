"""Who owns which model id, kept up to date one service at a time.

`shoal.operator.claims` decides over all services at once; with a thousand of them that is too
much for each change, so this holds the askers of each id in their order of age.
"""

from bisect import insort
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final, NamedTuple

from shoal.api.types import InferenceService
from shoal.operator.observe import Claim

_NEVER: Final = datetime.max.replace(tzinfo=UTC)


class _Asker(NamedTuple):
    """Sorts by age, the oldest first; the key decides between equals."""

    created: datetime
    key: str


class ClaimBook:
    """The same answers as `claims` for the services that were put in and not taken out."""

    def __init__(self) -> None:
        self._askers: dict[str, list[_Asker]] = {}  # by model id, the owner first
        self._asked: dict[str, tuple[_Asker, tuple[str, ...]]] = {}

    def put(self, key: str, service: InferenceService) -> set[str]:
        """A service as it is now; returns the other services whose claims may have changed."""
        adapters = (adapter.name for adapter in service.spec.model.adapters)
        ids = tuple(dict.fromkeys((*service.model_ids, *adapters)))
        asker = _Asker(service.metadata.creation_timestamp or _NEVER, key)
        if self._asked.get(key) == (asker, ids):
            return set()
        touched = self._take_out(key)
        self._asked[key] = asker, ids
        for model_id in ids:
            insort(self._askers.setdefault(model_id, []), asker)
        return (touched | self._others(ids)) - {key}

    def drop(self, key: str) -> set[str]:
        """A service that is gone; returns the others whose claims may have changed."""
        return self._take_out(key)

    def claims(self, key: str) -> tuple[Claim, ...]:
        """Ids that the service asks for and an older one owns."""
        _, ids = self._asked.get(key, (None, ()))
        owners = ((model_id, self._askers[model_id][0].key) for model_id in ids)
        return tuple(Claim(model_id, owner) for model_id, owner in owners if owner != key)

    def _take_out(self, key: str) -> set[str]:
        asker, ids = self._asked.pop(key, (None, ()))
        for model_id in ids:
            askers = self._askers[model_id]
            askers[:] = [other for other in askers if other != asker]
            if not askers:
                del self._askers[model_id]
        return self._others(ids) - {key}

    def _others(self, ids: Iterable[str]) -> set[str]:
        return {asker.key for model_id in ids for asker in self._askers.get(model_id, ())}
