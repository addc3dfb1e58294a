"""`shoal rollback`: the way back to an earlier revision, and forward again."""

from collections.abc import Mapping
from typing import Any

import click

from shoal.cli.apply import warn_if_asleep
from shoal.cli.backend import Backend, not_found
from shoal.cli.errors import CliError
from shoal.cli.output import RESOURCE
from shoal.cli.target import complete_services, target_options


@click.command()
@click.argument("name", shell_complete=complete_services)
@click.option("--to", "revision", metavar="REVISION", help="This revision.  [default: see above]")
@click.option("--undo", is_flag=True, help="Follow the spec again.")
@target_options()
def command(name: str, revision: str | None, undo: bool, backend: Backend) -> None:
    """Let service NAME serve an earlier revision instead of the one that its spec describes.

    While a rollout is under way, or has failed, that is the revision that still serves; else the
    one that served before. It sets spec.rollout.rollbackTo, and holds until the model is changed
    again, or until --undo.
    """
    name = name.rpartition("/")[2]
    documents = backend.services(name)
    if not documents:
        raise CliError(not_found(backend, name))
    if undo:
        if revision is not None:
            raise CliError("--undo follows the spec, --to does not; leave one of them out")
        backend.patch(name, {"spec": {"rollout": {"rollbackTo": None}}})
        click.echo(f"{RESOURCE}/{name}: follows its spec")
        return
    status = documents[0].get("status") or {}
    back = revision or earlier(name, status)
    wish = {"revision": back, "insteadOf": status.get("specRevision")}
    backend.patch(name, {"spec": {"rollout": {"rollbackTo": wish}}})
    click.echo(f"{RESOURCE}/{name}: back to revision {back}")
    warn_if_asleep(backend)


def earlier(name: str, status: Mapping[str, Any]) -> str:
    """The revision that the way back leads to. Raises CliError where there is none."""
    active, spec = status.get("activeRevision"), status.get("specRevision")
    under_way = spec is not None and active != spec
    found = active if under_way else status.get("previousRevision")
    if not found:
        raise CliError(f"{name}: no earlier revision is kept; it has served only one")
    return str(found)
