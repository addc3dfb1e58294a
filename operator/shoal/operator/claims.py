"""Model ids: each belongs to one service, and who came first keeps it."""

from collections.abc import Iterable
from datetime import UTC, datetime

from shoal.api.types import InferenceService
from shoal.operator.observe import Claim

_NEVER = datetime.max.replace(tzinfo=UTC)


def claims(services: Iterable[InferenceService]) -> dict[str, tuple[Claim, ...]]:
    """By service name: the ids that it asks for and an older service owns.

    Age is the time of creation, then the name, so that every operator decides alike.
    """
    owners: dict[str, str] = {}
    taken = {}
    for service in sorted(services, key=_age):
        asked = (*service.model_ids, *(a.name for a in service.spec.model.adapters))
        taken[service.name] = tuple(Claim(i, owners[i]) for i in asked if i in owners)
        for model_id in asked:
            owners.setdefault(model_id, service.name)
    return taken


def _age(service: InferenceService) -> tuple[datetime, str]:
    return service.metadata.creation_timestamp or _NEVER, service.name
