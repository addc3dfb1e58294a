"""`python -m shoal.worker.cluster ROLE`: one process of a group that serves as one replica.

    leader [FLAGS]            the worker, with the same flags, beside a Ray head where there are
                              more pods than one
    follower                  lends this pod's ranks to the leader
    prestop --drain-seconds N a follower's preStop hook
    node, ranks               processes that the leader and the worker start

A group that cannot be ends at once, leader and followers, with the sentence in the pod's status
and before anything is loaded.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NoReturn

from shoal.api import names
from shoal.worker import last_words
from shoal.worker.cluster import follower, node
from shoal.worker.cluster.group import BadGroup, Group, read_group

WRONG_USAGE: Final = 2
FAILED: Final = 1
_USAGE: Final = """\
usage: python -m shoal.worker.cluster leader [flags of python -m shoal.worker]
       python -m shoal.worker.cluster follower
       python -m shoal.worker.cluster prestop --drain-seconds N"""

Exec = Callable[[str, list[str]], NoReturn]
StartHead = Callable[[Group], str | None]  # its address, or None where it does not start


def main(
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] = os.environ,
    execute: Exec = os.execv,
    start_head: StartHead | None = None,
) -> int:
    """Becomes the worker, or returns the exit code: 0 told to stop, 1 failed, 2 a group that
    cannot be."""
    role, *flags = list(sys.argv[1:] if argv is None else argv) or [""]
    match role:
        case "node":
            return node.main(flags)
        case "ranks":
            from shoal.worker.cluster import ray_ranks

            return ray_ranks.main()
        case "prestop":
            return _prestop(flags, environ)
        case names.ROLE_LEADER | names.ROLE_FOLLOWER if role == names.ROLE_LEADER or not flags:
            return _member(role, flags, environ, execute, start_head or _start_head)
        case _:
            print(_USAGE, file=sys.stderr)
            return WRONG_USAGE


def _member(
    role: str,
    flags: list[str],
    environ: Mapping[str, str],
    execute: Exec,
    start_head: StartHead,
) -> int:
    try:
        group = read_group(environ, role)
    except BadGroup as error:
        print(f"shoal worker: {error}", file=sys.stderr)
        last_words.say(str(error))
        return WRONG_USAGE
    if role == names.ROLE_FOLLOWER:
        port = int(environ.get(names.ENV_METRICS_PORT) or names.PORT_ENGINE_METRICS)
        return follower.follow(group, environ.get(names.ENV_HOST) or "127.0.0.1", port)
    if group.size > 1:
        address = start_head(group)
        if address is None:
            last_words.say("Ray does not start in the leader; the container's log says why")
            return FAILED
        flags = [*flags, "--executor", "ray", "--ray-address", address]
    return execute(sys.executable, [sys.executable, "-m", "shoal.worker", *flags])


def _start_head(group: Group) -> str | None:
    """The head's address, or None. It ends with this process, also after that has become the
    worker: the pipe's end stays open in it."""
    # A container's first process ignores what it does not handle; the worker handles it anew.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    ours, theirs = os.pipe()
    os.set_inheritable(theirs, True)
    ip = node.own_address()
    head = subprocess.Popen(
        [
            *(sys.executable, "-m", "shoal.worker.cluster", "node", "--ip", ip),
            *("--port", str(node.HEAD_PORT)),
            *("--ranks", str(group.own_ranks), "--gpus", str(group.gpus)),
        ],
        stdin=ours,
        stdout=subprocess.PIPE,
        env={**os.environ, names.ENV_LIFELINE: "stdin"},
        text=True,
        close_fds=True,
    )
    os.close(ours)
    assert head.stdout is not None
    said = head.stdout.readline()
    return f"{ip}:{node.HEAD_PORT}" if said.startswith("ready ") else None


def _prestop(flags: list[str], environ: Mapping[str, str]) -> int:
    leader = environ.get(names.ENV_LEADER_ADDRESS, "")
    match flags:
        case ["--drain-seconds", seconds] if leader and seconds.replace(".", "", 1).isdigit():
            print(follower.outlive(leader, names.PORT_ENGINE_GRPC, float(seconds)), flush=True)
            return 0
        case _:
            print(_USAGE, file=sys.stderr)
            return WRONG_USAGE


if __name__ == "__main__":
    sys.exit(main())
