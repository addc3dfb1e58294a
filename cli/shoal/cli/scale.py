"""`shoal scale`: changes the number of replicas."""

from typing import TYPE_CHECKING

import click

from shoal.cli.apply import warn_if_nothing_runs
from shoal.cli.options import complete_services, store_option, timeout_option
from shoal.cli.output import RESOURCE
from shoal.cli.waiting import wait_scaled

if TYPE_CHECKING:
    from shoal.operator.local.store import Store


@click.command()
@click.argument("name", shell_complete=complete_services)
@click.argument("replicas", type=click.IntRange(min=0))
@click.option("--wait", is_flag=True, help="Wait until exactly so many replicas take requests.")
@timeout_option("5m")
@store_option()
def command(name: str, replicas: int, wait: bool, timeout: float, store: "Store") -> None:
    """Set the number of replicas of service NAME to REPLICAS.

    New replicas take requests once they are ready; one that goes is drained first.
    """
    result = store.scale(name, replicas)
    click.echo(f"{RESOURCE}/{name} {'scaled' if result == 'configured' else result}")
    if wait:
        wait_scaled(store, name, replicas, timeout)
    else:
        warn_if_nothing_runs(store)
