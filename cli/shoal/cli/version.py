"""`shoal version`."""

import platform
from importlib.metadata import version

import click

from shoal.api.names import API_VERSION
from shoal.cli.output import format_data, output_option


@click.command()
@output_option("json", "yaml")
def command(output: str | None) -> None:
    """Print the version of Shoal, of its API and of Python."""
    facts = {
        "version": version("shoal"),
        "apiVersion": API_VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
    }
    if output is None:
        click.echo(f"shoal {facts['version']} ({API_VERSION}, Python {facts['python']})")
    else:
        click.echo(format_data(facts, output))
