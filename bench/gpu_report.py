"""What a run on a GPU says: tables of figures, and how each goal came out."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from bench.gpu_attention import LONG_DECODE
from bench.gpu_cases import OURS, Figure
from bench.gpu_linears import PLAIN
from bench.roofline import Limits


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the benchmark."""

    device: str
    software: str
    date: str
    limits: Limits
    figures: tuple[Figure, ...]
    left_out: tuple[str, ...]  # for want of time


@dataclass(frozen=True, slots=True)
class Goal:
    """`value` of each figure or pair that it speaks of must reach `at_least`."""

    name: str
    values: tuple[tuple[str, float], ...]  # case -> value
    at_least: float

    def line(self) -> str:
        if not self.values:
            return f"| {self.name} | - | not measured |"
        worst, value = min(self.values, key=lambda pair: pair[1])
        met = sum(value >= self.at_least for _, value in self.values)
        verdict = "met" if met == len(self.values) else f"met by {met} of {len(self.values)}"
        return f"| {self.name} | {value:.2f} ({worst}) | {verdict} |"


def goals(figures: Sequence[Figure]) -> list[Goal]:
    """Shares of a limit, and ratios to cuBLAS. A decode step within 1.15 of bytes over copy
    bandwidth is a share of 1 / 1.15."""

    def shares(table: str, wanted: Callable[[Figure], bool]) -> tuple[tuple[str, float], ...]:
        return tuple(
            (figure.case, figure.share)
            for figure in figures
            if figure.table == table and figure.share is not None and wanted(figure)
        )

    plain = {
        (figure.table, figure.case): figure.median for figure in figures if figure.peer == PLAIN
    }

    def ratios(table: str) -> tuple[tuple[str, float], ...]:
        return tuple(
            (figure.case, peer / figure.median)
            for figure in figures
            if figure.table == table and figure.peer == OURS and _number(figure.case) <= 16
            if figure.median and (peer := plain.get((table, figure.case)))
        )

    return [
        Goal("decode step: share of bytes over copy bandwidth, at least 0.87",
             shares("decode step", lambda figure: figure.bound == "memory"), 1 / 1.15),
        Goal("prefill: share of measured products, at least 0.55",
             shares("prefill", lambda figure: figure.bound == "products"), 0.55),
        Goal("attention of long decode: share of copy bandwidth, at least 0.90",
             shares(LONG_DECODE, _long), 0.90),
        Goal("linear fp8, 1 to 16 rows: ratio to cuBLAS in 16 bits, at least 1.7",
             ratios("linear fp8"), 1.7),
        Goal("linear int8, 1 to 16 rows: ratio to cuBLAS in 16 bits, at least 1.7",
             ratios("linear int8"), 1.7),
        Goal("linear int4, 1 to 16 rows: ratio to cuBLAS in 16 bits, at least 2.5",
             ratios("linear int4"), 2.5),
    ]  # fmt: skip


def _long(figure: Figure) -> bool:
    """16k tokens and more of context, where bytes and not the launch decide."""
    found = re.search(r"x (\d+) tokens, KV 16 bits", figure.case)
    return figure.peer == OURS and found is not None and int(found[1]) >= 16384


def _number(case: str) -> int:
    """The first number of a case: its rows."""
    found = re.match(r"\d+", case)
    return int(found[0]) if found else 0


def markdown(run: Run) -> str:
    limits = run.limits
    rates = ", ".join(f"{kind} {rate / 1e12:,.0f}" for kind, rate in limits.multiply.items())
    lines = [
        "# Kernels and models on a GPU",
        "",
        f"`make gpu-bench` on {run.device}, {run.date}; {run.software}.",
        "",
        f"Limits of the device, measured in this run: copies {limits.copy / 1e9:,.0f} GB/s (read "
        f"and written), products {rates} TFLOP/s.",
        "",
        "A share is the time at the limit (`bench/roofline.py`) over the time taken. Caches are "
        "cold and launches replayed as graphs; models are of random weights and run through the "
        "engine's executor, host time included.",
        "",
        "| goal | worst | verdict |",
        "|---|---|---|",
        *(goal.line() for goal in goals(run.figures)),
    ]
    for table in dict.fromkeys(figure.table for figure in run.figures):
        own = [figure for figure in run.figures if figure.table == table]
        lines += [
            "",
            f"## {table}",
            "",
            "| case | peer | median (range) | share of limit | bound by | peer / shoal |",
            "|---|---|---|---|---|---|",
            *(_row(figure, own) for figure in own),
        ]
    if run.left_out:
        lines += ["", "Left out for want of time: " + "; ".join(run.left_out) + "."]
    return "\n".join(lines) + "\n"


def _row(figure: Figure, table: Sequence[Figure]) -> str:
    if figure.median is None or figure.least is None or figure.most is None:
        return f"| {figure.case} | {figure.peer} | {figure.note} | | | |"
    ours = next(
        (other.median for other in table if other.case == figure.case and other.peer == OURS), None
    )
    ratio = f"{figure.median / ours:.2f} x" if ours and figure.peer != OURS else ""
    share = "" if figure.share is None else f"{figure.share:.0%}"
    taken = _taken(figure.median, figure.least, figure.most)
    note = f"; {figure.note}" if figure.note else ""
    return f"| {figure.case} | {figure.peer} | {taken}{note} | {share} | {figure.bound} | {ratio} |"


def _taken(median: float, least: float, most: float) -> str:
    unit, factor = ("us", 1e6) if median < 1e-3 else ("ms", 1e3) if median < 1 else ("s", 1.0)
    if least == most:
        return f"{median * factor:,.1f} {unit}"
    return f"{median * factor:,.1f} ({least * factor:,.1f}-{most * factor:,.1f}) {unit}"


def dumped(run: Run) -> str:
    return json.dumps(asdict(run), indent=1) + "\n"
