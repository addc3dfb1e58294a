"""`shoal scale`: changes the number of replicas."""

import click

from shoal.cli.apply import warn_if_asleep
from shoal.cli.backend import Backend
from shoal.cli.errors import CliError
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

    New replicas take requests once they are ready; one that goes is drained first. Of a service
    with autoscaling only 0 can be set, which switches it off, and 1, which switches it on again.
    """
    _refuse_where_load_decides(backend, name, replicas)
    result = backend.scale(name, replicas)
    click.echo(f"{RESOURCE}/{name} {'scaled' if result == 'configured' else result}")
    if wait:
        wait_scaled(backend, name, replicas, timeout)
    else:
        warn_if_asleep(backend)


def _refuse_where_load_decides(backend: Backend, name: str, replicas: int) -> None:
    """A number that the autoscaler would not look at is not written."""
    documents = backend.services(name.rpartition("/")[2])
    spec = documents[0]["spec"] if documents else {}
    scaling = spec.get("autoscaling")
    # From 0 any number hands the service back to the autoscaler.
    off = spec.get("replicas") == 0
    if scaling is None or off or (not replicas and scaling.get("minReplicas", 1)):
        return
    raise CliError(
        f"{name}: spec.autoscaling decides the number of replicas; "
        "change its minReplicas and maxReplicas in the YAML, and apply it"
    )
