"""`shoal scale`: changes the number of replicas."""

import click

from shoal.cli.apply import warn_if_asleep
from shoal.cli.backend import Backend
from shoal.cli.options import timeout_option
from shoal.cli.output import RESOURCE
from shoal.cli.target import complete_services, target_options
from shoal.cli.waiting import wait_scaled


@click.command()
@click.argument("name", shell_complete=complete_services)
@click.argument("replicas", type=click.IntRange(min=0))
@click.option("--wait", is_flag=True, help="Wait until exactly so many replicas take requests.")
@timeout_option("5m")
@target_options()
def command(name: str, replicas: int, wait: bool, timeout: float, backend: Backend) -> None:
    """Set the number of replicas of service NAME to REPLICAS.

    New replicas take requests once they are ready; one that goes is drained first.
    """
    result = backend.scale(name, replicas)
    click.echo(f"{RESOURCE}/{name} {'scaled' if result == 'configured' else result}")
    if wait:
        wait_scaled(backend, name, replicas, timeout)
    else:
        warn_if_asleep(backend)
