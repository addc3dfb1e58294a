"""`shoal`: the command line.

Every command lives in a module of its own that is imported when it is called, so `shoal --help`
and shell completion stay fast: neither torch nor grpc is imported to print a list.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import click

from shoal.cli.errors import EXIT_INTERRUPTED, CliError, UsageError


@dataclass(frozen=True, slots=True)
class Entry:
    """One command: `module` holds a click command of the name `command`."""

    module: str
    summary: str


SECTIONS: dict[str, dict[str, Entry]] = {
    "Serve": {
        "up": Entry("up", "Serve the services of YAML files on this machine until Ctrl-C."),
        "serve": Entry("serve", "Serve one model without a YAML."),
        "demo": Entry("demo", "Serve a small real model, ask it something, stop."),
    },
    "Services": {
        "apply": Entry("apply", "Create or change services from YAML files."),
        "get": Entry("get", "List services and pods."),
        "describe": Entry("describe", "Show one service in full: spec, conditions, pods."),
        "logs": Entry("logs", "Print the log of a pod, of a service's pods, or of the router."),
        "top": Entry("top", "Show the live load of services and replicas."),
        "scale": Entry("scale", "Change the number of replicas."),
        "promote": Entry("promote", "Let a canary pass its present step."),
        "rollback": Entry("rollback", "Serve an earlier revision again."),
        "wait": Entry("wait", "Wait until a service meets a condition."),
        "delete": Entry("delete", "Drain and remove services."),
    },
    "Models and plans": {
        "plan": Entry("plan", "Print what a YAML file would create."),
        "simulate": Entry("simulate", "Play a load against a YAML file, on a virtual clock."),
        "fetch": Entry("fetch", "Download a model ahead of time."),
    },
    "Other": {
        "completion": Entry("completion", "Print the completion script for a shell."),
        "version": Entry("version", "Print the version."),
    },
}


class LazyGroup(click.Group):
    """Imports a command when it is called, and turns errors into sentences."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for entries in SECTIONS.values() for name in entries]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for entries in SECTIONS.values():
            if cmd_name in entries:
                module = import_module(f"shoal.cli.{entries[cmd_name].module}")
                command: click.Command = module.command
                return command
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, entries in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, entry.summary) for name, entry in entries.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            ctx.exit(EXIT_INTERRUPTED)
        except Exception as error:
            if os.environ.get("SHOAL_DEBUG") == "1":
                raise
            raise _explained(error) from error


def _explained(error: Exception) -> CliError:
    """The sentence for an error that no command has caught."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return CliError(
            f"the Python package {error.name!r} is not installed; "
            "`pip install 'shoal[all]'` installs all that this command needs"
        )
    if isinstance(error, _expected_errors()):
        return UsageError(str(error)) if isinstance(error, ValueError) else CliError(str(error))
    if isinstance(error, OSError) and error.filename:
        return CliError(f"{error.filename}: {error.strerror}")
    return CliError(
        f"{type(error).__name__}: {error}\n"
        "This is a defect of shoal; SHOAL_DEBUG=1 shows where it happened."
    )


def _expected_errors() -> tuple[type[Exception], ...]:
    """Errors of the rooms below whose message is a sentence for the user."""
    from shoal.api.types import InvalidManifest
    from shoal.operator.local.settings import NotAnAddress, PortTaken
    from shoal.operator.local.store import SupervisorRuns, UnknownService

    return InvalidManifest, NotAnAddress, PortTaken, SupervisorRuns, UnknownService


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="shoal", message="%(version)s")
def cli() -> None:
    """Serve language models, on this machine or in a Kubernetes cluster, from one YAML.

    Start with `shoal demo`, or with `shoal up -f service.yaml`. The commands for services work
    on this machine, and with --namespace, --context or SHOAL_BACKEND=kubernetes on a cluster.
    """


def main(argv: Sequence[str] | None = None) -> None:
    """The entry point. Ends the process with the command's exit code."""
    cli.main(args=None if argv is None else list(argv), prog_name="shoal")


if __name__ == "__main__":
    main()
