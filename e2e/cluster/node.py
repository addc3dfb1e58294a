"""A real Kubernetes of one node on this machine: up, down, status.

network -> keys -> etcd, containerd, API server -> images -> controllers, scheduler, kubelet
-> CoreDNS
"""

import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from e2e import tools
from e2e.cluster import binaries, host, kwok, requirements, runtime, wheels
from e2e.cluster.command import Say, attempt, run, wait_for
from e2e.cluster.layout import (
    API_SERVER,
    FIRST,
    HERE,
    NODE_IP,
    SERVICE_RANGE,
    ClusterError,
    Layout,
)
from e2e.cluster.network import make_network, remove_network
from e2e.cluster.pki import FRONT_PROXY, make_keys
from e2e.cluster.processes import Processes, identify, same

CONTROL_PLANE: Final = (
    *("etcd", "containerd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"),
    *("kubelet", "kube-proxy"),
)
CLAIM: Final = Path("/run/shoal-e2e.json")  # one cluster a machine: its addresses are fixed
# Heaps are small here: collected as often as is usual, that is a fifth of the processor time.
_SELDOM: Final = {"GOGC": "400"}
# Without these, 30 pods take 44 s on a busy machine.
_FAST: Final = ("--kube-api-qps", "300", "--kube-api-burst", "600", "--leader-elect=false")


@dataclass(frozen=True, slots=True)
class Claim:
    """Whose cluster this machine runs."""

    run: Path
    owner: int | None  # process that takes it down at its end; None: a person does
    owner_started: float | None

    def orphaned(self) -> bool:
        return (
            self.owner is not None
            and self.owner_started is not None
            and not same(self.owner, self.owner_started)
        )


def up(layout: Layout, say: Say, *, owned: bool) -> bool:
    """Starts the cluster; False where it was up already. Raises ClusterError.

    `owned`: it belongs to this process; if that dies, the next `up` clears it away.
    """
    claim = read_claim()
    if claim is not None:
        other = Layout(claim.run, layout.cache)
        if is_up(other) and not claim.orphaned():
            if claim.run == layout.run:
                return False
            raise ClusterError(
                f"this machine runs the cluster of {claim.run.parents[2]}: end it there with "
                "`python -m e2e.cluster down`"
            )
        say(f"clearing away what {claim.run} left")
        down(other)
    requirements.install(say)
    programs = binaries.build(layout, say)
    kubectl = tools.kubectl()
    _write_claim(layout, owned)
    try:
        _start(layout, programs, kubectl, say)
    except BaseException:
        keep_logs(layout)
        down(layout)
        raise
    return True


def is_up(layout: Layout) -> bool:
    processes = Processes(layout)
    return layout.kubeconfig().exists() and all(map(processes.alive, CONTROL_PLANE))


def down(layout: Layout) -> None:
    """Stops everything and puts the machine back as it was. Raises ClusterError."""
    host.end(layout)
    processes = Processes(layout)
    others = [name for name in processes.names() if name not in CONTROL_PLANE]
    clients = ["kubelet", "kube-proxy", "kube-scheduler", "kube-controller-manager"]
    processes.stop([*others, *clients])
    processes.stop(["kube-apiserver"], signal.SIGKILL)  # a graceful stop waits on watches
    processes.stop(["etcd"])
    if processes.alive("containerd"):
        runtime.remove_containers(layout)
        processes.stop(["containerd"])
    runtime.end_shims(layout)
    left = runtime.unmount_all(layout)
    runtime.remove_cgroups()
    if layout.run.exists():
        remove_network(layout)
    if left:
        raise ClusterError(f"still mounted, so {layout.run} stays: {' '.join(left)}")
    shutil.rmtree(layout.run, ignore_errors=True)
    claim = read_claim()
    if claim is not None and claim.run == layout.run:
        CLAIM.unlink(missing_ok=True)


def keep_logs(layout: Layout) -> Path | None:
    """Copies the processes' logs out of the run folder, to survive `down`; where they are."""
    if not layout.logs.exists():
        return None
    kept = layout.run.with_name(".last-logs")
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(layout.logs, kept)
    return kept


def read_claim() -> Claim | None:
    try:
        found: dict[str, Any] = json.loads(CLAIM.read_text())
    except FileNotFoundError:
        return None
    return Claim(Path(found["run"]), found["owner"], found["started"])


def _write_claim(layout: Layout, owned: bool) -> None:
    owner = os.getpid() if owned else None
    started = identify(owner) if owner is not None else None
    CLAIM.write_text(json.dumps({"run": str(layout.run), "owner": owner, "started": started}))


