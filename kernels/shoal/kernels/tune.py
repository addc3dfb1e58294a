"""Measures configurations of the GPU kernels on this machine's device and keeps the fastest.

`python -m shoal.kernels.tune [kernel ...]` writes the table of this device under
kernels/gpu/tuned/ (see `shoal.kernels.gpu.configs`). Entries of kernels that are not named stay
as they are. The compile proof builds every entry from then on.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from shoal.kernels.compile_proof import tunables
from shoal.kernels.gpu.configs import (
    TUNED,
    Config,
    Entry,
    Shape,
    Table,
    Tunable,
    device_name,
    path_of,
    read,
    write,
)
from shoal.kernels.measure import Clock, CudaClock, software


def tune(
    tunable: Tunable, clock: Clock, seconds: float, say: Callable[[str], None]
) -> tuple[Entry, ...]:
    """The fastest candidate for each shape, those left out that cannot run here: a device may
    lack room or an instruction. `seconds` for each candidate, about. Raises RuntimeError for a
    shape that none runs for."""
    entries = []
    for shape in tunable.shapes:
        launch = tunable.prepare(shape, clock.device)
        found: list[tuple[float, Config]] = []
        for config in tunable.configs:
            try:
                median = clock.measure(partial(launch, config), seconds).median
            except Exception as error:
                why = str(error).strip().partition("\n")[0][:100]
                say(f"{tunable.kernel} {_words(shape)}: not {_words(config)}: {why}")
                continue
            found.append((median, config))
        if not found:
            raise RuntimeError(f"no configuration of {tunable.kernel} runs for {dict(shape)}")
        best, config = min(found, key=lambda pair: pair[0])
        slowest = max(found, key=lambda pair: pair[0])[0]
        say(
            f"{tunable.kernel} {_words(shape)}: {best * 1e6:.1f} us with {_words(config)}, "
            f"{slowest / best:.1f} x faster than the slowest of {len(found)}"
        )
        entries.append(Entry(shape, config, best * 1e6))
    return tuple(entries)


def _words(sizes: Shape | Config) -> str:
    return " ".join(f"{name}={size}" for name, size in sizes.items())


def merged(old: Table | None, new: Table) -> Table:
    """The new table, with the old one's entries of kernels that were not measured again."""
    return new if old is None else replace(new, kernels={**old.kernels, **new.kernels})


def chosen(names: Sequence[str], known: Iterable[Tunable]) -> list[Tunable]:
    """Those of the names, all without any. Raises ValueError for a name that is not known."""
    by_name = {tunable.kernel: tunable for tunable in known}
    if unknown := sorted(set(names) - set(by_name)):
        raise ValueError(f"no kernel to tune is named {unknown}: there are {sorted(by_name)}")
    return [by_name[name] for name in names or sorted(by_name)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shoal.kernels.tune")
    parser.add_argument("kernels", nargs="*", help="names of kernels; all that can be tuned")
    parser.add_argument("--seconds", type=float, default=0.05, help="for each configuration")
    parser.add_argument("--home", type=Path, default=TUNED, help="where the table is written")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("Tuning measures a GPU, and torch finds none on this machine.", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        wanted = chosen(given.kernels, tunables())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    clock = CudaClock(device)
    major, minor = torch.cuda.get_device_capability(device)
    for each in wanted:
        measured = Table(
            device=device_name(device),
            capability=10 * major + minor,
            software=software(),
            kernels={each.kernel: tune(each, clock, given.seconds, print)},
        )
        # After every kernel: a run that is cut short has kept what it measured.
        path = write(merged(_kept(measured.device, given.home), measured), given.home)
        print(f"wrote {each.kernel} to {path}")
    return 0


def _kept(device: str, home: Path) -> Table | None:
    path = path_of(device, home)
    return read(path) if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
