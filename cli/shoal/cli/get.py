"""`shoal get`: lists of services and pods."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import click

from shoal.cli.backend import Backend, Document, not_found
from shoal.cli.errors import CliError, UsageError
from shoal.cli.output import RESOURCE, as_list, format_data, format_table, output_option
from shoal.cli.target import target_options
from shoal.cli.view import (
    SERVICE_COLUMNS,
    SERVICE_COLUMNS_WIDE,
    pod_cells,
    pod_columns,
    service_cells,
)

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


@dataclass(frozen=True, slots=True)
class Listing:
    """What was found of one kind: a row for the table and a document for programs, each."""

    prefix: str  # of a name in `-o name`
    columns: Sequence[str]
    names: Sequence[str]
    rows: Sequence[Sequence[str]]
    documents: Sequence[Document]


@click.command()
@click.argument("resource", default="infs")
@click.argument("name", required=False)
@click.option("-l", "--service", help="Only pods of this service.")
@output_option("wide", "json", "yaml", "name")
@click.option("-w", "--watch", is_flag=True, help="Then print every change, until Ctrl-C.")
@target_options(everywhere=True)
def command(
    resource: str,
    name: str | None,
    service: str | None,
    output: str | None,
    watch: bool,
    backend: Backend,
) -> None:
    """List services (infs), pods, or all; or only NAME of them.

    RESOURCE is infs (the default), pods or all; infs/NAME works too.
    """
    kind, name = _parse(resource, name)

    def look() -> list[Listing]:
        return _listings(backend, kind, name, service, wide=output == "wide")

    found = look()
    if name is not None and not any(listing.documents for listing in found):
        raise CliError(_not_found(backend, kind, name))
    _print(found, output, backend, one=name is not None)
    if watch:
        _watch(found, look, output, backend.poll_seconds)


def _parse(resource: str, name: str | None) -> tuple[str, str | None]:
    kind, slash, rest = resource.partition("/")
    if kind.lower() not in _KINDS:
        raise UsageError(
            f"unknown resource {kind!r}; write infs, pods or all, as in: shoal get infs {kind}"
        )
    return _KINDS[kind.lower()], rest if slash else name


def _listings(
    backend: Backend, kind: str, name: str | None, service: str | None, *, wide: bool
) -> list[Listing]:
    now = time.time()
    listings = []
    if kind != "pods":
        documents = backend.services(name)
        spaces = [document["metadata"].get("namespace", "") for document in documents]
        listings.append(
            _listing(
                backend,
                RESOURCE,
                SERVICE_COLUMNS_WIDE if wide else SERVICE_COLUMNS,
                spaces,
                [service_cells(document, now, wide=wide) for document in documents],
                documents,
            )
        )
    if kind != "services":
        pods = [pod for pod in backend.pods(service) if name in (None, pod.name)]
        listings.append(
            _listing(
                backend,
                "pod",
                pod_columns(backend.place, wide=wide),
                [pod.namespace for pod in pods],
                [pod_cells(pod, now, wide=wide) for pod in pods],
                [pod.document for pod in pods],
            )
        )
    return listings


def _listing(
    backend: Backend,
    prefix: str,
    columns: Sequence[str],
    namespaces: Sequence[str],
    rows: Sequence[list[str]],
    documents: Sequence[Document],
) -> Listing:
    names = [row[0] for row in rows]
    if not backend.namespaced:
        return Listing(prefix, columns, names, rows, documents)
    located = [[space, *row] for space, row in zip(namespaces, rows, strict=True)]
    return Listing(prefix, ("namespace", *columns), names, located, documents)


def _not_found(backend: Backend, kind: str, name: str) -> str:
    if kind == "services":
        return not_found(backend, name)
    names = [pod.name for pod in backend.pods()]
    if kind == "all":
        names += [document["metadata"]["name"] for document in backend.services()]
    what = "pod" if kind == "pods" else "resource"
    known = ", ".join(names) or "none"
    return f'{what} "{name}" not found; there are: {known} (in {backend.where})'


def _print(listings: Sequence[Listing], output: str | None, backend: Backend, *, one: bool) -> None:
    documents = [document for listing in listings for document in listing.documents]
    if output in ("json", "yaml"):
        single = one and len(documents) == 1
        click.echo(format_data(documents[0] if single else as_list(documents), output))
        return
    if output == "name":
        for listing in listings:
            for name in listing.names:
                click.echo(f"{listing.prefix}/{name}")
        return
    filled = [listing for listing in listings if listing.rows]
    if not filled:
        click.echo(f"Nothing found in {backend.where}; {backend.hint}", err=True)
    click.echo(
        "\n\n".join(format_table(listing.columns, listing.rows) for listing in filled),
        nl=bool(filled),
    )


def _watch(
    shown: Sequence[Listing], look: Callable[[], list[Listing]], output: str | None, pause: float
) -> None:
    """Prints what differs from `shown`, for ever; an age that moves on is no change."""
    before = _by_name(shown)
    while True:
        time.sleep(pause)
        listings = look()
        after = _by_name(listings)
        for listing in listings:
            for place, document in enumerate(listing.documents):
                key = _key(listing, place)
                if before.get(key) == after[key]:
                    continue
                if output in ("json", "yaml"):
                    separator = "---\n" if output == "yaml" else ""
                    click.echo(separator + format_data(document, output))
                elif output == "name":
                    click.echo(f"{listing.prefix}/{listing.names[place]}")
                else:
                    click.echo(_aligned(place, listing))
        for prefix, *name in before.keys() - after.keys():
            click.echo(f"{prefix}/{'/'.join(filter(None, name))} deleted", err=True)
        before = after


def _aligned(place: int, listing: Listing) -> str:
    """The row as it stands in its table, without the header."""
    return format_table(listing.columns, listing.rows).splitlines()[1 + place]


def _key(listing: Listing, place: int) -> tuple[str, str, str]:
    """What tells one object from all others: prefix, namespace (where shown) and name."""
    row = listing.rows[place]
    namespace = row[0] if listing.columns[0] == "namespace" else ""
    return listing.prefix, namespace, listing.names[place]


def _by_name(listings: Sequence[Listing]) -> dict[tuple[str, str, str], tuple[str, ...]]:
    return {
        _key(listing, place): tuple(
            cell for column, cell in zip(listing.columns, row, strict=True) if column != "age"
        )
        for listing in listings
        for place, row in enumerate(listing.rows)
    }
