"""`python -m shoal.worker.cluster leader|follower`: one pod of a group that serves as one replica.

The leader becomes the worker, with the same flags. A group of more ranks than the engine computes
with ends at once, leader and followers, with the sentence in the pod's status and before anything
is loaded.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from shoal.api.names import ROLE_FOLLOWER, ROLE_LEADER
from shoal.worker import last_words
from shoal.worker.cluster.group import BadGroup, read_group

WRONG_USAGE = 2

Exec = Callable[[str, list[str]], NoReturn]


def main(
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] = os.environ,
    execute: Exec = os.execv,
) -> int:
    """Becomes the worker, or returns the exit code: 0 for a follower that has nothing to lend,
    2 for a group that cannot be."""
    role, *flags = list(sys.argv[1:] if argv is None else argv) or [""]
    if role not in (ROLE_LEADER, ROLE_FOLLOWER) or (role == ROLE_FOLLOWER and flags):
        print(
            "usage: python -m shoal.worker.cluster leader [flags of python -m shoal.worker]\n"
            "       python -m shoal.worker.cluster follower",
            file=sys.stderr,
        )
        return WRONG_USAGE
    try:
        read_group(environ, role)
    except BadGroup as error:
        print(f"shoal worker: {error}", file=sys.stderr)
        last_words.say(str(error))
        return WRONG_USAGE
    if role == ROLE_LEADER:
        execute(sys.executable, [sys.executable, "-m", "shoal.worker", *flags])
    print("one rank needs no follower")
    return 0


if __name__ == "__main__":
    sys.exit(main())
