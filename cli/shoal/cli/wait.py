"""`shoal wait`: for scripts that go on when a service is ready, or gone."""

from typing import TYPE_CHECKING

import click

from shoal.cli.options import complete_services, store_option, timeout_option
from shoal.cli.output import RESOURCE
from shoal.cli.waiting import Goal, GoalType, wait_condition, wait_gone

if TYPE_CHECKING:
    from shoal.operator.local.store import Store


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
@store_option()
def command(names: tuple[str, ...], goal: Goal, timeout: float, store: "Store") -> None:
    """Wait until the services NAMES meet a condition, or are gone."""
    for name in names:
        if goal.condition is None:
            wait_gone(store, name, timeout)
            click.echo(f"{RESOURCE}/{name} deleted")
        else:
            wait_condition(store, name, goal.condition, goal.status, timeout)
            click.echo(f"{RESOURCE}/{name} condition met")
