"""Runs the supervisor in the foreground: what `shoal up` and `shoal serve` share."""

import asyncio
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from shoal.api.lifeline import watch_lifeline
from shoal.api.names import PORT_ROUTER_GRPC, PORT_ROUTER_HTTP
from shoal.cli.errors import CliError, UsageError

if TYPE_CHECKING:
    from shoal.api.types import InferenceService
    from shoal.cli.display import Display
    from shoal.operator.local.settings import SupervisorSettings
    from shoal.operator.local.store import Store

_REFRESH_SECONDS = 0.25
_WATCH_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class ServeAt:
    """Where the router listens; port 0 is any free one."""

    host: str
    port: int
    grpc_port: int


def listen_options() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--host`, `--port` and `--grpc-port`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        port = click.IntRange(0, 65535)
        for option in (
            click.option(
                "--grpc-port",
                type=port,
                default=PORT_ROUTER_GRPC,
                show_default=True,
                help="Port of the gRPC API; 0: any free one.",
            ),
            click.option(
                "--port",
                type=port,
                default=PORT_ROUTER_HTTP,
                show_default=True,
                help="Port of the OpenAI API; 0: any free one.",
            ),
            click.option(
                "--host",
                default="127.0.0.1",
                show_default=True,
                help="Address to listen on; 0.0.0.0 lets other machines in.",
            ),
        ):
            function = option(function)
        return function

    return decorate


def run(
    store: "Store",
    services: Sequence["InferenceService"],
    at: ServeAt,
    *,
    watched: Sequence[str] = (),
) -> None:
    """Serves `services` and what is in the store already until a signal; ends the process.

    `watched` are file names to apply again when they change. Services that this run created
    leave the store with it; those that `shoal apply` put there stay.
    """
    from shoal.cli.display import make_display
    from shoal.operator.local.settings import SupervisorSettings

    watch_lifeline()
    refuse_if_hopeless(services)
    settings = SupervisorSettings(host=at.host, http_port=at.port, grpc_port=at.grpc_port)
    with make_display(store, tty=sys.stdout.isatty()) as display:
        given = Given(store, services, display.note)
        code = asyncio.run(_supervise(store, settings, display, given, watched))
    click.get_current_context().exit(code)


class Given:
    """The services of the command line: in the store while entered, unless they were before."""

    def __init__(
        self, store: "Store", services: Sequence["InferenceService"], note: Callable[[str], None]
    ) -> None:
        self._store = store
        self._services = services
        self._note = note
        self._created: set[str] = set()

    def __enter__(self) -> None:
        given = {service.name for service in self._services}
        for name in self._store.read_services()[0].keys() - given:
            self._note(f"{name}: in the state directory from before, served too")
        for service in self._services:
            self._apply(service)

    def __exit__(self, *error: object) -> None:
        for name in self._created:
            self._store.delete(name)

    def change(self, services: Sequence["InferenceService"]) -> None:
        """They are these now: applied, and those that are no longer among them deleted."""
        for service in services:
            self._note(f"{service.name}: {self._apply(service)}")
        for name in {old.name for old in self._services} - {new.name for new in services}:
            self._store.delete(name)
            self._note(f"{name}: no longer in the files, deleted")
        self._services = services

    def _apply(self, service: "InferenceService") -> str:
        result = self._store.apply(service)
        if result == "created":
            self._created.add(service.name)
        return result


def refuse_if_hopeless(services: Sequence["InferenceService"]) -> None:
    """Raises where every service asks for what this release does not have; with one that can be
    served, the others get a condition that says so."""
    from shoal.operator.unsupported import unsupported

    missing = {service.metadata.name: unsupported(service.spec) for service in services}
    if services and all(missing.values()):
        lines = [f"{name}: {sentence}" for name, all_ in missing.items() for sentence in all_]
        raise UsageError("\n".join(lines))


async def _supervise(
    store: "Store",
    settings: "SupervisorSettings",
    display: "Display",
    given: Given,
    watched: Sequence[str],
) -> int:
    from shoal.operator.local.supervisor import supervise

    beside = [asyncio.create_task(_refresh(display))]
    if watched:
        beside.append(asyncio.create_task(_apply_edits(given, watched, display)))
    try:
        return await supervise(store, settings, on_update=display.update, meanwhile=given)
    finally:
        for task in beside:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        _show(display)


async def _refresh(display: "Display") -> None:
    while True:
        _show(display)
        await asyncio.sleep(_REFRESH_SECONDS)


def _show(display: "Display") -> None:
    with suppress(OSError):  # nobody reads (a closed pipe), or a file changes: another look helps
        display.refresh()


async def _apply_edits(given: Given, watched: Sequence[str], display: "Display") -> None:
    """Applies the files whenever they change; a service that leaves them is deleted.

    A file with a mistake changes nothing: the problems are shown, the last good state stays.
    """
    from shoal.api.types import InvalidManifest
    from shoal.cli.manifests import load

    signature = _signature(watched)
    while True:
        await asyncio.sleep(_WATCH_SECONDS)
        current = _signature(watched)
        if current == signature:
            continue
        signature = current
        try:
            services = load(watched)
        except (CliError, OSError) as error:
            display.note(f"{error}\nNothing is changed.")
            continue
        try:
            given.change(services)
        except (InvalidManifest, OSError) as error:
            display.note(f"{error}\nSave the file again once that is mended.")


def _signature(watched: Sequence[str]) -> list[tuple[str, int, int]]:
    from shoal.cli.manifests import watched_paths

    found = []
    with suppress(FileNotFoundError):  # a folder; `load` says so
        for path in watched_paths(watched):
            with suppress(FileNotFoundError):
                stat = path.stat()
                found.append((str(path), stat.st_mtime_ns, stat.st_size))
    return found