def _start(layout: Layout, programs: Path, kubectl: Path, say: Say) -> None:
    shutil.rmtree(layout.run, ignore_errors=True)
    host.make_folders(layout)
    (layout.run / "etcd").mkdir(mode=0o700)
    processes = Processes(layout)
    make_network(layout)
    make_keys(layout)
    host.write_configuration(layout, FIRST)
    processes.start("etcd", *_etcd(layout, programs), environ=_SELDOM)
    processes.start("kube-apiserver", *_api_server(layout, programs), environ=_SELDOM)
    runtime.start(layout, processes)
    runtime.import_own_images(layout, programs)
    say("containerd answers, images imported")

    def k(*arguments: str | Path) -> bool:
        return attempt(kubectl, "--kubeconfig", layout.kubeconfig(), *arguments, seconds=10)

    wait_for("the API server", 90, lambda: k("get", "--raw", "/readyz"))
    say("API server ready")
    pki = layout.pki
    processes.start(
        "kube-controller-manager",
        *(programs / "kube-controller-manager", *_FAST),
        *("--kubeconfig", layout.kubeconfig("kube-controller-manager")),
        *("--bind-address", "127.0.0.1", "--secure-port", "33257"),
        *("--use-service-account-credentials", "--root-ca-file", pki / "ca.crt"),
        *("--service-account-private-key-file", pki / "sa.key"),
        *("--cluster-signing-cert-file", pki / "ca.crt"),
        *("--cluster-signing-key-file", pki / "ca.key"),
        *("--horizontal-pod-autoscaler-sync-period", "5s"),
        environ=_SELDOM,
    )
    processes.start(
        "kube-scheduler",
        *(programs / "kube-scheduler", *_FAST),
        *("--kubeconfig", layout.kubeconfig("kube-scheduler")),
        *("--bind-address", "127.0.0.1", "--secure-port", "33259"),
        environ=_SELDOM,
    )
    host.start_kubelet(layout, FIRST, programs)
    processes.start(
        "kube-proxy", programs / "kube-proxy", "--config", layout.conf / "kube-proxy.yaml"
    )
    wheels.start(layout, processes)
    kwok.start(layout, processes, programs)
    run(kubectl, "--kubeconfig", layout.kubeconfig(), "apply", "-f", HERE / "conf/addons.yaml")
    wait_for("the node", 60, lambda: host.is_ready(layout, FIRST))
    say("node Ready")
    rolled = ("-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout=1s")
    wait_for("CoreDNS", 60, lambda: k(*rolled))
    say("CoreDNS Ready")


def _etcd(layout: Layout, programs: Path) -> list[str | Path]:
    client, peer = "http://127.0.0.1:33379", "http://127.0.0.1:33380"
    return [
        *(programs / "etcd", "--data-dir", layout.run / "etcd"),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--initial-cluster", f"default={peer}", "--unsafe-no-fsync", "--log-level", "warn"),
    ]


def _api_server(layout: Layout, programs: Path) -> list[str | Path]:
    pki = layout.pki
    return [
        *(programs / "kube-apiserver", "--etcd-servers", "http://127.0.0.1:33379"),
        *("--bind-address", NODE_IP, "--advertise-address", NODE_IP),
        *("--secure-port", API_SERVER.rsplit(":", 1)[1]),
        *("--tls-cert-file", pki / "apiserver.crt"),
        *("--tls-private-key-file", pki / "apiserver.key"),
        *("--client-ca-file", pki / "ca.crt", "--token-auth-file", pki / "tokens.csv"),
        *("--authorization-mode", "Node,RBAC"),
        *("--enable-admission-plugins", "NodeRestriction"),
        *("--service-account-issuer", "https://kubernetes.default.svc.cluster.local"),
        *("--service-account-key-file", pki / "sa.key"),
        *("--service-account-signing-key-file", pki / "sa.key"),
        *("--service-cluster-ip-range", SERVICE_RANGE, "--allow-privileged=true"),
        # Aggregated APIs: the server tells them who asks, and vouches by this certificate.
        *("--requestheader-client-ca-file", pki / "front-proxy-ca.crt"),
        *("--requestheader-allowed-names", FRONT_PROXY),
        *("--requestheader-extra-headers-prefix", "X-Remote-Extra-"),
        *("--requestheader-group-headers", "X-Remote-Group"),
        *("--requestheader-username-headers", "X-Remote-User"),
        *("--proxy-client-cert-file", pki / f"{FRONT_PROXY}.crt"),
        *("--proxy-client-key-file", pki / f"{FRONT_PROXY}.key"),
        "--enable-aggregator-routing=true",
        *("--kubelet-preferred-address-types", "InternalIP"),
        *("--kubelet-certificate-authority", pki / "ca.crt"),
        *("--kubelet-client-certificate", pki / "kubelet-client.crt"),
        *("--kubelet-client-key", pki / "kubelet-client.key"),
    ]
