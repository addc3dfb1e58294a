"""The cluster's programs, built once for all checkouts from Go modules."""

import fcntl
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from e2e.cluster.command import Say, run
from e2e.cluster.layout import HERE, KUBERNETES, KWOK, ClusterError, Layout

SOURCES: Final = HERE / "sources"
BUILD_SECONDS: Final = 3600.0
_VERSION: Final = "k8s.io/component-base/version"
# k8snode is all of these, by the name it is called by.
LINKS: Final = (
    *("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet"),
    "kube-proxy",
)


def folder(layout: Layout) -> Path:
    """Where the binaries of the present sources and versions are, built or not."""
    digest = hashlib.sha256(f"{KUBERNETES} {KWOK}".encode())
    for path in sorted(SOURCES.rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(SOURCES)).encode() + path.read_bytes())
    return layout.cache / f"cluster-{digest.hexdigest()[:16]}"


def build(layout: Layout, say: Say) -> Path:
    """The folder with every binary. Takes 12 minutes the first time. Raises ClusterError."""
    done = folder(layout)
    if done.exists():
        return done
    layout.cache.mkdir(parents=True, exist_ok=True)
    with locked(layout.cache / "build.lock"):
        if done.exists():
            return done
        if shutil.which("go") is None:
            raise ClusterError(
                "the test cluster is built from Go modules, once: install Go 1.24 or later "
                "(https://go.dev/dl), or set KUBECONFIG to a cluster that may be thrown away"
            )
        say("building Kubernetes, CoreDNS and kwok from Go modules, once: about 12 minutes")
        scratch = Path(tempfile.mkdtemp(dir=layout.cache, prefix="building-"))
        try:
            _build_all(scratch, say)
            scratch.chmod(0o755)
            scratch.rename(done)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return done


def _build_all(target: Path, say: Say) -> None:
    stamp = {
        "gitVersion": f"v{KUBERNETES}",
        "gitMajor": KUBERNETES.split(".")[0],
        "gitMinor": KUBERNETES.split(".")[1],
        "gitTreeState": "clean",
        "gitCommit": "0" * 40,
        "buildDate": "1970-01-01T00:00:00Z",
    }
    flags = " ".join(["-s", "-w", *(f"-X {_VERSION}.{key}={it}" for key, it in stamp.items())])
    for name in ("k8snode", "coredns", "pause"):
        _go(SOURCES / name, "build", "-trimpath", "-o", target / name, "-ldflags", flags, ".")
        say(f"built {name}")
    module = f"sigs.k8s.io/kwok/cmd/kwok@{KWOK}"
    _go(SOURCES, "install", "-trimpath", "-ldflags", "-s -w", module, gobin=target)
    say("built kwok")
    for name in LINKS:
        (target / name).symlink_to("k8snode")


def _go(cwd: Path, *arguments: str | Path, gobin: Path | None = None) -> None:
    environ = {"CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false"}
    if gobin is not None:
        environ["GOBIN"] = str(gobin)
    run("go", *arguments, cwd=cwd, environ=environ, seconds=BUILD_SECONDS)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process of this machine at a time."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
