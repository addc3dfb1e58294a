"""Images of router and operator from images/, on a Debian made here: no registry is asked.

An image's tag is a hash of all that goes into it, so it is built again only when that changes.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from e2e.cluster import runtime
from e2e.cluster.binaries import locked
from e2e.cluster.command import Say, attempt, run
from e2e.cluster.layout import CHECKOUT, Layout

ROOMS: Final[Mapping[str, tuple[str, ...]]] = {
    "router": ("api", "router"),
    "operator": ("api", "operator"),
}
BASE: Final = "localhost/debian-python:bookworm"
KEPT: Final = 2  # archives of a component, newest first
SECONDS: Final = 900.0


def image(component: str) -> str:
    """The image's name, tag included, for the sources as they are."""
    return f"localhost/shoal-{component}:{tag(component)}"


def tag(component: str) -> str:
    digest = hashlib.sha256()
    for path in _inputs(component):
        digest.update(str(path.relative_to(CHECKOUT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def provide(layout: Layout, component: str, say: Say) -> str:
    """Builds and imports the image where it is not there yet; its name. Raises ClusterError."""
    name = image(component)
    if not runtime.has_image(layout, name):
        archive = build(layout, component, say)
        runtime.import_image(layout, archive)
        say(f"{name} imported")
    return name


def build(layout: Layout, component: str, say: Say) -> Path:
    """The image as a docker archive. Raises ClusterError."""
    name = image(component)
    folder = layout.cache / "images"
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{component}-{tag(component)}.tar"
    with locked(layout.cache / "images.lock"):
        if archive.exists():
            archive.touch()
            return archive
        buildah = _buildah(layout)
        _base(layout, buildah, say)
        run(
            *(*buildah, "bud", "--isolation", "chroot", "--layers"),
            *("--build-arg", f"BASE={BASE}", "--tag", name),
            *("--volume", f"{_pip_settings(layout)}:/etc/pip.conf:ro"),
            *("--volume", "/etc/ssl/certs:/etc/ssl/certs:ro"),
            *("--file", CHECKOUT / f"images/Dockerfile.{component}", CHECKOUT),
            seconds=SECONDS,
        )
        partial = archive.with_suffix(".part")
        partial.unlink(missing_ok=True)
        run(*buildah, "push", name, f"docker-archive:{partial}:{name}", seconds=SECONDS)
        partial.rename(archive)
        say(f"{name} built")
        for old in sorted(folder.glob(f"{component}-*.tar"), key=_age)[KEPT:]:
            old.unlink()
            stale = f"localhost/shoal-{component}:{old.stem.removeprefix(f'{component}-')}"
            run(*buildah, "rmi", "--force", stale)
    return archive


def _inputs(component: str) -> Iterator[Path]:
    """Files that change what the image is."""
    yield CHECKOUT / f"images/Dockerfile.{component}"
    for name in (".dockerignore", "images/requirements.py", "constraints.txt", "pyproject.toml"):
        yield CHECKOUT / name
    for room in ROOMS[component]:
        for path in sorted((CHECKOUT / room / "shoal").rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                yield path


def _base(layout: Layout, buildah: list[str], say: Say) -> None:
    """Debian with Python, as an image."""
    if attempt(*buildah, "inspect", "--type", "image", BASE):
        return
    say("making a Debian with Python (debootstrap), once: about a minute")
    scratch = Path(tempfile.mkdtemp(dir=layout.cache, prefix="debian-"))
    try:
        packages = "ca-certificates,python3,python3-venv"
        run(
            *("debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", scratch),
            seconds=SECONDS,
        )
        shutil.rmtree(scratch / "var/cache/apt/archives", ignore_errors=True)
        container = run(*buildah, "from", "scratch").strip()
        run(*buildah, "add", container, scratch, "/", seconds=SECONDS)
        run(*buildah, "commit", "--rm", container, BASE, seconds=SECONDS)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _buildah(layout: Layout) -> list[str]:
    """The command with a storage of our own."""
    storage = layout.cache / "buildah"
    storage.mkdir(exist_ok=True)
    how = ["--storage-driver", "overlay"]
    return ["buildah", *how, "--root", str(storage / "root"), "--runroot", str(storage / "run")]


def _pip_settings(layout: Layout) -> Path:
    """pip inside the build asks where pip of this machine asks."""
    lines = ["[global]", "cert = /etc/ssl/certs/ca-certificates.crt"]
    for setting in ("index-url", "extra-index-url", "proxy"):
        if value := os.environ.get(f"PIP_{setting.upper().replace('-', '_')}"):
            lines.append(f"{setting} = {value}")
    path = layout.cache / "pip.conf"
    path.write_text("\n".join(lines) + "\n")
    return path


def _age(path: Path) -> float:
    return -path.stat().st_mtime
