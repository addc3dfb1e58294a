"""Which route tables the ConfigMaps of a cluster say; no I/O.

A ConfigMap counts where it is called `<service>-routes`, carries the label and says in
`routes.json` that its service is `<its own namespace>/<service>`: whoever may write ConfigMaps in
one namespace cannot take the traffic of another. What cannot be read leaves the last good table
in place: a router serves what it knows.

A service whose ConfigMap is gone takes no new requests, and its table goes once the requests in
flight have ended: its pods drain meanwhile.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from pydantic import ValidationError

from shoal.api.names import LABEL_ROUTES, ROUTES_KEY
from shoal.api.routes import RouteTable

log = logging.getLogger(__name__)

SELECTOR: Final = f"{LABEL_ROUTES}=true"
SUFFIX: Final = "-routes"


class KubeTables:
    """The tables by service, `namespace/name`. Methods that take news tell whether it changed
    anything."""

    def __init__(self) -> None:
        self._tables: dict[str, RouteTable] = {}
        self._closed: dict[str, RouteTable] = {}  # of services that are gone, while they are busy
        self._bad: dict[str, str] = {}  # the text that was refused, by service
        self._owners: dict[str, str] = {}  # model id -> service
        self._contested: set[tuple[str, str]] = set()  # (model id, service) that goes without

    def put(self, config_map: Mapping[str, Any]) -> bool:
        """A ConfigMap was added or changed."""
        service = _service_of(config_map)
        if service is None:
            return False
        table = self._read(service, config_map)
        if table is None or self._tables.get(service) == table:
            return False
        self._tables[service] = table
        self._closed.pop(service, None)
        return True

    def drop(self, config_map: Mapping[str, Any]) -> bool:
        """A ConfigMap was deleted, or lost its label."""
        service = _service_of(config_map)
        if service is None:
            return False
        return self._close(service)

    def replace(self, config_maps: Iterable[Mapping[str, Any]], namespace: str | None) -> bool:
        """These are all there are, of one namespace or (None) of the cluster."""
        listed = list(config_maps)
        kept = {_service_of(config_map) for config_map in listed}
        inside = "" if namespace is None else f"{namespace}/"
        gone = [name for name in self._tables if name.startswith(inside) and name not in kept]
        for name in gone:
            self._close(name)
        changed = [self.put(config_map) for config_map in listed]
        return bool(gone) or any(changed)

    @property
    def closing(self) -> bool:
        """Whether services that are gone have a table yet."""
        return bool(self._closed)

    def finish(self, busy: Callable[[str], bool]) -> bool:
        """Forgets services that are gone and have no request any more."""
        done = [name for name in self._closed if not busy(name)]
        for name in done:
            del self._closed[name]
        return bool(done)

    def settled(self) -> dict[str, RouteTable]:
        """The tables to serve, where no two name one model id.

        The operator settles claims before it writes tables; should two services name one model
        id all the same, who has it keeps it, and of newcomers the first by name gets it.
        """
        owners = {
            model: service
            for model, service in self._owners.items()
            if service in self._tables and model in self._tables[service].models
        }
        for name in sorted(self._tables):
            for model in self._tables[name].models:
                owners.setdefault(model, name)
        contested = {
            (model, name)
            for name, table in self._tables.items()
            for model in table.models
            if owners[model] != name
        }
        for model, name in sorted(contested - self._contested):
            log.warning("model id %s belongs to %s, not to %s", model, owners[model], name)
        self._owners, self._contested = owners, contested
        served = {
            name: _without(table, {model for model, other in contested if other == name})
            for name, table in self._tables.items()
        }
        return self._closed | served

    def _close(self, service: str) -> bool:
        self._bad.pop(service, None)
        table = self._tables.pop(service, None)
        if table is None:
            return False
        leaving = tuple(e.model_copy(update={"draining": True}) for e in table.endpoints)
        self._closed[service] = table.model_copy(update={"models": (), "endpoints": leaving})
        return True

    def _read(self, service: str, config_map: Mapping[str, Any]) -> RouteTable | None:
        text = (config_map.get("data") or {}).get(ROUTES_KEY, "")
        try:
            table = RouteTable.model_validate_json(text)
            if table.service != service:
                raise ValueError(f"it names the service {table.service}")
        except (ValidationError, ValueError) as error:
            if self._bad.get(service) != text:
                log.error("the routes of %s are not used, the last good stay: %s", service, error)
            self._bad[service] = text
            return None
        self._bad.pop(service, None)
        return table


def _service_of(config_map: Mapping[str, Any]) -> str | None:
    metadata = config_map["metadata"]
    name: str = metadata["name"]
    if not name.endswith(SUFFIX) or name == SUFFIX:
        log.warning(
            "ConfigMap %s/%s is left alone: it has the label %s, but is not called <service>%s",
            metadata["namespace"],
            name,
            SELECTOR,
            SUFFIX,
        )
        return None
    return f"{metadata['namespace']}/{name.removesuffix(SUFFIX)}"


def _without(table: RouteTable, models: set[str]) -> RouteTable:
    if not models:
        return table
    return table.model_copy(update={"models": tuple(m for m in table.models if m not in models)})
