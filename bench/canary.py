"""How often the canary analysis is wrong, by seeded simulation of its looks.

    python -m bench.canary [--canaries 500]

A false alarm is a canary of 2,000 requests, no different from the stable revision, that is given
up; "ever proven" is one that its test calls worse at any look. "Found" is a canary with 1.5 times
the TTFT that is given up within 500 of its requests. "Within the limit" is one with 1.2 times the
TTFT, slower but by less than maxTtftP95Ratio (1.3), that is given up within 500: chance decides
near a limit. Times are lognormal; a look has 50 requests of both revisions together, or as many as
give the new one ten. Writes bench/results/canary.md.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shoal.api.rollout import CanaryAnalysis
from shoal.operator.analysis import PROOF, Analysis, Verdict, look
from shoal.operator.analysis_counts import Counts
from shoal.operator.durations import LOWEST, PER_OCTAVE, Durations

RESULTS = Path(__file__).resolve().parent / "results"
A_LOOK = 50  # requests


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--canaries", type=int, default=500)
    args = parser.parse_args()
    lines = [
        "| canary's share | sigma of times | false alarms | ever proven | found at 1.5 x "
        "| within the limit, 1.2 x |",
        "|---|---|---|---|---|---|",
    ]
    for share in (0.05, 0.2, 0.5):
        for sigma in (0.35, 0.5, 0.8, 1.0):
            rng = np.random.default_rng(7)
            same = [run(rng, share, sigma, 1.0, 2000) for _ in range(args.canaries)]
            slow = [run(rng, share, sigma, 1.5, 500) for _ in range(args.canaries)]
            near = [run(rng, share, sigma, 1.2, 500) for _ in range(args.canaries)]
            alarms, proven = _share(one for one, _ in same), _share(two for _, two in same)
            found, within = (_share(one for one, _ in some) for some in (slow, near))
            rates = " | ".join(f"{rate:.1%}" for rate in (alarms, proven, found, within))
            lines.append(f"| {share:.0%} | {sigma} | {rates} |")
            print(lines[-1], flush=True)
    text = "\n".join([*lines, "", f"{args.canaries} canaries each."])
    (RESULTS / "canary.md").write_text(text + "\n")


def run(
    rng: np.random.Generator, share: float, sigma: float, slower: float, requests: int
) -> tuple[bool, bool]:
    """Whether the canary was given up, and whether it was ever proven worse."""
    spec, analysis, proven = CanaryAnalysis(), Analysis(), False
    while analysis.requests < requests:
        both = max(A_LOOK, round(10 / share))
        canary = int(rng.binomial(both, share))
        stable = both - canary
        found = look(
            spec,
            analysis,
            Counts(stable, 0, _counted(rng.lognormal(-1, sigma, stable))),
            Counts(canary, 0, _counted(slower * rng.lognormal(-1, sigma, canary))),
        )
        if found is None:
            continue
        analysis = found.analysis
        proven |= analysis.ttft.log >= PROOF
        if found.verdict is Verdict.FAILED:
            return True, proven
    return False, proven


def _counted(seconds: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> Durations:
    if not len(seconds):
        return Durations()
    buckets = np.ceil(np.log2(seconds) * PER_OCTAVE).astype(int) - 1 - LOWEST * PER_OCTAVE
    return Durations(tuple(np.bincount(np.maximum(0, buckets)).tolist()))


def _share(outcomes: Iterator[bool]) -> float:
    found = list(outcomes)
    return sum(found) / len(found)


if __name__ == "__main__":
    main()
