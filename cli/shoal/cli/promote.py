"""`shoal promote`: lets a canary go on."""

import click

from shoal.api.names import ANNOTATION_PROMOTE
from shoal.cli.apply import warn_if_asleep
from shoal.cli.backend import Backend, not_found
from shoal.cli.errors import CliError
from shoal.cli.output import RESOURCE
from shoal.cli.target import complete_services, target_options


@click.command()
@click.argument("name", shell_complete=complete_services)
@target_options()
def command(name: str, backend: Backend) -> None:
    """Let the canary of service NAME pass its present step.

    It ends the step's pause, or its wait for a person, and holds for the revision on trial and
    this step alone. The analysis goes on: a canary that fails is rolled back all the same.
    """
    name = name.rpartition("/")[2]
    documents = backend.services(name)
    if not documents:
        raise CliError(not_found(backend, name))
    canary = (documents[0].get("status") or {}).get("canary")
    if not canary:
        raise CliError(f"{name}: no canary is under way; `shoal describe {name}` shows the state")
    revision, step = canary["revision"], canary["step"]
    annotations = {ANNOTATION_PROMOTE: f"{revision}:{step}"}
    backend.patch(name, {"metadata": {"annotations": annotations}})
    click.echo(f"{RESOURCE}/{name}: revision {revision} may pass step {step}")
    warn_if_asleep(backend)
