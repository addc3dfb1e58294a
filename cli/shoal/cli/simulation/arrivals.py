"""Requests over virtual time: drawn from a named process, or read from a trace.

    poisson:50             50 a second on average
    steps:2x60,64x120,0x60 rate x seconds, one after the other, each a Poisson process
    wave:50,40,3600        a Poisson process whose rate is 50 + 40 sin(2 pi t / 3600)
    bursts:50,20,10        as poisson:50, but 20 requests at once, every 10 s on average

A trace is a CSV file with a header. Azure's and BurstGPT's column names are understood: a time
(TIMESTAMP, Timestamp, time or arrival; seconds, or a date), prompt tokens (ContextTokens, Request
tokens or prompt_tokens) and generated tokens (GeneratedTokens, Response tokens or output_tokens).
"""

import csv
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from math import pi, sin
from pathlib import Path
from typing import NamedTuple

from shoal.cli.errors import UsageError

_TIME = ("timestamp", "time", "arrival")
_PROMPT = ("contexttokens", "request tokens", "prompt_tokens")
_OUTPUT = ("generatedtokens", "response tokens", "output_tokens")


class Arrival(NamedTuple):
    """One request. `at` in seconds since the beginning; both token counts are at least 1."""

    at: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class TokenRange:
    """Tokens of a request: uniform between two bounds, inclusive."""

    least: int
    most: int

    def draw(self, rng: random.Random) -> int:
        return self.least + int(rng.random() * (self.most - self.least + 1))


def parse_tokens(name: str, text: str) -> TokenRange:
    """`128`, or `64-512`. UsageError for anything else."""
    least, dash, most = text.partition("-")
    try:
        found = TokenRange(int(least), int(most) if dash else int(least))
    except ValueError:
        found = TokenRange(0, 0)
    if not 1 <= found.least <= found.most <= 1_000_000:
        raise UsageError(f"{name} {text}: write a number such as 128, or a range such as 64-512")
    return found


def drawn(
    text: str, duration: float, prompt: TokenRange, output: TokenRange, rng: random.Random
) -> Iterator[Arrival]:
    """Requests of the process that `text` names, in order, for `duration` seconds at most."""
    times = _times(text, duration, rng)
    return (Arrival(at, prompt.draw(rng), output.draw(rng)) for at in times)


def length_of(text: str) -> float | None:
    """How long the process lasts by itself, in seconds; None: for ever."""
    kind, _, arguments = text.partition(":")
    return sum(seconds for _, seconds in _steps(text, arguments)) if kind == "steps" else None


def _times(text: str, duration: float, rng: random.Random) -> Iterator[float]:
    kind, _, arguments = text.partition(":")
    match kind:
        case "poisson":
            (rate,) = _numbers(text, arguments, 1)
            return _poisson(rate, lambda at: rate, 0.0, duration, rng)
        case "wave":
            mean, swing, period = _numbers(text, arguments, 3)
            if swing > mean or not period:
                raise UsageError(f"--arrivals {text}: the swing must not exceed the mean rate")
            return _poisson(
                mean + swing, lambda at: mean + swing * sin(2 * pi * at / period), 0, duration, rng
            )
        case "bursts":
            rate, size, gap = _numbers(text, arguments, 3)
            if not gap:
                raise UsageError(f"--arrivals {text}: the time between bursts must not be 0")
            return _bursts(rate, int(size), gap, duration, rng)
        case "steps":
            return _stepped(_steps(text, arguments), duration, rng)
    raise UsageError(
        f"--arrivals {text}: write poisson:RATE, steps:RATExSECONDS,..., "
        "wave:MEAN,SWING,PERIOD or bursts:RATE,SIZE,GAP"
    )


def _numbers(text: str, arguments: str, count: int) -> list[float]:
    try:
        numbers = [float(part) for part in arguments.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(0 <= number < 1e9 for number in numbers):
        raise UsageError(f"--arrivals {text}: needs {count} number(s) of 0 or more after the colon")
    return numbers


def _steps(text: str, arguments: str) -> list[tuple[float, float]]:
    steps = []
    for part in arguments.split(","):
        rate, _, seconds = part.partition("x")
        try:
            steps.append((float(rate), float(seconds)))
        except ValueError as error:
            raise UsageError(
                f"--arrivals {text}: {part!r} is no RATExSECONDS, such as 64x120"
            ) from error
    return steps


def _poisson(
    peak: float, rate: Callable[[float], float], start: float, end: float, rng: random.Random
) -> Iterator[float]:
    """By thinning (Lewis and Shedler, 1979): `rate` never exceeds `peak`."""
    at = start
    while peak > 0:
        at += rng.expovariate(peak)
        if at >= end:
            return
        if rng.random() * peak <= rate(at):
            yield at


def _stepped(
    steps: Iterable[tuple[float, float]], duration: float, rng: random.Random
) -> Iterator[float]:
    start = 0.0
    for rate, seconds in steps:
        end = min(duration, start + seconds)
        yield from _poisson(rate, lambda at, rate=rate: rate, start, end, rng)  # type: ignore[misc]  # mypy infers no lambda defaults
        start += seconds


def _bursts(
    rate: float, size: int, gap: float, duration: float, rng: random.Random
) -> Iterator[float]:
    steady = _poisson(rate, lambda at: rate, 0.0, duration, rng)
    burst = rng.expovariate(1 / gap)
    for at in steady:
        while burst <= at:
            yield from [burst] * size
            burst += rng.expovariate(1 / gap)
        yield at


def read_trace(path: Path, speed: float) -> list[Arrival]:
    """A trace's requests from time 0, `speed` times as fast. UsageError where it cannot be read."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            columns = [_column(path, rows.fieldnames or [], c) for c in (_TIME, _PROMPT, _OUTPUT)]
            found = [_row(path, number, row, columns) for number, row in enumerate(rows, 2)]
    except OSError as error:
        raise UsageError(f"--trace {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"--trace {path}: no CSV text: {error}") from error
    found.sort()
    start = found[0].at if found else 0.0
    return [arrival._replace(at=(arrival.at - start) / speed) for arrival in found]


def _column(path: Path, names: Iterable[str], wanted: tuple[str, ...]) -> str:
    for name in names:
        if name.strip().lower() in wanted:
            return name
    raise UsageError(f"--trace {path}: no column {' or '.join(wanted)} in its first line")


def _row(path: Path, number: int, row: dict[str, str], columns: list[str]) -> Arrival:
    time, prompt, output = (row[column] for column in columns)
    try:
        return Arrival(_seconds(time), max(1, int(prompt)), max(1, int(output)))
    except (TypeError, ValueError) as error:
        raise UsageError(f"--trace {path}: line {number}: {error}") from error


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text).timestamp()
