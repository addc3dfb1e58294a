"""What a simulation's outcome looks like: a table over time, a summary, a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

from shoal.api.workload import CostSpec
from shoal.cli.errors import CliError
from shoal.cli.output import format_table
from shoal.cli.simulation.world import Outcome, Sample

ROWS = 24


@dataclass(frozen=True, slots=True)
class Price:
    """What a replica costs."""

    gpus: int
    cost: CostSpec | None

    def of(self, replica_seconds: float) -> float | None:
        """For so many seconds of one replica; None: no price is known."""
        if self.cost is None or not self.gpus:
            return None
        return self.cost.per_gpu_hour * self.gpus * replica_seconds / 3600


def quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of all do not exceed; None: there are none."""
    ordered = sorted(values)
    return ordered[max(0, ceil(share * len(ordered)) - 1)] if ordered else None


def summary(outcome: Outcome, price: Price) -> dict[str, Any]:
    """The run in figures; times in seconds."""
    wanted = [sample.wanted for sample in outcome.samples]
    changes = [b - a for a, b in pairwise(wanted) if a != b]
    figures: dict[str, Any] = {
        "seconds": round(outcome.seconds, 3),
        "finished": outcome.finished,
        "refused": outcome.refused,
        "timedOut": outcome.timed_out,
        "continued": outcome.continued,
        "outputTokens": outcome.output_tokens,
        "ttft": _quantiles(outcome.first_tokens),
        "itl": _quantiles(outcome.between_tokens),
        "replicas": {"least": min(wanted), "most": max(wanted), "last": wanted[-1]},
        "scaleUps": sum(change > 0 for change in changes),
        "scaleDowns": sum(change < 0 for change in changes),
        "replicaHours": round(outcome.replica_seconds / 3600, 4),
    }
    cost = price.of(outcome.replica_seconds)
    if cost is not None and price.cost is not None:
        figures["cost"] = {"amount": round(cost, 4), "currency": price.cost.currency}
        if outcome.output_tokens:
            per_million = 1e6 * cost / outcome.output_tokens
            figures["cost"]["perMillionOutputTokens"] = round(per_million, 4)
    return figures


def sample_data(sample: Sample) -> dict[str, Any]:
    """One look, for programs."""
    return {
        "at": round(sample.at, 3),
        "arrived": sample.arrived,
        "wanted": sample.wanted,
        "ready": sample.ready,
        "existing": sample.existing,
        "queued": sample.queued,
        "inFlight": sample.in_flight,
        "ttftP50": quantile(sample.first_tokens, 0.5),
        "ttftP95": quantile(sample.first_tokens, 0.95),
        "reason": sample.reason,
    }


def over_time(outcome: Outcome) -> str:
    """A table of at most `ROWS` rows: each tells of one stretch of time, the greatest queue and
    the percentiles of all its requests."""
    samples = outcome.samples
    width = max(1, ceil(len(samples) / ROWS))
    rows = []
    for start in range(0, len(samples), width):
        part = samples[start : start + width]
        seconds = part[-1].at - (samples[start - 1].at if start else 0.0)
        arrived = sum(sample.arrived for sample in part)
        times = [time for sample in part for time in sample.first_tokens]
        rows.append(
            [
                f"{part[-1].at:.0f}s",
                f"{arrived / seconds:.1f}" if seconds else "-",
                str(part[-1].wanted),
                str(part[-1].ready),
                str(max(sample.queued for sample in part)),
                str(max(sample.in_flight for sample in part)),
                _seconds(quantile(times, 0.5)),
                _seconds(quantile(times, 0.95)),
                part[-1].reason or "-",
            ]
        )
    return format_table(
        [
            "time",
            "req/s",
            "wanted",
            "ready",
            "queue",
            "running",
            "ttft p50",
            "ttft p95",
            "reason",
        ],
        rows,
    )


def as_text(figures: dict[str, Any]) -> str:
    """The summary for people."""
    ttft, itl, replicas = figures["ttft"], figures["itl"], figures["replicas"]
    lines = [
        f"requests   {figures['finished']} answered, {figures['refused']} refused (429), "
        f"{figures['timedOut']} timed out (503), {figures['continued']} moved to another replica",
        f"TTFT       p50 {_seconds(ttft['p50'])}, p95 {_seconds(ttft['p95'])}, "
        f"p99 {_seconds(ttft['p99'])}",
        f"ITL        p50 {_seconds(itl['p50'])}, p95 {_seconds(itl['p95'])}, "
        f"p99 {_seconds(itl['p99'])}",
        f"replicas   {replicas['least']} to {replicas['most']}, {figures['replicaHours']} hours; "
        f"{figures['scaleUps']} times up, {figures['scaleDowns']} times down",
    ]
    if cost := figures.get("cost"):
        lines.append(
            f"cost       {cost['amount']} {cost['currency']}, "
            f"{cost.get('perMillionOutputTokens', '-')} per million output tokens"
        )
    return "\n".join(lines)


def plot(outcome: Outcome, title: str, path: Path) -> None:
    """Replicas, queue and TTFT over time, as an image in the format of the name's ending."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise CliError("--plot needs matplotlib: pip install matplotlib") from error
    samples = outcome.samples
    times = [sample.at for sample in samples]
    figure = Figure(figsize=(10, 8), layout="constrained")
    replicas, queue, ttft = figure.subplots(3, 1, sharex=True)
    replicas.step(times, [s.wanted for s in samples], where="post", label="wanted")
    replicas.step(times, [s.ready for s in samples], where="post", label="ready")
    replicas.set_ylabel("replicas")
    queue.plot(times, [s.queued for s in samples], label="queue")
    queue.plot(times, [s.in_flight for s in samples], label="running")
    queue.set_ylabel("requests")
    for share in (0.5, 0.95):
        served = [sample for sample in samples if sample.first_tokens]
        ttft.plot(
            [sample.at for sample in served],
            [quantile(sample.first_tokens, share) for sample in served],
            label=f"TTFT p{share * 100:.0f}",
        )
    ttft.set_ylabel("seconds")
    ttft.set_xlabel("time, s")
    for axes in (replicas, queue, ttft):
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right")
    figure.suptitle(title)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise CliError(f"--plot {path}: {error}") from error


def _quantiles(values: Sequence[float]) -> dict[str, float | None]:
    return {f"p{share * 100:.0f}": quantile(values, share) for share in (0.5, 0.95, 0.99)}


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.0f}ms" if value < 1 else f"{value:.2f}s"
