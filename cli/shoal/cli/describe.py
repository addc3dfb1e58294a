"""`shoal describe`: everything about one service, for people."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import click

from shoal.cli.apply import warn_if_asleep
from shoal.cli.backend import Backend, EventView, not_found
from shoal.cli.errors import CliError
from shoal.cli.output import as_list, format_age, format_data, format_table, output_option
from shoal.cli.target import complete_services, target_options
from shoal.cli.view import age_of, pod_cells, pod_columns


@click.command()
@click.argument("name", shell_complete=complete_services)
@output_option("json", "yaml")
@target_options()
def command(name: str, output: str | None, backend: Backend) -> None:
    """Show the spec, the conditions, the pods and the events of service NAME."""
    name = name.rpartition("/")[2]
    documents = backend.services(name)
    if not documents:
        raise CliError(not_found(backend, name))
    pods = backend.pods(name)
    if output is not None:
        items = [documents[0], *(pod.document for pod in pods)]
        click.echo(format_data(as_list(items), output))
        return
    now = time.time()
    click.echo(_head(documents[0], now))
    click.echo("Conditions:")
    click.echo(_indented(_conditions(documents[0].get("status") or {}, now)))
    click.echo("Pods:")
    rows = [pod_cells(pod, now, wide=True) for pod in pods]
    columns = pod_columns(backend.place, wide=True)
    click.echo(_indented(format_table(columns, rows) if rows else "none"))
    for pod in pods:
        if pod.message:
            click.echo(f"  {pod.name}: {pod.message}")
    if events := backend.events(name):
        click.echo("Events:")
        click.echo(_indented(_event_table(events, now)))
    warn_if_asleep(backend)


def _head(document: Mapping[str, Any], now: float) -> str:
    metadata, spec = document["metadata"], document["spec"]
    status = document.get("status") or {}
    wanted = (status.get("autoscaling") or {}).get("desired", spec.get("replicas", 1))
    ready, routable = status.get("readyReplicas", 0), status.get("routableReplicas", 0)
    lines = [
        ("Name", metadata["name"]),
        ("Generation", str(metadata.get("generation", ""))),
        ("Age", age_of(metadata.get("creationTimestamp"), now)),
        ("URL", status.get("url") or "none yet"),
        ("Revision", status.get("activeRevision") or "none yet"),
        (
            "Replicas",
            f"{wanted} wanted, {ready} ready, {routable} taking requests",
        ),
    ]
    if start := status.get("coldStart"):
        lines.append(("Last start", _start(start)))
    text = "\n".join(f"{key + ':':<12}{value}" for key, value in lines)
    return f"{text}\nSpec:\n{_indented(format_data(spec, 'yaml'))}"


def _start(start: Mapping[str, Any]) -> str:
    """Where the time went of the replica that was admitted last."""
    parts = ", ".join(f"{part['phase']} {part['seconds']:.1f}" for part in start.get("phases", ()))
    return f"{start['pod']} after {start['seconds']:.1f} s ({parts})"


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


def _event_table(events: Sequence[EventView], now: float) -> str:
    rows = [
        [
            event.kind,
            event.reason,
            format_age(now - event.last) + (f" (x{event.count})" if event.count > 1 else ""),
            event.subject,
            event.message.replace("\n", " "),
        ]
        for event in events
    ]
    return format_table(("type", "reason", "age", "object", "message"), rows)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
