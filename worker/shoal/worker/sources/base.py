"""What every model source shares: the result, its error and the request handed to a source."""

import errno
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Called with what is happening and the share of it that is done, None where that is unknown.
Progress = Callable[[str, float | None], None]

_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+!/-]*")


class SourceError(Exception):
    """The model's files could not be had; the message says why and what to do."""


class ModelNotFound(SourceError):
    """There is no such model, or it may not be had: trying again does not help."""


class NoSpace(SourceError):
    """The cache directory's volume is full."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this machine's disk."""

    path: Path  # a .gguf file, or a directory with config.json and *.safetensors
    uri: str
    revision: str | None = None  # what was found: a package version or a commit; None: unversioned


@dataclass(frozen=True, slots=True)
class Fetch:
    """One request to a source. `location` is the URI without its scheme."""

    uri: str
    location: str
    revision: str | None
    cache_dir: Path
    progress: Progress
    deadline_seconds: float


def checked_revision(fetch: Fetch) -> str | None:
    """The revision, once it is sure that no tool can take it for an option or a path."""
    revision = fetch.revision
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise SourceError(f"{fetch.uri}: {revision!r} is not a revision (e.g. 1.2.0, main)")
    return revision


def out_of_space(error: BaseException | str) -> bool:
    """Whether this error, or tool's complaint, is about a full disk or quota."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    return "No space left on device" in text or "Disk quota exceeded" in text


def no_space(fetch: Fetch, folder: Path) -> NoSpace:
    """The error of a download that filled the volume of `folder`."""
    while not folder.exists():
        folder = folder.parent
    disk = shutil.disk_usage(folder)
    return NoSpace(
        f"{fetch.uri}: the volume of {folder} is too small for it ({disk.free / 1e9:.2f} GB free of"
        f" {disk.total / 1e9:.2f} GB): no space left. Remove models that nobody needs, or use a"
        " larger volume (spec.cache on Kubernetes, SHOAL_CACHE_DIR elsewhere)"
    )


def single_gguf(candidates: list[Path], fetch: Fetch, where: str) -> Path:
    """The one .gguf among `candidates`; none or several raise a SourceError that lists them."""
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise SourceError(f"{fetch.uri}: {where} holds no .gguf file and no safetensors model")
    names = ", ".join(sorted(path.name for path in candidates))
    raise SourceError(
        f"{fetch.uri}: {where} holds {len(candidates)} .gguf files, name one in the URI: {names}"
    )


def model_in_directory(directory: Path, fetch: Fetch) -> Path:
    """`directory` if it holds a Hugging Face model, else the one .gguf in it."""
    if (directory / "config.json").is_file() and any(directory.glob("*.safetensors")):
        return directory
    return single_gguf(list(directory.glob("*.gguf")), fetch, str(directory))
