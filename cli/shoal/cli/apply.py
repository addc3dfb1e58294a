"""`shoal apply`: makes YAML files the desired state."""

import click

from shoal.cli.backend import Backend
from shoal.cli.options import file_option
from shoal.cli.output import RESOURCE, as_list, format_data, output_option
from shoal.cli.target import target_options


@click.command()
@file_option()
@output_option("json", "yaml", "name")
@target_options()
def command(filenames: tuple[str, ...], output: str | None, backend: Backend) -> None:
    """Create services from YAML files, or change those that exist.

    A running `shoal up`, or the operator of a cluster, acts on the change at once. All files are
    checked before any is applied, so a mistake in one changes nothing.
    """
    services = backend.load(filenames)
    results = [(backend.key(service), backend.apply(service)) for service in services]
    if output in ("json", "yaml"):
        documents = [document for name, _ in results for document in backend.services(name)]
        data = documents[0] if len(documents) == 1 else as_list(documents)
        click.echo(format_data(data, output))
    else:
        for name, result in results:
            click.echo(f"{RESOURCE}/{name}" + ("" if output == "name" else f" {result}"))
    for service in services:
        for sentence in backend.warnings(service.spec):
            click.echo(f"Warning: {service.metadata.name}: {sentence}", err=True)
    warn_if_asleep(backend)


def warn_if_asleep(backend: Backend) -> None:
    """Says on standard error that the desired state is only written down, if so."""
    if why := backend.asleep():
        click.echo(f"{why[:1].upper()}{why[1:]}", err=True)
