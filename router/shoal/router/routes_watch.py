"""The directory of route tables: `<service>.json`, written by the operator alone.

Writers replace a file by renaming, so a file is read whole or not at all. What cannot be read
is logged once and the last good table stays: a router serves what it knows.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import ValidationError

from shoal.api.routes import RouteTable

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2

_Stamp = tuple[int, int, int]  # modified, size, inode


class RoutesWatch:
    """Polls the directory; `on_change` gets all tables by service after every change."""

    def __init__(
        self, directory: Path, on_change: Callable[[Mapping[str, RouteTable]], None]
    ) -> None:
        self._directory = directory
        self._on_change = on_change
        self._stamps: dict[str, _Stamp] = {}
        self._tables: dict[str, RouteTable] = {}
        self._first = True

    async def run(self) -> None:
        """Never returns."""
        while True:
            self.scan()
            await asyncio.sleep(POLL_SECONDS)

    def scan(self) -> None:
        """Reads what has changed. The first scan always reports, also an empty directory."""
        stamps = self._look()
        changed = self._first
        self._first = False
        for service in [name for name in self._stamps if name not in stamps]:
            changed |= self._tables.pop(service, None) is not None
        for service, stamp in stamps.items():
            if self._stamps.get(service) != stamp:
                table = self._read(service)
                if table is not None:
                    changed |= self._tables.get(service) != table
                    self._tables[service] = table
        self._stamps = stamps
        if changed:
            self._on_change(dict(self._tables))

    def _look(self) -> dict[str, _Stamp]:
        stamps = {}
        try:
            with os.scandir(self._directory) as entries:
                for entry in entries:
                    if entry.name.endswith(".json") and not entry.name.startswith("."):
                        found = entry.stat()
                        stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
                        stamps[entry.name.removesuffix(".json")] = stamp
        except FileNotFoundError:
            # The directory is not there yet, or a file went while we looked: the next scan tells.
            return stamps if not self._directory.is_dir() else self._stamps
        except OSError as error:
            log.error("routes in %s cannot be listed: %s", self._directory, error)
            return self._stamps
        return stamps

    def _read(self, service: str) -> RouteTable | None:
        path = self._directory / f"{service}.json"
        try:
            table = RouteTable.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            log.error("%s is not used, the last good table stays: %s", path, error)
            return None
        if table.service != service:
            log.error("%s is not used: it names the service %s", path, table.service)
            return None
        return table
