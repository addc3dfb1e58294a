"""What the machine must offer for a cluster of its own."""

import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Final

from e2e.cluster.command import PATH, Say, run
from e2e.cluster.layout import ClusterError

# Command or file -> Debian package.
NEEDED: Final = {
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "iptables": "iptables",
    "nft": "nftables",
    "conntrack": "conntrack",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "ip": "iproute2",
    "openssl": "openssl",
    "buildah": "buildah",
    "debootstrap": "debootstrap",
}
INSTALL_SECONDS: Final = 600.0


def unsupported() -> str | None:
    """Why this machine cannot run the node, in a sentence; None where it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the test cluster runs on Linux x86_64, and this is {sys.platform}"
    if os.geteuid() != 0:
        return "the test cluster needs root (containers, a bridge, mounts)"
    packages = missing()
    if packages and shutil.which("apt-get") is None:
        return f"the test cluster needs these programs: {' '.join(packages)}"
    return None


def missing() -> list[str]:
    """Debian packages that are not installed."""
    return sorted({package for name, package in NEEDED.items() if not _there(name)})


def install(say: Say) -> None:
    """Installs what is missing. Raises ClusterError."""
    if reason := unsupported():
        raise ClusterError(reason)
    if packages := missing():
        say(f"installing {' '.join(packages)} (apt-get)")
        quiet = {"DEBIAN_FRONTEND": "noninteractive"}
        run("apt-get", "update", "-qq", environ=quiet, seconds=INSTALL_SECONDS)
        run(
            *("apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages),
            environ=quiet,
            seconds=INSTALL_SECONDS,
        )


def _there(name: str) -> bool:
    return (
        Path(name).exists() if name.startswith("/") else shutil.which(name, path=PATH) is not None
    )
