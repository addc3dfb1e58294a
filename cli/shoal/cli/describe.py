"""`shoal describe`: everything about one service, for people."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from shoal.cli.errors import CliError
from shoal.cli.options import complete_services, store_option
from shoal.cli.output import as_list, format_data, format_table, output_option
from shoal.cli.view import (
    POD_COLUMNS_WIDE,
    age_of,
    pod_cells,
    pod_document,
    service_documents,
)

if TYPE_CHECKING:
    from shoal.operator.local.store import Store


@click.command()
@click.argument("name", shell_complete=complete_services)
@output_option("json", "yaml")
@store_option()
def command(name: str, output: str | None, store: "Store") -> None:
    """Show the spec, the conditions and the pods of service NAME."""
    name = name.rpartition("/")[2]
    documents = service_documents(store, name)
    if not documents:
        from shoal.operator.local.store import UnknownService

        known = [document["metadata"]["name"] for document in service_documents(store)]
        raise CliError(str(UnknownService(name, known)))
    pods = store.pods(name)
    if output is not None:
        click.echo(format_data(as_list([documents[0], *map(pod_document, pods)]), output))
        return
    now = time.time()
    click.echo(_head(documents[0], now))
    click.echo("Conditions:")
    click.echo(_indented(_conditions(documents[0].get("status") or {}, now)))
    click.echo("Pods:")
    rows = [pod_cells(pod, now, wide=True) for pod in pods]
    click.echo(_indented(format_table(POD_COLUMNS_WIDE, rows) if rows else "none"))
    for pod in pods:
        if pod.message:
            click.echo(f"  {pod.name}: {pod.message}")
    if store.supervisor() is None:
        click.echo(f"Nothing serves from {store.root}; start it with: shoal up", err=True)


def _head(document: Mapping[str, Any], now: float) -> str:
    metadata, spec = document["metadata"], document["spec"]
    status = document.get("status") or {}
    ready, routable = status.get("readyReplicas", 0), status.get("routableReplicas", 0)
    lines = [
        ("Name", metadata["name"]),
        ("Generation", str(metadata.get("generation", ""))),
        ("Age", age_of(metadata.get("creationTimestamp"), now)),
        ("URL", status.get("url") or "none yet"),
        ("Revision", status.get("activeRevision") or "none yet"),
        ("Replicas", f"{spec['replicas']} wanted, {ready} ready, {routable} taking requests"),
    ]
    text = "\n".join(f"{key + ':':<12}{value}" for key, value in lines)
    return f"{text}\nSpec:\n{_indented(format_data(spec, 'yaml'))}"


def _conditions(status: Mapping[str, Any], now: float) -> str:
    conditions = status.get("conditions") or []
    if not conditions:
        return "none yet"
    rows = [
        [
            condition.get("type", ""),
            condition.get("status", ""),
            condition.get("reason", ""),
            age_of(condition.get("lastTransitionTime"), now),
            condition.get("message", ""),
        ]
        for condition in conditions
    ]
    return format_table(("type", "status", "reason", "since", "message"), rows)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
