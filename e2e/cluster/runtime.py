"""containerd: started with the host's user land bound into every container, stopped with all
that it held.

A pod of image `localhost/base:1` sees the host's /usr, this interpreter, its virtual environment
and this checkout read-only, so that a worker runs the code of the checkout in a real container
and no image of gigabytes is built for a test.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from e2e.cluster import wheels
from e2e.cluster.archive import SYSTEM_PATH, write_image
from e2e.cluster.command import attempt, run, wait_for
from e2e.cluster.layout import CHECKOUT, ClusterError, Layout
from e2e.cluster.processes import Processes

BASE_IMAGE: Final = "localhost/base:1"
_SYSTEM: Final = ("/usr", "/etc/ssl", "/etc/alternatives", "/etc/ld.so.cache")


def binds() -> list[Path]:
    """Host paths that every container sees, read-only, where they are on the host."""
    found = [*map(Path, (*_SYSTEM, sys.base_prefix, sys.prefix)), CHECKOUT]
    paths = sorted({path.resolve() for path in found if path.exists()})
    # A path below another one is there already.
    return [path for path in paths if not any(other in path.parents for other in paths)]


def ctr(layout: Layout, *arguments: str | Path, seconds: float = 60) -> str:
    return run("ctr", "-a", layout.socket, "-n", "k8s.io", *arguments, seconds=seconds)


def start(layout: Layout, processes: Processes) -> None:
    """Raises ClusterError where containerd does not answer."""
    spec = json.loads(run("ctr", "oci", "spec"))
    (layout.conf / "base-spec.json").write_text(json.dumps(base_spec(spec, binds())))
    processes.start("containerd", "containerd", "--config", layout.conf / "containerd.toml")
    wait_for("containerd", 20, lambda: attempt("ctr", "-a", layout.socket, "version", seconds=5))


def base_spec(spec: Mapping[str, object], paths: Sequence[Path]) -> dict[str, object]:
    """containerd's own container spec, with `paths` mounted."""
    mounts, process = spec["mounts"], spec["process"]
    assert isinstance(mounts, list) and isinstance(process, dict)
    bound = [
        {
            "destination": str(path),
            "type": "bind",
            "source": str(path),
            # The checkout holds the mounts of other containers: not those.
            "options": ["bind" if path == CHECKOUT else "rbind", "ro", "nosuid", "nodev"],
        }
        for path in paths
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
    environ = {"PATH": f"{Path(sys.prefix) / 'bin'}:{SYSTEM_PATH}", **wheels.environ()}
    write_image(images / "base.tar", BASE_IMAGE, environ=environ, host_root=True)
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


def remove_containers(layout: Layout) -> None:
    """Kills and removes whatever still runs."""
    for kind, *how in (("tasks", "rm", "-f"), ("containers", "rm")):
        try:
            names = ctr(layout, kind, "ls", "-q").split()
        except ClusterError:
            return  # containerd is gone, and its shims with the cgroups below
        for name in names:
            attempt("ctr", "-a", layout.socket, "-n", "k8s.io", kind, *how, name)


def unmount_all(layout: Layout) -> list[str]:
    """What is still mounted under the run folder after all was tried."""
    for _ in range(3):
        for mount in _mounts(layout):
            if not attempt("umount", mount):
                attempt("umount", "-l", mount)
    return _mounts(layout)


def remove_cgroups() -> None:
    for root in (*Path("/sys/fs/cgroup").glob("*/kubepods"), Path("/sys/fs/cgroup/kubepods")):
        for folder, _, _ in os.walk(root, topdown=False):
            try:
                Path(folder).rmdir()
            except OSError:
                continue  # a process is just leaving it


def _mounts(layout: Layout) -> list[str]:
    lines = Path("/proc/mounts").read_text().splitlines()
    below = f"{layout.run}/"
    return sorted((it.split()[1] for it in lines if it.split()[1].startswith(below)), reverse=True)
