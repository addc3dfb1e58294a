"""Tuned configurations: how a kernel is tiled for a shape on a device, from measured tables.

A configuration is what a launch adds to its arguments: constexpr tile sizes, `num_warps` and
`num_stages`, so `kernel[grid](..., **config)`. Tables are JSON files under `tuned/`, one a
device, written by `python -m shoal.kernels.tune` on that device; without one a wrapper's own
default holds.

A shape names its sizes. `rows` changes from step to step and is looked up by the next measured
size up (the largest, beyond it); every other size must equal a measured one.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from shoal.kernels.gpu.variant import Variant

Shape = Mapping[str, int]
Config = Mapping[str, int]

TUNED = Path(__file__).parent / "tuned"


@dataclass(frozen=True, slots=True)
class Entry:
    """The fastest configuration that was measured for a shape."""

    shape: Shape
    config: Config
    microseconds: float


@dataclass(frozen=True, slots=True)
class Table:
    """What was measured on one kind of device."""

    device: str  # as torch names it
    capability: int  # 90 for 9.0
    software: str  # driver, CUDA, torch and triton that it was measured with
    kernels: Mapping[str, tuple[Entry, ...]]  # name in `Tunable` -> entries

    def find(self, kernel: str, shape: Shape) -> Entry | None:
        rows = shape.get("rows", 0)
        fixed = _without_rows(shape)
        alike = [
            entry for entry in self.kernels.get(kernel, ()) if _without_rows(entry.shape) == fixed
        ]
        above = [entry for entry in alike if entry.shape.get("rows", 0) >= rows]
        if above:
            return min(above, key=lambda entry: entry.shape.get("rows", 0))
        return max(alike, key=lambda entry: entry.shape.get("rows", 0), default=None)


def _without_rows(shape: Shape) -> dict[str, int]:
    return {name: size for name, size in shape.items() if name != "rows"}


@dataclass(frozen=True, slots=True)
class Tunable:
    """What `python -m shoal.kernels.tune` measures, and the compile proof builds again."""

    kernel: str  # the name that the wrapper gives to `choose`
    shapes: tuple[Shape, ...]
    configs: tuple[Config, ...]  # candidates; those that do not fit a device are skipped there
    # (shape, device) -> a function that launches the kernel with a configuration
    prepare: Callable[[Shape, torch.device], Callable[[Config], object]]
    variant: Callable[[Shape, Config], Variant]  # the compilation that such a launch makes


def choose(
    kernel: str, default: Config, device: torch.device, home: Path = TUNED, **shape: int
) -> dict[str, int]:
    """The tuned configuration of the kernel for this shape on this device, else the default."""
    if device.type != "cuda":
        return dict(default)
    table = load(device_name(device), home)
    entry = table.find(kernel, shape) if table is not None else None
    return dict(default if entry is None else entry.config)


@cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@cache
def load(device: str, home: Path = TUNED) -> Table | None:
    """The table of a device's name, or None; a file is read once in a process."""
    path = path_of(device, home)
    return read(path) if path.exists() else None


def path_of(device: str, home: Path = TUNED) -> Path:
    return home / (re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".json")


def tables(home: Path = TUNED) -> tuple[Table, ...]:
    """Every table there is, by the name of its file."""
    return tuple(read(path) for path in sorted(home.glob("*.json")))


def read(path: Path) -> Table:
    """Raises ValueError, which names the file, where it is no table."""
    try:
        found = json.loads(path.read_text())
        return Table(
            device=found["device"],
            capability=found["capability"],
            software=found["software"],
            kernels={
                kernel: tuple(
                    Entry(entry["shape"], entry["config"], entry["microseconds"])
                    for entry in entries
                )
                for kernel, entries in found["kernels"].items()
            },
        )
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is no table of tuned configurations ({error!r}): "
            f"write it again with python -m shoal.kernels.tune"
        ) from error


def write(table: Table, home: Path = TUNED) -> Path:
    """Writes the table to the file of its device, one entry a line; returns the path."""
    home.mkdir(exist_ok=True)
    path = path_of(table.device, home)
    kernels = ",\n".join(
        f"  {json.dumps(kernel)}: [\n"
        + ",\n".join("   " + json.dumps(_entry(entry)) for entry in entries)
        + "\n  ]"
        for kernel, entries in sorted(table.kernels.items())
    )
    head = {"device": table.device, "capability": table.capability, "software": table.software}
    lines = ",\n ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items())
    path.write_text(f'{{\n {lines},\n "kernels": {{\n{kernels}\n }}\n}}\n')
    return path


def _entry(entry: Entry) -> dict[str, Any]:
    return {
        "shape": dict(entry.shape),
        "config": dict(entry.config),
        "microseconds": round(entry.microseconds, 2),
    }
