"""Tables and plots of a benchmark: medians with ranges, ratios taken round by round."""

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Series:
    """The figures of one peer on one workload, one a round."""

    workload: str
    peer: str
    values: list[float]


def spread(values: Sequence[float], digits: int = 0) -> str:
    """`median (least-most)`"""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


def table(series: Sequence[Series], units: Mapping[str, str], reference: str) -> str:
    """Markdown: a row per workload and peer, with the reference's ratio to that peer."""
    by_key = {(one.workload, one.peer): one.values for one in series}
    lines = [
        f"| workload | peer | median (range) | {reference} / peer |",
        "|---|---|---|---|",
    ]
    for one in series:
        own = by_key[one.workload, reference]
        ratios = [a / b for a, b in zip(own, one.values, strict=True)]
        digits = 2 if units[one.workload] == "s" else 0
        ratio = "" if one.peer == reference else f"{spread(ratios, 2)} x"
        lines.append(
            f"| {one.workload} | {one.peer} | "
            f"{spread(one.values, digits)} {units[one.workload]} | {ratio} |"
        )
    return "\n".join(lines)


def busy() -> str:
    """What else the machine did: figures of one that is shared say little about time."""
    load, cores = os.getloadavg()[2], os.cpu_count()
    return f"Load of the machine over the last 15 minutes: {load:.1f} on {cores} cores."


def machine() -> str:
    """The processor's name and how many cores this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    model = platform.processor() or platform.machine()
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return f"{len(os.sched_getaffinity(0))} cores of {model}"


def plot_ratios(
    series: Sequence[Series], higher_is_better: Mapping[str, bool], reference: str, path: Path
) -> None:
    """How many times as fast as each peer the reference is, per workload."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_key = {(one.workload, one.peer): one.values for one in series}
    names = list(dict.fromkeys(one.workload for one in series))
    peers = [p for p in dict.fromkeys(one.peer for one in series) if p != reference]
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    width = 0.8 / max(1, len(peers))
    for index, peer in enumerate(peers):
        speedups = []
        for name in names:
            pairs = zip(by_key[name, reference], by_key[name, peer], strict=True)
            speedups.append([a / b if higher_is_better[name] else b / a for a, b in pairs])
        middles = [statistics.median(values) for values in speedups]
        errors = [
            [m - min(values) for m, values in zip(middles, speedups, strict=True)],
            [max(values) - m for m, values in zip(middles, speedups, strict=True)],
        ]
        positions = [x + index * width for x in range(len(names))]
        axes.bar(positions, middles, width, yerr=errors, capsize=3, label=f"vs {peer}")
    axes.axhline(1, color="grey", linewidth=1)
    axes.set_xticks([x + width * (len(peers) - 1) / 2 for x in range(len(names))], names)
    axes.set_ylabel(f"times as fast ({reference})")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
