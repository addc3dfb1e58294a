"""`python -m e2e.cluster up|down|status|...`: a real Kubernetes on this machine, by hand."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

import yaml

from e2e import tools
from e2e.cluster import host, node, platform
from e2e.cluster.command import stopwatch
from e2e.cluster.layout import ClusterError, default_layout
from e2e.cluster.processes import Processes

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m e2e.cluster", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("up", help="build what is missing and start it; nothing where it is up")
    actions.add_parser("down", help="stop it and put the machine back as it was")
    actions.add_parser("values", help="a values file of charts/shoal, with images for it")
    actions.add_parser("add-node", help="a second node, for what is done with nodes")
    actions.add_parser("remove-node", help="end it")
    actions.add_parser("status", help="its processes, and how to reach it; exit 1 where not up")
    for action, text in (("stop", "stop a process, as a fault"), ("start", "start it again")):
        actions.add_parser(action, help=text).add_argument("process", help="kube-apiserver, ...")
    options = parser.parse_args(arguments)
    try:
        return _act(options)
    except ClusterError as error:
        print(f"e2e.cluster: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def _act(options: argparse.Namespace) -> int:
    layout = default_layout()
    say = stopwatch()
    processes = Processes(layout)
    match options.action:
        case "up":
            fresh = node.up(layout, say, owned=False)
            say("the cluster is up" if fresh else "the cluster was up already")
            print(f"export KUBECONFIG={layout.kubeconfig()} PATH={tools.kubectl().parent}:$PATH")
        case "down":
            node.down(layout)
            say("the cluster is gone")
        case "values":
            values = platform.own_values(layout, stopwatch(partial(print, file=sys.stderr)))
            print(yaml.safe_dump(dict(values)), end="")
        case "add-node":
            host.add(layout, say)
        case "remove-node":
            host.remove(layout)
        case "stop":
            processes.stop([options.process])
        case "start":
            processes.restart(options.process)
        case _:
            if not processes.names():
                print("not up")
                return 1
            for name in processes.names():
                state = "running" if processes.alive(name) else "stopped"
                print(f"{name:<24} {state}  {processes.log(name)}")
            print(f"KUBECONFIG={layout.kubeconfig()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
