"""One-layer images as docker archives, for `ctr images import`: no builder, no registry."""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HOST_FOLDERS: Final = (
    *("usr", "etc/ssl", "etc/alternatives", "root", "home", "var/run", "var/tmp", "run"),
    *("proc", "sys", "dev", "opt", "srv"),
)
_PASSWD: Final = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"


def write_image(
    path: Path,
    name: str,
    *,
    files: Mapping[str, Path] | None = None,
    entrypoint: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    host_root: bool = False,
) -> None:
    """An image of `files` (destination -> source) and `environ`.

    `host_root` adds an empty root with merged-/usr links, into which the runtime binds the
    host's user land.
    """
    layer = _layer(files or {}, host_root)
    variables = {"PATH": SYSTEM_PATH, **(environ or {})}
    digest = hashlib.sha256(layer).hexdigest()
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "created": "1970-01-01T00:00:00Z",
            "config": {
                "Env": [f"{key}={it}" for key, it in variables.items()],
                "Entrypoint": list(entrypoint) or None,
                "WorkingDir": "/",
            },
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
            "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "shoal"}],
        }
    ).encode()
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    layer_name = f"{digest}/layer.tar"
    manifest = [{"Config": config_name, "RepoTags": [name], "Layers": [layer_name]}]
    with tarfile.open(path, "w") as archive:
        _add(archive, config_name, config)
        _add(archive, layer_name, layer)
        _add(archive, "manifest.json", json.dumps(manifest).encode())


def _layer(files: Mapping[str, Path], host_root: bool) -> bytes:
    buffer = io.BytesIO()
    made: set[str] = set()
    with tarfile.open(fileobj=buffer, mode="w") as archive:

        def folder(name: str, mode: int = 0o755) -> None:
            if name in ("", ".") or name in made:
                return
            folder(str(PurePosixPath(name).parent))
            made.add(name)
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            archive.addfile(entry)

        def file(name: str, data: bytes, mode: int = 0o644) -> None:
            folder(str(PurePosixPath(name).parent))
            _add(archive, name, data, mode)

        if host_root:
            for name in HOST_FOLDERS:
                folder(name)
            folder("tmp", 0o1777)
            for name in ("bin", "sbin", "lib", "lib64"):
                link = tarfile.TarInfo(name)
                link.type, link.linkname = tarfile.SYMTYPE, f"usr/{name}"
                archive.addfile(link)
            file("etc/passwd", _PASSWD)
            file("etc/group", b"root:x:0:\nnogroup:x:65534:\n")
            file("etc/nsswitch.conf", b"hosts: files dns\n")
            file("etc/ld.so.cache", b"")
        for destination, source in files.items():
            file(destination.strip("/"), source.read_bytes(), source.stat().st_mode & 0o777)
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    archive.addfile(entry, io.BytesIO(data))
