"""`shoal get`: lists of services and pods."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from shoal.cli.errors import CliError, UsageError
from shoal.cli.options import store_option
from shoal.cli.output import RESOURCE, as_list, format_data, format_table, output_option
from shoal.cli.view import (
    POD_COLUMNS,
    POD_COLUMNS_WIDE,
    SERVICE_COLUMNS,
    SERVICE_COLUMNS_WIDE,
    pod_cells,
    pod_document,
    service_cells,
    service_documents,
)

if TYPE_CHECKING:
    from shoal.operator.local.store import Store

_KINDS = {
    "infs": "services",
    "inferenceservice": "services",
    "inferenceservices": "services",
    RESOURCE: "services",
    "po": "pods",
    "pod": "pods",
    "pods": "pods",
    "all": "all",
}
_WATCH_SECONDS = 0.3


@dataclass(frozen=True, slots=True)
class Listing:
    """What was found of one kind: a row for the table and a document for programs, each."""

    prefix: str  # of a name in `-o name`
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    documents: Sequence[dict[str, Any]]


@click.command()
@click.argument("resource", default="infs")
@click.argument("name", required=False)
@click.option("-l", "--service", help="Only pods of this service.")
@output_option("wide", "json", "yaml", "name")
@click.option("-w", "--watch", is_flag=True, help="Then print every change, until Ctrl-C.")
@store_option()
def command(
    resource: str,
    name: str | None,
    service: str | None,
    output: str | None,
    watch: bool,
    store: "Store",
) -> None:
    """List services (infs), pods, or all; or only NAME of them.

    RESOURCE is infs (the default), pods or all; infs/NAME works too.
    """
    kind, name = _parse(resource, name)

    def look() -> list[Listing]:
        return _listings(store, kind, name, service, wide=output == "wide")

    found = look()
    if name is not None and not any(listing.documents for listing in found):
        raise CliError(_not_found(store, kind, name))
    _print(found, output, one=name is not None)
    if watch:
        _watch(found, look, output)


def _parse(resource: str, name: str | None) -> tuple[str, str | None]:
    kind, slash, rest = resource.partition("/")
    if kind.lower() not in _KINDS:
        raise UsageError(
            f"unknown resource {kind!r}; write infs, pods or all, as in: shoal get infs {kind}"
        )
    return _KINDS[kind.lower()], rest if slash else name


def _listings(
    store: "Store", kind: str, name: str | None, service: str | None, *, wide: bool
) -> list[Listing]:
    now = time.time()
    listings = []
    if kind != "pods":
        documents = service_documents(store, name)
        rows = [service_cells(document, now, wide=wide) for document in documents]
        columns = SERVICE_COLUMNS_WIDE if wide else SERVICE_COLUMNS
        listings.append(Listing(RESOURCE, columns, rows, documents))
    if kind != "services":
        pods = [pod for pod in store.pods(service) if name in (None, pod.name)]
        rows = [pod_cells(pod, now, wide=wide) for pod in pods]
        pod_columns = POD_COLUMNS_WIDE if wide else POD_COLUMNS
        listings.append(Listing("pod", pod_columns, rows, [pod_document(pod) for pod in pods]))
    return listings


def _not_found(store: "Store", kind: str, name: str) -> str:
    names = [document["metadata"]["name"] for document in service_documents(store)]
    if kind == "pods":
        names = [pod.name for pod in store.pods()]
    what = RESOURCE if kind == "services" else "pod" if kind == "pods" else "resource"
    return f'{what} "{name}" not found; there are: {", ".join(names) or "none"}'


def _print(listings: Sequence[Listing], output: str | None, *, one: bool) -> None:
    documents = [document for listing in listings for document in listing.documents]
    if output in ("json", "yaml"):
        single = one and len(documents) == 1
        click.echo(format_data(documents[0] if single else as_list(documents), output))
        return
    if output == "name":
        for listing in listings:
            for row in listing.rows:
                click.echo(f"{listing.prefix}/{row[0]}")
        return
    filled = [listing for listing in listings if listing.rows]
    if not filled:
        click.echo("Nothing found. Start with: shoal up -f service.yaml", err=True)
    click.echo(
        "\n\n".join(format_table(listing.columns, listing.rows) for listing in filled),
        nl=bool(filled),
    )


def _watch(shown: Sequence[Listing], look: Callable[[], list[Listing]], output: str | None) -> None:
    """Prints what differs from `shown`, for ever; an age that moves on is no change."""
    before = _by_name(shown)
    while True:
        time.sleep(_WATCH_SECONDS)
        listings = look()
        after = _by_name(listings)
        for listing in listings:
            for row, document in zip(listing.rows, listing.documents, strict=True):
                key = (listing.prefix, row[0])
                if before.get(key) == after[key]:
                    continue
                if output in ("json", "yaml"):
                    separator = "---\n" if output == "yaml" else ""
                    click.echo(separator + format_data(document, output))
                elif output == "name":
                    click.echo("/".join(key))
                else:
                    click.echo(_aligned(row, listing))
        for prefix, name in before.keys() - after.keys():
            click.echo(f"{prefix}/{name} deleted", err=True)
        before = after


def _aligned(row: Sequence[str], listing: Listing) -> str:
    """The row as it stands in its table, without the header."""
    lines = format_table(listing.columns, listing.rows).splitlines()
    return lines[1 + [other[0] for other in listing.rows].index(row[0])]


def _by_name(listings: Sequence[Listing]) -> dict[tuple[str, str], tuple[str, ...]]:
    return {
        (listing.prefix, row[0]): tuple(
            cell for column, cell in zip(listing.columns, row, strict=True) if column != "age"
        )
        for listing in listings
        for row in listing.rows
    }
