"""Where a test cluster keeps things, and its fixed addresses.

cache  binaries, images and wheels, kept from one checkout to the next
run    everything of the running cluster: keys, configuration, logs, etcd's data, pods
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from e2e.tools import cache_folder

CHECKOUT: Final = Path(__file__).resolve().parents[2]
HERE: Final = Path(__file__).resolve().parent

KUBERNETES: Final = "1.35.4"
KWOK: Final = "v0.8.0"
BRIDGE: Final = "shoal-e2e0"
NODE_IP: Final = "198.18.0.1"  # of the range for benchmarks (RFC 2544): nobody routes it
POD_RANGE: Final = "198.18.0.0/16"
SERVICE_RANGE: Final = "198.19.0.0/16"
API_SERVER: Final = f"https://{NODE_IP}:6443"
WHEEL_PORT: Final = 33300  # a package index for pods, on the bridge alone
UNIX_PATH_MAX: Final = 100  # of 107, less what containerd appends


class ClusterError(RuntimeError):
    """The cluster cannot be had. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Host:
    """A node: what kubelets and container runtimes of one machine may not share."""

    name: str
    address: str
    first_pod: str  # where its pods' addresses begin
    health_port: int  # the kubelet's, on 127.0.0.1
    cgroup: str  # below every hierarchy's root; what is below it is the kubelet's to remove

    @property
    def user(self) -> str:
        """Whom the kubelet is to the API server, as files are called."""
        return f"kubelet.{self.name}"


FIRST: Final = Host("node1", NODE_IP, "198.18.1.1", 33248, "/")
SECOND: Final = Host("node2", "198.18.0.2", "198.18.128.1", 33250, "/shoal-e2e-node2")


@dataclass(frozen=True, slots=True)
class Layout:
    """Folders of one checkout's cluster, or of a further node of it."""

    run: Path
    cache: Path

    def of(self, host: Host) -> "Layout":
        """The folders of a node: the first one's are the cluster's."""
        return self if host == FIRST else Layout(self.run / host.name, self.cache)

    @property
    def pki(self) -> Path:
        return self.run / "pki"

    @property
    def logs(self) -> Path:
        """One file a process; pods' logs lie in `run/pod-logs` while they live."""
        return self.run / "log"

    @property
    def records(self) -> Path:
        return self.run / "processes"

    @property
    def conf(self) -> Path:
        return self.run / "conf"

    @property
    def socket(self) -> Path:
        """containerd's."""
        return self.run / "containerd.sock"

    def kubeconfig(self, user: str = "admin") -> Path:
        return self.run / f"kubeconfig.{user}"


def default_layout() -> Layout:
    """The layout of this checkout. Raises ClusterError where its path is too long."""
    layout = Layout(HERE / ".run", cache_folder(os.environ))
    if len(str(layout.socket)) > UNIX_PATH_MAX:
        raise ClusterError(
            f"{layout.socket} is too long for a Unix socket ({UNIX_PATH_MAX} characters): "
            "use a checkout with a shorter path"
        )
    return layout
