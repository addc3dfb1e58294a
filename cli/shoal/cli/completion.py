"""`shoal completion`: scripts that let a shell complete commands and flags."""

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script for SHELL.

    \b
    bash:  eval "$(shoal completion bash)"
    zsh:   eval "$(shoal completion zsh)"
    fish:  shoal completion fish | source
    """
    complete = get_completion_class(shell)
    assert complete is not None, "click completes all shells of the choice"
    root = click.get_current_context().find_root().command
    click.echo(complete(root, {}, "shoal", "_SHOAL_COMPLETE").source())
