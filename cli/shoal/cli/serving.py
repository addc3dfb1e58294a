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

    `watched` are file names to apply again when they change. When the supervisor stops, the
    store forgets its services, so the next run serves only what it is given.
    """
    from shoal.cli.display import make_display
    from shoal.operator.local.settings import PortTaken, SupervisorSettings
    from shoal.operator.local.store import SupervisorRuns

    watch_lifeline()
    refuse_if_hopeless(services)
    running = store.supervisor()
    if running is not None:
        raise CliError(f"{SupervisorRuns(store.root, running)}\nOr add to it: shoal apply -f FILE")
    given = {service.metadata.name for service in services}
    left = [s.metadata.name for s in store.services() if s.metadata.name not in given]
    display = make_display(store, tty=sys.stdout.isatty())
    for name in left:
        display.note(f"{name}: in the state directory from before, served too")
    for service in services:
        store.apply(service)
    settings = SupervisorSettings(host=at.host, http_port=at.port, grpc_port=at.grpc_port)
    try:
        with display:
            code = asyncio.run(_supervise(store, settings, display, watched, given))
    except SupervisorRuns:
        raise
    except PortTaken as error:
        store.forget_services()
        raise CliError(str(error)) from error
    except BaseException:
        store.forget_services()
        raise
    store.forget_services()
    click.get_current_context().exit(code)


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
    watched: Sequence[str],
    names: set[str],
) -> int:
    from shoal.operator.local.supervisor import supervise

    beside = [asyncio.create_task(_refresh(display))]
    if watched:
        beside.append(asyncio.create_task(_apply_edits(store, watched, names, display)))
    try:
        return await supervise(store, settings, on_update=display.update)
    finally:
        for task in beside:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        display.refresh()


async def _refresh(display: "Display") -> None:
    while True:
        display.refresh()
        await asyncio.sleep(_REFRESH_SECONDS)


async def _apply_edits(
    store: "Store", watched: Sequence[str], names: set[str], display: "Display"
) -> None:
    """Applies the files whenever they change; a service that leaves them is deleted. `names`
    are those that were in them.

    A file with a mistake changes nothing: the problems are shown, the last good state stays.
    """
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
        except CliError as error:
            display.note(f"{error.message}\nNothing is changed.")
            continue
        for service in services:
            display.note(f"{service.metadata.name}: {store.apply(service)}")
        for name in names - {service.metadata.name for service in services}:
            store.delete(name)
            display.note(f"{name}: no longer in the files, deleted")
        names = {service.metadata.name for service in services}


def _signature(watched: Sequence[str]) -> list[tuple[str, int, int]]:
    from shoal.cli.manifests import watched_paths

    found = []
    for path in watched_paths(watched):
        with suppress(FileNotFoundError):
            stat = path.stat()
            found.append((str(path), stat.st_mtime_ns, stat.st_size))
    return found
