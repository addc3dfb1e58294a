"""`shoal fetch`: downloads a model before anything serves it."""

import sys
import time
from pathlib import Path

import click

from shoal.cli.errors import CliError
from shoal.cli.output import format_data, output_option


@click.command()
@click.argument("uri")
@click.option("--revision", help="Version of a package, or branch, tag or commit of a hub model.")
@click.option(
    "--cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where downloads are kept. Default: $SHOAL_CACHE_DIR, else ~/.cache/shoal.",
)
@output_option("json", "yaml", "name")
def command(uri: str, revision: str | None, cache_dir: Path | None, output: str | None) -> None:
    """Download the model URI and print where it lies.

    URI is py://package, hf://org/name, file:///path or a plain path. A model that is there
    already is not downloaded again.
    """
    from shoal.worker.sources import SourceError, resolve

    progress = Progress()
    try:
        found = resolve(uri, revision, cache_dir, progress.show)
    except SourceError as error:
        raise CliError(str(error)) from error
    finally:
        progress.close()
    size = _size_of(found.path)
    if output == "name":
        click.echo(str(found.path))
    elif output is not None:
        facts = {"uri": found.uri, "revision": found.revision, "path": str(found.path)}
        click.echo(format_data({**facts, "bytes": size}, output))
    else:
        version = f" {found.revision}" if found.revision else ""
        click.echo(f"{found.uri}{version}: {size / 1e6:.0f} MB at {found.path}")


class Progress:
    """What the source is doing, on standard error: a bar on a terminal, else a line a step."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._last = ""
        self._bar = sys.stderr.isatty()

    def show(self, what: str, share: float | None) -> None:
        text = what if share is None else f"{what} {share:4.0%}"
        if self._bar:
            seconds = time.monotonic() - self._started
            click.echo(f"\r\x1b[2K{text} ({seconds:.0f} s)", nl=False, err=True)
        elif what != self._last:
            click.echo(text, err=True)
        self._last = what

    def close(self) -> None:
        if self._bar and self._last:
            click.echo("\r\x1b[2K", nl=False, err=True)


def _size_of(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(child.stat().st_size for child in path.rglob("*") if child.is_file())
