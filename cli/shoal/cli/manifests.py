"""Reads the YAML files that a command line names."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.api.types import InferenceService, InvalidManifest, parse_manifest
from shoal.cli.errors import UsageError

STDIN = "-"
_SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True, slots=True)
class Source:
    """One text with documents, and what to call it in an error."""

    label: str
    text: str


def load(filenames: Sequence[str], *, one_namespace: bool = True) -> list[InferenceService]:
    """All services of the files, in order. `one_namespace`: a name stands for one service, as on
    one machine; else two namespaces may each have one of that name.

    Raises CliError (exit code 2) with a line per problem; nothing is returned if any is wrong.
    """
    services: dict[tuple[str, str], InferenceService] = {}
    origin: dict[tuple[str, str], str] = {}
    problems: list[str] = []
    for source in _sources(filenames):
        try:
            found = parse_manifest(source.text)
        except InvalidManifest as error:
            problems += [f"{source.label}: {line}" for line in str(error).splitlines()]
            continue
        for service in found:
            name = service.metadata.name
            key = ("" if one_namespace else service.metadata.namespace, name)
            if key in services:
                problems.append(
                    f"{source.label}: metadata.name: {name!r} is in {origin[key]} already; "
                    "give each service a name of its own"
                )
            services[key], origin[key] = service, source.label
    if problems:
        raise UsageError("\n".join(problems))
    return list(services.values())


def watched_paths(filenames: Sequence[str]) -> list[Path]:
    """The files behind `filenames` as they are now; standard input is none."""
    paths: list[Path] = []
    for filename in filenames:
        if filename != STDIN:
            paths += _files_of(Path(filename))
    return paths


def _sources(filenames: Sequence[str]) -> list[Source]:
    sources = []
    for filename in filenames:
        if filename == STDIN:
            sources.append(Source("standard input", sys.stdin.read()))
            continue
        paths = _files_of(Path(filename))
        if not paths:
            raise UsageError(f"{filename}: no {', '.join(_SUFFIXES)} file in this folder")
        sources += [Source(str(path), _read(path)) for path in paths]
    return sources


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(child for child in path.iterdir() if child.suffix in _SUFFIXES)
    return [path]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
