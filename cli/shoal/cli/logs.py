"""`shoal logs`: what pods printed."""

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from shoal.cli.errors import CliError
from shoal.cli.options import complete_pods, store_option
from shoal.cli.tail import Tailer, last

if TYPE_CHECKING:
    from shoal.operator.local.store import Store

_POLL_SECONDS = 0.2


@click.command()
@click.argument("name", shell_complete=complete_pods)
@click.option("-f", "--follow", is_flag=True, help="Then print what comes, until the pod is gone.")
@click.option("--tail", type=click.IntRange(min=0), help="Print only the last so many lines.")
@store_option()
def command(name: str, follow: bool, tail: int | None, store: "Store") -> None:
    """Print the log of NAME: a pod, a service (all its pods), or router.

    The log of a pod that has ended stays until another pod of the same name starts.
    """
    name = name.rpartition("/")[2]
    pods = _pods_of(store, name)
    if not pods:
        known = [pod.name for pod in store.pods()] + [s.metadata.name for s in store.services()]
        raise CliError(f'no pod and no service "{name}"; there are: {", ".join(known) or "none"}')
    tailers = {pod: Tailer(store.log_path(pod)) for pod in pods}
    for pod, tailer in tailers.items():
        _print(last(tailer.read(), tail), pod, several=len(pods) > 1)
    while follow and store.supervisor() is not None:
        time.sleep(_POLL_SECONDS)
        alive = _pods_of(store, name)
        for pod in alive:
            tailers.setdefault(pod, Tailer(store.log_path(pod)))
        for pod, tailer in tailers.items():
            _print(tailer.read(), pod, several=len(tailers) > 1)
        if not alive:
            return


def _pods_of(store: "Store", name: str) -> list[str]:
    """The pods behind a name; a pod that is gone counts while its log is there."""
    pods = [pod.name for pod in store.pods() if name in (pod.name, pod.service)]
    if not pods and "/" not in name and store.log_path(name).is_file():
        return [name]
    return pods


def _print(lines: Iterable[str], pod: str, *, several: bool) -> None:
    for line in lines:
        click.echo(f"[{pod}] {line}" if several else line)
