"""Where a command looks: this machine or a cluster, by its flags and $SHOAL_BACKEND alone.

1. --state-dir means this machine.
2. --context, --kubeconfig, -n/--namespace or -A mean a cluster.
3. Else SHOAL_BACKEND=kubernetes or local decides; where it is not set, this machine.

What happens to be there (a kubeconfig, a running `shoal up`) decides nothing: the same command
never changes another place because of it.
"""

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from shoal.cli.errors import UsageError

if TYPE_CHECKING:
    from shoal.cli.backend import Backend

ENV_BACKEND: Final = "SHOAL_BACKEND"
LOCAL: Final = "local"
KUBERNETES: Final = "kubernetes"

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def target_options(*, everywhere: bool = False) -> Decorator:
    """--state-dir and kubectl's flags; the command gets a `backend`. `everywhere`: also -A."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def targeted(
            *arguments: Any,
            state_dir: Path | None,
            kubeconfig: str | None,
            context: str | None,
            namespace: str | None,
            all_namespaces: bool = False,
            **parameters: Any,
        ) -> Any:
            backend = choose(state_dir, kubeconfig, context, namespace, everywhere=all_namespaces)
            return function(*arguments, backend=backend, **parameters)

        command: Callable[..., Any] = targeted
        for option in reversed(_options(everywhere)):
            command = option(command)
        return command

    return decorate


def choose(
    state_dir: Path | None,
    kubeconfig: str | None,
    context: str | None,
    namespace: str | None,
    *,
    everywhere: bool = False,
    environ: Mapping[str, str] = os.environ,
) -> "Backend":
    """See the module. Raises UsageError for flags that contradict each other, and CliError for a
    kubeconfig that is of no use."""
    given = [
        flag
        for flag, value in (
            ("--kubeconfig", kubeconfig),
            ("--context", context),
            ("--namespace", namespace),
            ("--all-namespaces", everywhere or None),
        )
        if value is not None
    ]
    if state_dir is not None and given:
        raise UsageError(f"--state-dir means this machine, {given[0]} a cluster; give one of them")
    if everywhere and namespace is not None:
        raise UsageError(f"--all-namespaces and --namespace {namespace}: give one of them")
    if state_dir is None and (given or _preferred(environ) == KUBERNETES):
        return _cluster(kubeconfig, context, namespace, everywhere, environ)
    from shoal.cli.local_backend import LocalBackend
    from shoal.operator.local.store import Store, default_root

    return LocalBackend(Store((state_dir or default_root(environ)).expanduser().absolute()))


def _cluster(
    kubeconfig: str | None,
    context: str | None,
    namespace: str | None,
    everywhere: bool,
    environ: Mapping[str, str],
) -> "Backend":
    from shoal.cli.kube.backend import KubeBackend
    from shoal.cli.kube.config import connect

    client, default = connect(kubeconfig, context, environ)
    return KubeBackend(
        client, namespace or default, everywhere=everywhere, explicit=namespace is not None
    )


def _preferred(environ: Mapping[str, str]) -> str:
    chosen = environ.get(ENV_BACKEND) or LOCAL
    if chosen not in (LOCAL, KUBERNETES):
        raise UsageError(f"{ENV_BACKEND} is {chosen!r}; it must be {LOCAL} or {KUBERNETES}")
    return chosen


def _options(everywhere: bool) -> list[Decorator]:
    options: list[Decorator] = [
        click.option(
            "-n",
            "--namespace",
            help="Of a cluster. Default: the context's. This flag alone means a cluster.",
        ),
        click.option("--context", help="A context of the kubeconfig; it means a cluster."),
        click.option(
            "--kubeconfig",
            type=click.Path(dir_okay=False),
            help="Default: $KUBECONFIG, else ~/.kube/config, in a pod its service account.",
        ),
        click.option(
            "--state-dir",
            type=click.Path(file_okay=False, path_type=Path),
            help="Of services of this machine. Default: $SHOAL_STATE_DIR, else "
            f"~/.local/state/shoal. Without any of these flags ${ENV_BACKEND} (local or "
            "kubernetes) decides, and else it is this machine.",
        ),
    ]
    if everywhere:
        options.insert(
            1, click.option("-A", "--all-namespaces", is_flag=True, help="Of the whole cluster.")
        )
    return options


def complete_services(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of services where the command line so far looks, for the shell."""
    return _starting(incomplete, ctx, _service_names)


def complete_pods(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of services and pods where the command line so far looks, for the shell."""
    return _starting(
        incomplete,
        ctx,
        lambda backend: [*_service_names(backend), *(pod.name for pod in backend.pods())],
    )


def _service_names(backend: "Backend") -> list[str]:
    return [document["metadata"]["name"] for document in backend.services()]


def _starting(
    incomplete: str, ctx: click.Context, names: "Callable[[Backend], list[str]]"
) -> list[str]:
    """Nothing where the place cannot be asked: completion must not fail."""
    given = ctx.params
    try:
        backend = choose(
            given.get("state_dir"),
            given.get("kubeconfig"),
            given.get("context"),
            given.get("namespace"),
        )
        return [name for name in names(backend) if name.startswith(incomplete)]
    except click.ClickException:
        return []
