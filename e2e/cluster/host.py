"""Nodes: a container runtime and a kubelet on this machine's bridge.

The first node is the cluster's. A second one comes on demand, has a runtime, pods' addresses and
control groups of its own, and can be lost as machines are.
"""

import shutil
import signal
import string
from pathlib import Path
from typing import Final

from e2e import tools
from e2e.cluster import binaries, network, runtime
from e2e.cluster.command import Say, attempt, run, wait_for
from e2e.cluster.layout import BRIDGE, HERE, SECOND, ClusterError, Host, Layout
from e2e.cluster.processes import Processes

_CGROUPS: Final = Path("/sys/fs/cgroup")
_AS_THEY_ARE: Final = ("addons.yaml", "kwok.yaml")  # no templates


def write_configuration(cluster: Layout, host: Host) -> None:
    """Everything of conf/, with the node's own addresses and folders."""
    layout = cluster.of(host)
    values = {
        "run": str(layout.run),
        "pki": str(cluster.pki),
        "socket": str(layout.socket),
        "bridge": BRIDGE,
        "address": host.address,
        "first_pod": host.first_pod,
        "health_port": str(host.health_port),
        "cgroup": host.cgroup,
        "user": host.user,
    }
    for source in (HERE / "conf").iterdir():
        if source.suffix in (".toml", ".yaml", ".conflist"):
            target = layout.conf / ("cni" if source.suffix == ".conflist" else "") / source.name
            text = source.read_text()
            templated = source.name not in _AS_THEY_ARE
            target.write_text(string.Template(text).substitute(values) if templated else text)
    (layout.conf / "resolv.conf").write_text("")


def make_folders(layout: Layout) -> None:
    for folder in (layout.logs, layout.records, layout.conf / "cni"):
        folder.mkdir(parents=True)
    for folder in (layout.run / "opt", layout.run / "pod-logs"):
        folder.mkdir(mode=0o700)


def start_kubelet(cluster: Layout, host: Host, programs: Path) -> None:
    layout = cluster.of(host)
    Processes(layout).start(
        "kubelet",
        *(programs / "kubelet", "--config", layout.conf / "kubelet.yaml"),
        *("--kubeconfig", cluster.kubeconfig(host.user), "--root-dir", layout.run / "kubelet"),
        *("--hostname-override", host.name, "--node-ip", host.address),
    )


def is_ready(cluster: Layout, host: Host) -> bool:
    return attempt(
        *(tools.kubectl(), "--kubeconfig", cluster.kubeconfig()),
        *("wait", "--for=condition=Ready", f"node/{host.name}", "--timeout=1s"),
        seconds=10,
    )


def add(cluster: Layout, say: Say, host: Host = SECOND) -> None:
    """Starts a further node, and waits until it is Ready. Raises ClusterError."""
    layout = cluster.of(host)
    if layout.run.exists():
        raise ClusterError(f"{host.name} is there already: end it with remove-node")
    programs = binaries.build(cluster, say)
    make_folders(layout)
    network.add_address(host.address)
    for hierarchy in _hierarchies():
        (hierarchy / host.cgroup.strip("/")).mkdir(exist_ok=True)
    write_configuration(cluster, host)
    try:
        runtime.start(layout, Processes(layout))
        runtime.import_own_images(layout, programs)
        start_kubelet(cluster, host, programs)
        wait_for(f"node {host.name}", 60, lambda: is_ready(cluster, host))
    except BaseException:
        end(cluster, host)
        raise
    say(f"node {host.name} Ready")


def stop_kubelet(cluster: Layout, host: Host = SECOND) -> None:
    """The node goes silent, and its pods run on."""
    Processes(cluster.of(host)).stop(["kubelet"], signal.SIGKILL)


def restart_kubelet(cluster: Layout, host: Host = SECOND) -> None:
    Processes(cluster.of(host)).restart("kubelet")


def cut_off(host: Host = SECOND) -> None:
    """Nothing reaches the node's pods any more, nor leaves them, as after a power cut."""
    for namespace in network.namespaces(host):
        run("ip", "-n", namespace, "link", "set", "eth0", "down")


def remove(cluster: Layout, host: Host = SECOND) -> None:
    """Ends a further node, and makes the cluster forget it and its pods."""
    kubectl = (tools.kubectl(), "--kubeconfig", cluster.kubeconfig())
    attempt(*kubectl, "delete", "node", host.name, "--ignore-not-found", "--wait=false")
    end(cluster, host)


def end(cluster: Layout, host: Host = SECOND) -> None:
    """Stops all of a further node that runs on this machine. Raises ClusterError."""
    layout = cluster.of(host)
    if not layout.run.exists():
        return
    processes = Processes(layout)
    processes.stop(["kubelet"], signal.SIGKILL)
    if processes.alive("containerd"):
        runtime.remove_containers(layout)
        processes.stop(["containerd"])
    runtime.end_shims(layout)
    left = runtime.unmount_all(layout)
    for hierarchy in _hierarchies():
        runtime.remove_cgroups(hierarchy / host.cgroup.strip("/"))
    for namespace in network.namespaces(host):
        attempt("ip", "netns", "del", namespace)
    network.remove_address(host.address)
    if left:
        raise ClusterError(f"still mounted, so {layout.run} stays: {' '.join(left)}")
    shutil.rmtree(layout.run, ignore_errors=True)


def _hierarchies() -> list[Path]:
    """Where control groups are made: one root (v2), or one for each controller (v1)."""
    if (_CGROUPS / "cgroup.controllers").exists():
        return [_CGROUPS]
    return [path for path in _CGROUPS.iterdir() if path.is_dir() and not path.is_symlink()]
