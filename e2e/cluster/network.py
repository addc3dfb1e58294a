"""The bridge that pods and the node share, and the kernel settings they need."""

import json
import re
from pathlib import Path
from typing import Final

from e2e.cluster.command import attempt, run
from e2e.cluster.layout import BRIDGE, NODE_IP, SECOND, SERVICE_RANGE, Host, Layout

WANTED: Final = {"net.ipv4.ip_forward": "1", "net.bridge.bridge-nf-call-iptables": "1"}
# The kubelet sets these itself.
CHANGED: Final = ("vm.overcommit_memory", "kernel.panic", "kernel.panic_on_oops", *WANTED)


def make_network(layout: Layout) -> None:
    """The bridge comes first: its address is the node's. Remembers what it changes."""
    before = {name: value for name in CHANGED if (value := _read(name)) is not None}
    (layout.run / "sysctl.json").write_text(json.dumps(before))
    attempt("modprobe", "br_netfilter")  # where it is not built in
    for name, value in WANTED.items():
        if _read(name) != value:
            run("sysctl", "-qw", f"{name}={value}")
    if not Path("/sys/class/net", BRIDGE).exists():
        run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "addr", "replace", f"{NODE_IP}/16", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")
    # The host's own traffic to Services must not take the default route.
    run("ip", "route", "replace", SERVICE_RANGE, "dev", BRIDGE, "src", NODE_IP)


def add_address(address: str) -> None:
    """A further node's, on the bridge."""
    run("ip", "addr", "replace", f"{address}/16", "dev", BRIDGE)


def remove_address(address: str) -> None:
    attempt("ip", "addr", "del", f"{address}/16", "dev", BRIDGE)


def namespaces(host: Host | None = None) -> list[str]:
    """Network namespaces of the cluster's pods, or of one node's."""
    names = (line.split()[0] for line in run("ip", "netns", "list").splitlines())
    return [name for name in names if name.startswith("cni-") and _is_of(name, host)]


def remove_network(layout: Layout) -> None:
    """Also what kube-proxy and the CNI plugins left behind."""
    for name in namespaces():
        attempt("ip", "netns", "del", name)
    for family in ("ip", "ip6"):
        attempt("nft", "delete", "table", family, "kube-proxy")
    attempt("ip", "link", "del", BRIDGE)
    for leftover in Path("/var/lib/cni/results").glob("shoal-e2e-*"):
        leftover.unlink(missing_ok=True)
    saved = layout.run / "sysctl.json"
    if saved.exists():
        for name, value in json.loads(saved.read_text()).items():
            if _read(name) != value:
                attempt("sysctl", "-qw", f"{name}={value}")


def _is_of(namespace: str, host: Host | None) -> bool:
    shown = run("ip", "-n", namespace, "-4", "addr", "show")
    found = re.search(r"inet (198\.18\.(\d+)\.\d+)", shown)
    if host is None or found is None:
        return found is not None
    return (int(found[2]) >= _third(SECOND)) == (host == SECOND)


def _third(host: Host) -> int:
    """Where a node's pods begin, in the third of an address's numbers."""
    return int(host.first_pod.split(".")[2])


def _read(name: str) -> str | None:
    path = Path("/proc/sys", *name.split("."))
    return path.read_text().strip() if path.exists() else None
