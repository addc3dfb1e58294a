"""containerd: started with the host's user land bound into every container, stopped with all
that it held.

A pod of image `localhost/base:1` and runtime class `host` sees the host's /usr, this interpreter,
its virtual environment and this checkout read-only, so that a worker runs the code of the checkout
in a real container and no image of gigabytes is built for a test. Others see their image alone.
"""

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import psutil

from e2e.cluster import wheels
from e2e.cluster.archive import SYSTEM_PATH, write_image
from e2e.cluster.command import attempt, run, wait_for
from e2e.cluster.layout import CHECKOUT, ClusterError, Layout
from e2e.cluster.processes import Processes

BASE_IMAGE: Final = "localhost/base:1"
HOST_CLASS: Final = "host"
ROOMS: Final = ("api", "kernels", "worker", "router", "operator", "cli")
_CHECKOUT: Final = Path("/srv/checkout")
_VENV: Final = Path("/srv/venv")
_SYSTEM: Final = ("/usr", "/etc/ssl", "/etc/alternatives", "/etc/ld.so.cache")


def binds() -> dict[Path, Path]:
    """What every container sees of the host, read-only: path in the container -> on the host.

    The checkout and its environment have places of their own: where they lie on the host, a pod
    may have a volume, as on /tmp.
    """
    system = [Path(one) for one in (*_SYSTEM, sys.base_prefix) if Path(one).exists()]
    kept = [path for path in system if not any(other in path.parents for other in system)]
    return {**{path: path for path in kept}, _CHECKOUT: CHECKOUT, _VENV: Path(sys.prefix)}


def environ() -> dict[str, str]:
    """What makes `python` in a container the checkout's."""
    rooms = (_CHECKOUT / room for room in ROOMS)
    return {
        "PATH": f"{_VENV / 'bin'}:{SYSTEM_PATH}",
        "PYTHONPATH": ":".join(map(str, rooms)),
        **wheels.environ(),
    }


def ctr(layout: Layout, *arguments: str | Path, seconds: float = 60) -> str:
    return run("ctr", "-a", layout.socket, "-n", "k8s.io", *arguments, seconds=seconds)


def start(layout: Layout, processes: Processes) -> None:
    """Raises ClusterError where containerd does not answer."""
    spec = json.loads(run("ctr", "oci", "spec"))
    for name, paths in (("plain", {}), ("host", binds())):
        (layout.conf / f"{name}-spec.json").write_text(json.dumps(base_spec(spec, paths)))
    processes.start("containerd", "containerd", "--config", layout.conf / "containerd.toml")
    wait_for("containerd", 20, lambda: attempt("ctr", "-a", layout.socket, "version", seconds=5))


def base_spec(spec: Mapping[str, object], paths: Mapping[Path, Path]) -> dict[str, object]:
    """containerd's own container spec, with `paths` mounted (in the container -> on the host)."""
    mounts, process = spec["mounts"], spec["process"]
    assert isinstance(mounts, list) and isinstance(process, dict)
    bound = [
        {
            "destination": str(path),
            "type": "bind",
            "source": str(source),
            # The checkout holds the mounts of other containers: not those.
            "options": ["bind" if source == CHECKOUT else "rbind", "ro", "nosuid", "nodev"],
        }
        for path, source in paths.items()
    ]
    # Inherited: raising a hard limit needs CAP_SYS_RESOURCE, which root has not got everywhere.
    inherited = {key: value for key, value in process.items() if key != "rlimits"}
    return {**spec, "mounts": [*mounts, *bound], "process": inherited}


def import_image(layout: Layout, archive: Path) -> None:
    ctr(layout, "images", "import", archive, seconds=300)


def import_own_images(layout: Layout, binaries: Path) -> None:
    """The pause and CoreDNS programs, and the root that worker pods run in."""
    images = layout.run / "images"
    images.mkdir(exist_ok=True)
    write_image(images / "base.tar", BASE_IMAGE, environ=environ(), host_root=True)
    for name in ("pause", "coredns"):
        write_image(
            images / f"{name}.tar",
            f"localhost/{name}:1",
            files={f"/{name}": binaries / name},
            entrypoint=[f"/{name}"],
        )
    for archive in sorted(images.glob("*.tar")):
        import_image(layout, archive)
        archive.unlink()


def has_image(layout: Layout, name: str) -> bool:
    return name in ctr(layout, "images", "ls", "-q").split()


def tag_image(layout: Layout, name: str, other: str) -> None:
    """Another name for an image."""
    ctr(layout, "images", "tag", "--force", name, other)


def remove_containers(layout: Layout) -> None:
    """Kills and removes whatever still runs."""
    for kind, *how in (("tasks", "rm", "-f"), ("containers", "rm")):
        try:
            names = ctr(layout, kind, "ls", "-q").split()
        except ClusterError:
            return
        for name in names:
            attempt("ctr", "-a", layout.socket, "-n", "k8s.io", kind, *how, name)


def end_shims(layout: Layout) -> None:
    """Ends containerd's helpers of containers that came and went while it was being stopped."""
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "containerd-shim" in " ".join(command[:1]) and str(layout.socket) in command:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def unmount_all(layout: Layout) -> list[str]:
    """What is still mounted under the run folder after all was tried."""
    for _ in range(3):
        for mount in _mounts(layout):
            if not attempt("umount", mount):
                attempt("umount", "-l", mount)
    return _mounts(layout)


def remove_cgroups(*roots: Path) -> None:
    """Control groups and what is below them; those of the first node's kubelet by default."""
    own = (*Path("/sys/fs/cgroup").glob("*/kubepods"), Path("/sys/fs/cgroup/kubepods"))
    for root in roots or own:
        for folder, _, _ in os.walk(root, topdown=False):
            try:
                Path(folder).rmdir()
            except OSError:
                continue  # a process is just leaving it


def _mounts(layout: Layout) -> list[str]:
    lines = Path("/proc/mounts").read_text().splitlines()
    below = f"{layout.run}/"
    return sorted((it.split()[1] for it in lines if it.split()[1].startswith(below)), reverse=True)
