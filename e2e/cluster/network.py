"""The bridge that pods and the node share, and the kernel settings they need."""

import json
from pathlib import Path
from typing import Final

from e2e.cluster.command import attempt, run
from e2e.cluster.layout import BRIDGE, NODE_IP, SERVICE_RANGE, Layout

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


def remove_network(layout: Layout) -> None:
    """Also what kube-proxy and the CNI plugins left behind."""
    for line in run("ip", "netns", "list").splitlines():
        name = line.split()[0]
        if name.startswith("cni-") and _is_ours(name):
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


def _is_ours(namespace: str) -> bool:
    return "inet 198.18." in run("ip", "-n", namespace, "-4", "addr", "show")


def _read(name: str) -> str | None:
    path = Path("/proc/sys", *name.split("."))
    return path.read_text().strip() if path.exists() else None
