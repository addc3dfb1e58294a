"""`shoal top`: the load of services and replicas, as the routers see it."""

import time

import click

from shoal.cli.backend import Backend, not_found
from shoal.cli.errors import CliError
from shoal.cli.output import format_data, format_table, output_option
from shoal.cli.target import complete_services, target_options

_WATCH_SECONDS = 2.0


@click.command()
@click.argument("name", required=False, shell_complete=complete_services)
@click.option("-w", "--watch", is_flag=True, help="Look again every 2 s, until Ctrl-C.")
@output_option("json", "yaml")
@target_options(everywhere=True)
def command(name: str | None, watch: bool, output: str | None, backend: Backend) -> None:
    """Show the load of all services, or of NAME alone.

    Running and queued are requests under way; KV is the share of the cache in use; latencies
    are of the last minute, the slowest router's. In a cluster this asks every router pod through
    the API server, which needs the right to create pods/portforward.
    """
    wanted = name.rpartition("/")[2] if name else None
    before: dict[str, int] = {}
    looked_at = 0.0
    while True:
        before, looked_at = _show(backend, wanted, output, before, looked_at)
        if not watch:
            return
        time.sleep(_WATCH_SECONDS)
        click.clear()


def _show(
    backend: Backend,
    wanted: str | None,
    output: str | None,
    before: dict[str, int],
    looked_at: float,
) -> tuple[dict[str, int], float]:
    """Prints one look; returns arrivals by service and when they were read."""
    from shoal.cli.load_view import (
        REPLICA_COLUMNS,
        SERVICE_COLUMNS,
        document,
        replica_cells,
        service_cells,
        tops,
    )

    loads, silent = backend.loads()
    now = time.monotonic()
    for sentence in silent:
        click.echo(f"Warning: {sentence}", err=True)
    services, replicas = tops(loads, backend.service_name)
    if wanted is not None:
        services = [top for top in services if top.name.rpartition("/")[2] == wanted]
        replicas = [top for top in replicas if top.service.rpartition("/")[2] == wanted]
        if not services:
            raise CliError(_unknown(backend, wanted))
    if output is not None:
        click.echo(format_data(document(services, replicas, len(loads)), output))
    elif not services:
        click.echo(f"No router knows a service of {backend.where}", err=True)
    else:
        rows = []
        for top in services:
            new = top.arrivals - before.get(top.name, top.arrivals)
            # Arrivals fall where a router started anew in between.
            rate = None if top.name not in before else max(0, new) / (now - looked_at)
            rows.append(service_cells(top, rate))
        click.echo(format_table(SERVICE_COLUMNS, rows))
        if replicas:
            click.echo()
            click.echo(format_table(REPLICA_COLUMNS, [replica_cells(top) for top in replicas]))
    return {top.name: top.arrivals for top in services}, now


def _unknown(backend: Backend, name: str) -> str:
    if backend.services(name):
        return f"no router knows the service {name} yet; `shoal describe {name}` says why"
    return not_found(backend, name)
