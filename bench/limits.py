"""What this machine can do at most: bytes read a second, bfloat16 multiply-adds a second.

    python -m bench.limits

Reading streams an array far larger than the caches through all threads; multiplying runs the
engine's own packed GEMM on a matrix that stays in the second-level cache. Both are of this very
run: shared machines change from minute to minute.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from shoal.kernels.flat import FlatBatch
from shoal.kernels.native import Buffer, Geometry, Into, PackedWeight, Program, Team
from shoal.worker.host import share_cores, usable_cores


@dataclass(frozen=True)
class Limits:
    """Of all threads together."""

    read: float  # bytes a second
    multiply: float  # floating-point operations a second, two a multiply-add


def best(run: Callable[[], None], seconds: float) -> float:
    """The shortest time of one call, over about `seconds`."""
    shortest, end = float("inf"), time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        run()
        shortest = min(shortest, time.perf_counter() - began)
    return shortest


def measure(threads: int, seconds: float = 2.0) -> Limits:
    """Takes about twice `seconds`."""
    team = Team(threads)
    read = _linear(team, rows=1, outputs=131_072, inputs=1024)  # 268 MB of weights
    rows, outputs, inputs = 960, 256 * threads, 512
    multiply = _linear(team, rows, outputs, inputs)
    return Limits(
        read=2 * 131_072 * 1024 / best(read, seconds),
        multiply=2 * rows * outputs * inputs / best(multiply, seconds),
    )


def _linear(team: Team, rows: int, outputs: int, inputs: int) -> Callable[[], None]:
    geometry = Geometry(inputs, 1, 1, 16, 16, 16, 1.0)
    program = Program(geometry, torch.zeros(1, 8, dtype=torch.complex64))
    weight = PackedWeight(torch.ones(outputs, inputs, dtype=torch.bfloat16))
    program.linear(weight, Buffer.NORMED, Buffer.HEADS, Into.BFLOAT16)
    empty = torch.empty(0)
    x = torch.ones(rows, inputs, dtype=torch.bfloat16)
    y = torch.empty(rows, outputs, dtype=torch.bfloat16)
    none = np.zeros(0, np.int64)
    batch = FlatBatch(np.zeros(rows, np.int64), *[none] * 4, np.zeros((0, 1), np.int64))
    return lambda: program.run(team, batch, none, [empty, x, y, empty, empty, empty])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=usable_cores())
    args = parser.parse_args()
    share_cores()
    limits = measure(args.threads)
    print(f"read {limits.read / 1e9:.1f} GB/s, bfloat16 GEMM {limits.multiply / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
