"""`shoal wait`: for scripts that go on when a service is ready, or gone."""

import click

from shoal.cli.backend import Backend
from shoal.cli.options import timeout_option
from shoal.cli.output import RESOURCE
from shoal.cli.target import complete_services, target_options
from shoal.cli.waiting import Goal, GoalType, wait_condition, wait_gone


@click.command()
@click.argument("names", nargs=-1, required=True, shell_complete=complete_services)
@click.option(
    "--for",
    "goal",
    type=GoalType(),
    default="condition=Ready",
    show_default=True,
    help="condition=TYPE, condition=TYPE=STATUS, or delete.",
)
@timeout_option("5m")
@target_options()
def command(names: tuple[str, ...], goal: Goal, timeout: float, backend: Backend) -> None:
    """Wait until the services NAMES meet a condition, or are gone."""
    for name in names:
        if goal.condition is None:
            wait_gone(backend, name, timeout)
            click.echo(f"{RESOURCE}/{name} deleted")
        else:
            wait_condition(backend, name, goal.condition, goal.status, timeout)
            click.echo(f"{RESOURCE}/{name} condition met")
