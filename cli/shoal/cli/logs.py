"""`shoal logs`: what pods printed."""

import click

from shoal.cli.backend import Backend
from shoal.cli.target import complete_pods, target_options


@click.command()
@click.argument("name", shell_complete=complete_pods)
@click.option("-f", "--follow", is_flag=True, help="Then print what comes, until the pod is gone.")
@click.option("--tail", type=click.IntRange(min=0), help="Print only the last so many lines.")
@target_options()
def command(name: str, follow: bool, tail: int | None, backend: Backend) -> None:
    """Print the log of NAME: a pod, a service (all its pods), or router.

    On this machine the log of a pod that has ended stays until another pod of the same name
    starts. In a cluster a pod that still fetches its model shows how far that is.
    """
    for line in backend.logs(name.rpartition("/")[2], tail, follow=follow):
        click.echo(f"[{line.pod}] {line.text}" if line.several else line.text)
