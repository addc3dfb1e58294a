"""`shoal plan`: what a YAML file would create, by the operator's own planner."""

import shlex
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from shoal.cli.errors import CliError
from shoal.cli.options import file_option
from shoal.cli.output import format_data, output_option

if TYPE_CHECKING:
    from shoal.operator.actions import Action


@click.command()
@file_option()
@click.option(
    "--platform",
    type=click.Choice(["local", "kubernetes"]),
    default="local",
    show_default=True,
    help="Processes of this machine, or pods of a cluster whose operator has no settings of "
    "its own.",
)
@output_option("json", "yaml")
def command(filenames: tuple[str, ...], platform: str, output: str | None) -> None:
    """Print what the services of YAML files would create where nothing runs yet.

    Nothing is created. A service that asks for what this release does not have ends the
    command with exit code 1, after all plans are printed.
    """
    from shoal.cli.manifests import load
    from shoal.operator.observe import Observed
    from shoal.operator.plan import plan, refusals_of
    from shoal.operator.platform import KUBERNETES, LOCAL
    from shoal.operator.revision import revision_of

    target = KUBERNETES if platform == "kubernetes" else LOCAL
    plans = []
    for service in load(filenames):
        refusals = [refusal.message for refusal in refusals_of(service, Observed(), target)]
        actions = plan(service, Observed(), time.time(), target).actions
        plans.append(
            {
                "service": service.metadata.name,
                "revision": revision_of(service.spec),
                "models": list(service.model_ids),
                "replicas": service.spec.replicas,
                "refusals": refusals,
                "actions": [_as_data(action) for action in actions],
            }
        )
    if output is not None:
        click.echo(format_data({"plans": plans}, output))
    else:
        click.echo("\n".join(_as_text(found) for found in plans))
    refused = [found["service"] for found in plans if found["refusals"]]
    if refused:
        raise CliError(f"cannot be served by this release: {', '.join(map(str, refused))}")


def _as_data(action: "Action") -> dict[str, Any]:
    from shoal.operator.actions import CreatePod, SaveRevision, WriteRoutes

    kind = type(action).__name__
    match action:
        case CreatePod(pod):
            return {"action": kind, "name": pod.name, "manifest": pod.manifest}
        case WriteRoutes(table):
            return {"action": kind, "table": table.model_dump(mode="json")}
        case SaveRevision(revision):
            return {"action": kind, "name": revision.name}
    return {"action": kind, **asdict(action)}


def _as_text(found: dict[str, Any]) -> str:
    models = ", ".join(found["models"])
    lines = [f"{found['service']}: revision {found['revision']}, serves the model {models}"]
    lines += [f"  refused: {message}" for message in found["refusals"]]
    for action in found["actions"]:
        if action["action"] == "CreatePod":
            container = action["manifest"]["spec"]["containers"][0]
            lines.append(f"  pod {action['name']}")
            lines.append(f"    {shlex.join([*container['command'], *container['args']])}")
            for kind, amount in (container.get("resources") or {}).items():
                amounts = ", ".join(f"{name} {value}" for name, value in amount.items())
                lines.append(f"    {kind}: {amounts}")
    return "\n".join(lines)
