"""Model ids: each belongs to one service, and who came first keeps it."""

from collections.abc import Iterable
from datetime import UTC, datetime

from shoal.api.types import InferenceService
from shoal.operator.observe import Claim
from shoal.operator.platform import Platform

_NEVER = datetime.max.replace(tzinfo=UTC)


def claims(
    services: Iterable[InferenceService], platform: Platform
) -> dict[str, tuple[Claim, ...]]:
    """By `platform.service_key`: the ids that a service asks for and an older one owns.

    Age is the time of creation, then the key, so that every operator decides alike.
    """

    def age(service: InferenceService) -> tuple[datetime, str]:
        return service.metadata.creation_timestamp or _NEVER, platform.service_key(service)

    owners: dict[str, str] = {}
    taken = {}
    for service in sorted(services, key=age):
        key = platform.service_key(service)
        asked = (*service.model_ids, *(a.name for a in service.spec.model.adapters))
        taken[key] = tuple(Claim(i, owners[i]) for i in asked if i in owners)
        for model_id in asked:
            owners.setdefault(model_id, key)
    return taken
