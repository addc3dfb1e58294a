"""A picture of real rollouts: `python -m bench.rollout_picture`.

`shoal up` with the real model, clients that never stop asking, and one after the other a good
revision, a slow one and the way back. Draws the canary's weight, the share of requests that it
answered, the time to the first token by revision and the replicas, over time, and writes what was
measured beside it: bench/results/rollouts.{png,json}.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from e2e.conftest import Platform
from e2e.test_rollouts import Service
from e2e.traffic import Answer, Traffic

RESULTS = Path(__file__).parent / "results"
STEPS = (
    {"weight": 20, "pauseSeconds": 15},
    {"weight": 50, "pauseSeconds": 15},
    {"weight": 100, "pauseSeconds": 5},
)
# Two engines on one busy machine differ by themselves.
ANALYSIS = {
    "intervalSeconds": 2,
    "minRequests": 20,
    "maxFailures": 2,
    "maxTtftP95Ratio": 2,
    "maxItlP95Ratio": 2,
}
DELAY_MS = 150
BINS = 2.0  # seconds


class Watch:
    """Samples of the service's status and table, twice a second."""

    def __init__(self, service: Service) -> None:
        self.samples: list[dict[str, Any]] = []
        self._service = service
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.5):
            status = self._service.status
            if status:
                self.samples.append(
                    {
                        "at": time.time(),
                        "weights": self._service.weights,
                        "replicas": status.get("replicas", 0),
                        "routable": status.get("routableReplicas", 0),
                        "active": status.get("activeRevision"),
                        "canary": (status.get("canary") or {}).get("revision"),
                    }
                )


def run(streams: int) -> tuple[list[Answer], list[dict[str, Any]], list[tuple[float, str]]]:
    """The story: what clients met, the samples, and what was done when."""
    rollout = {"canary": {"steps": list(STEPS), "analysis": ANALYSIS, "abortRetentionSeconds": 20}}
    told: list[tuple[float, str]] = []
    with tempfile.TemporaryDirectory(prefix="shoal-rollout-") as folder:
        platform = Platform(Path(folder) / "state")
        service = Service(platform, Path(folder))
        try:
            service.apply(rollout=rollout)
            first = service.settled()
            with (
                Traffic(platform.url, "chat", streams).running() as traffic,
                Watch(service) as seen,
            ):
                time.sleep(10)
                told.append((time.time(), "a good revision is applied"))
                service.apply(model_len=900, rollout=rollout)
                while service.status.get("specRevision") == first:
                    time.sleep(0.1)
                service.settled(300)
                told.append((time.time(), "promoted"))
                time.sleep(10)
                told.append((time.time(), f"a revision with {DELAY_MS} ms more a step is applied"))
                faults = {"SHOAL_INJECT_STEP_DELAY_MS": str(DELAY_MS)}
                service.apply(model_len=900, rollout=rollout, faults=faults)
                service.given_up(300)
                told.append((time.time(), "given up"))
                time.sleep(25)
            return list(traffic.answers), seen.samples, told
        finally:
            if platform.process is not None and platform.process.poll() is None:
                platform.stop()


def draw(
    answers: Sequence[Answer],
    samples: Sequence[Mapping[str, Any]],
    told: Sequence[tuple[float, str]],
    path: Path,
) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    start = samples[0]["at"]
    names = list(dict.fromkeys(name for s in samples for name in s["weights"]))
    colours = dict(zip(names, ("tab:blue", "tab:green", "tab:red", "tab:orange"), strict=False))
    figure, (share, ttft, replicas) = pyplot.subplots(
        3, 1, sharex=True, figsize=(11, 8), layout="constrained"
    )
    times = [s["at"] - start for s in samples]
    for name in names:
        weights = [s["weights"].get(name, 0) for s in samples]
        share.step(times, weights, where="post", color=colours[name], label=f"weight of {name}")
        mine = [a for a in answers if a.good and a.revision == name]
        shares, medians = _binned(mine, answers, start)
        share.plot(*shares, ".", color=colours[name], markersize=4, alpha=0.6)
        ttft.plot(*medians, ".-", color=colours[name], markersize=4, label=name)
    share.set_ylabel("percent of requests\n(line: weight, dots: answered)")
    share.legend(loc="center left", fontsize=8)
    ttft.set_ylabel("p95 time to the\nfirst token, s")
    ttft.set_yscale("log")
    replicas.step(times, [s["replicas"] for s in samples], where="post", label="replicas")
    replicas.step(times, [s["routable"] for s in samples], where="post", label="take requests")
    replicas.set_ylabel("replicas")
    replicas.set_ylim(bottom=0)
    replicas.legend(loc="lower left", fontsize=8)
    replicas.set_xlabel("seconds")
    for axis in (share, ttft, replicas):
        for at, _ in told:
            axis.axvline(at - start, color="grey", linewidth=0.8, linestyle=":")
    for at, text in told:
        share.annotate(text, (at - start, 103), fontsize=7, rotation=12, annotation_clip=False)
    figure.savefig(path, dpi=110)


Points = tuple[list[float], list[float]]


def _binned(
    mine: Sequence[Answer], everyone: Sequence[Answer], start: float
) -> tuple[Points, Points]:
    """The revision's percent of all answers, and its p95 TTFT, by bins of time."""
    shares: Points = ([], [])
    slowest: Points = ([], [])
    bins: dict[int, list[float]] = {}
    totals: dict[int, int] = {}
    for answer in everyone:
        number = int((answer.at - start) // BINS)
        totals[number] = totals.get(number, 0) + 1
    for answer in mine:
        bins.setdefault(int((answer.at - start) // BINS), []).append(answer.first)
    for number, firsts in sorted(bins.items()):
        middle = (number + 0.5) * BINS
        shares[0].append(middle)
        shares[1].append(100 * len(firsts) / totals[number])
        slowest[0].append(middle)
        slowest[1].append(sorted(firsts)[int(0.95 * (len(firsts) - 1))])
    return shares, slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=4, help="clients")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    answers, samples, told = run(options.streams)
    options.out.mkdir(parents=True, exist_ok=True)
    draw(answers, samples, told, options.out / "rollouts.png")
    moments = {text: round(at - samples[0]["at"], 1) for at, text in told}
    result = {
        "streams": options.streams,
        "requests": len(answers),
        "failed": sum(not a.good for a in answers),
        "seconds": moments,
        "weights_that_do_not_add_up": sum(sum(s["weights"].values()) != 100 for s in samples),
    }
    (options.out / "rollouts.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
