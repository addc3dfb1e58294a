"""`shoal apply`: makes YAML files the desired state."""

from typing import TYPE_CHECKING

import click

from shoal.cli.options import file_option, store_option
from shoal.cli.output import RESOURCE, as_list, format_data, output_option

if TYPE_CHECKING:
    from shoal.operator.local.store import Store


@click.command()
@file_option()
@output_option("json", "yaml", "name")
@store_option()
def command(filenames: tuple[str, ...], output: str | None, store: "Store") -> None:
    """Create services from YAML files, or change those that exist.

    A running `shoal up` acts on the change at once. All files are checked before any is
    applied, so a mistake in one changes nothing.
    """
    from shoal.api.types import to_document
    from shoal.cli.manifests import load
    from shoal.operator.unsupported import unsupported

    services = load(filenames)
    results = [(service.metadata.name, store.apply(service)) for service in services]
    if output in ("json", "yaml"):
        applied = [store.get(name) for name, _ in results]
        documents = [to_document(service) for service in applied if service is not None]
        data = documents[0] if len(documents) == 1 else as_list(documents)
        click.echo(format_data(data, output))
    else:
        for name, result in results:
            click.echo(f"{RESOURCE}/{name}" + ("" if output == "name" else f" {result}"))
    for service in services:
        for sentence in unsupported(service.spec):
            click.echo(f"Warning: {service.metadata.name}: {sentence}", err=True)
    warn_if_nothing_runs(store)


def warn_if_nothing_runs(store: "Store") -> None:
    """Says on standard error that the desired state is only written down, if so."""
    if store.supervisor() is None:
        click.echo(f"Nothing serves from {store.root}; start it with: shoal up", err=True)
