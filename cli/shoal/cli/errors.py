"""What a command says when it cannot do its work: one sentence, and an exit code.

Exit codes: 0 done, 1 failed, 2 the command line or a manifest is wrong, 130 interrupted.
"""

import click

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class CliError(click.ClickException):
    """Ends the command: `message` says what is wrong and what to do, on standard error."""


class UsageError(CliError):
    """The command line or a manifest is wrong."""

    exit_code = EXIT_USAGE
