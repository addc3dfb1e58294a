"""Small documents on disk that readers never see half written.

Every write goes to a temporary file in the same directory and is renamed over the target, so
a reader finds the old text or the new, and a writer that is killed leaves the old.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"


def write_text(path: Path, text: str) -> bool:
    """Makes `path` hold `text`. Returns whether anything changed; at rest nothing is written."""
    if read_text(path) == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(TEMPORARY_SUFFIX, f".{path.name}-", path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return True


def write_json(path: Path, document: Mapping[str, object]) -> bool:
    """`write_text` of a JSON object, indented for people."""
    return write_text(path, json.dumps(document, indent=2) + "\n")


def read_text(path: Path) -> str | None:
    """The text of `path`, or None where there is no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def read_json(path: Path) -> dict[str, object] | None:
    """The JSON object in `path`; None where there is none or the text is not one."""
    text = read_text(path)
    if text is None:
        return None
    try:
        document = json.loads(text)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def documents(folder: Path, suffix: str) -> list[Path]:
    """The documents of a folder by name, temporary files left out; [] where there is none."""
    return sorted(path for path in folder.glob(f"*{suffix}") if not path.name.startswith("."))


def signature(folder: Path, suffix: str) -> tuple[tuple[str, int, int, int], ...]:
    """Changes whenever a document of the folder is written, added or removed."""
    entries = []
    for path in documents(folder, suffix):
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        entries.append((path.name, stat.st_ino, stat.st_mtime_ns, stat.st_size))
    return tuple(entries)


def wait_until(
    ready: Callable[[], bool],
    timeout: float,
    *,
    clock: Callable[[], float],
    sleep: Callable[[float], object],
    interval: float = 0.1,
) -> bool:
    """Asks `ready` every `interval` seconds until it says yes; False after `timeout` seconds."""
    deadline = clock() + timeout
    while not ready():
        if clock() >= deadline:
            return False
        sleep(interval)
    return True
