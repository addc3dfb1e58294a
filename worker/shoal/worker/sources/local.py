"""file:// and plain paths: a .gguf file, or a directory in Hugging Face's layout."""

from pathlib import Path
from urllib.parse import unquote

from shoal.worker.sources.base import (
    Fetch,
    ModelFiles,
    ModelNotFound,
    SourceError,
    model_in_directory,
)


def fetch_path(fetch: Fetch) -> ModelFiles:
    """A plain path as a shell would hand it over, `~` included."""
    return _found(Path(fetch.location).expanduser(), fetch)


def fetch_file_uri(fetch: Fetch) -> ModelFiles:
    """file:///absolute/path; another host than this one is refused."""
    host, slash, rest = fetch.location.partition("/")
    if host not in ("", "localhost") or not slash:
        raise SourceError(
            f"{fetch.uri}: a file URI has three slashes and an absolute path: file:///models/m.gguf"
        )
    return _found(Path("/" + unquote(rest)), fetch)


def _found(path: Path, fetch: Fetch) -> ModelFiles:
    if fetch.revision is not None:
        raise SourceError(
            f"{fetch.uri}: a file has no revision, but {fetch.revision!r} is asked for; only py://"
            " and hf:// have revisions"
        )
    path = path.absolute()
    if path.is_file():
        if path.suffix != ".gguf":
            raise SourceError(
                f"{fetch.uri}: a single file must be a .gguf; for safetensors name the directory"
            )
        return ModelFiles(path, fetch.uri)
    if path.is_dir():
        return ModelFiles(model_in_directory(path, fetch), fetch.uri)
    raise ModelNotFound(f"{fetch.uri}: no such file or directory: {path}")
