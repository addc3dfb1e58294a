"""`shoal delete`: removes services, and waits until their pods are drained and gone."""

import functools

import click

from shoal.cli.backend import Backend
from shoal.cli.errors import CliError, UsageError
from shoal.cli.options import file_option, timeout_option
from shoal.cli.output import RESOURCE
from shoal.cli.target import complete_services, target_options


@click.command()
@click.argument("names", nargs=-1, shell_complete=complete_services)
@file_option(required=False)
@click.option("--all", "everything", is_flag=True, help="Delete every service.")
@click.option("--ignore-not-found", is_flag=True, help="A service that is not there is no error.")
@click.option("--wait/--no-wait", default=True, help="Wait until all pods are gone (default).")
@timeout_option("5m")
@target_options()
def command(
    names: tuple[str, ...],
    filenames: tuple[str, ...],
    everything: bool,
    ignore_not_found: bool,
    wait: bool,
    timeout: float,
    backend: Backend,
) -> None:
    """Drain and remove services, by name or by the files that describe them."""
    wanted = _wanted(names, filenames, everything, backend)
    missing = [name for name in wanted if not backend.delete(name)]
    deleted = [name for name in wanted if name not in missing]
    for name in deleted:
        click.echo(f'{RESOURCE} "{name}" deleted')
    if wait and backend.asleep() is None:
        for name in deleted:
            if not backend.wait(functools.partial(backend.gone, name), timeout):
                raise CliError(
                    f'"{name}" still drains after {timeout:g} s; '
                    f"`shoal get pods` shows what is left of it"
                )
    if missing and not ignore_not_found:
        known = ", ".join(_names(backend)) or "none"
        raise CliError(
            "\n".join(f'{RESOURCE} "{name}" not found' for name in missing)
            + f"\nServices left: {known}"
        )


def _wanted(
    names: tuple[str, ...], filenames: tuple[str, ...], everything: bool, backend: Backend
) -> list[str]:
    if sum((bool(names), bool(filenames), everything)) != 1:
        raise UsageError("name the services to delete, or give -f FILE, or --all")
    if everything:
        return _names(backend)
    if filenames:
        return [backend.key(service) for service in backend.load(filenames)]
    return [name.rpartition("/")[2] for name in dict.fromkeys(names)]


def _names(backend: Backend) -> list[str]:
    return [document["metadata"]["name"] for document in backend.services()]
