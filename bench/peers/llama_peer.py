"""llama.cpp through llama-cpp-python's C bindings, with continuous batching of our own.

The bindings' high-level class runs one sequence at a time, so this drives `llama_decode` with
mixed batches, as llama.cpp's server does: up to 32 sequences in flight, prompts in the order
given, a common prefix computed once and copied to all.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import gguf
import llama_cpp as lc
import numpy as np

from bench.peers.protocol import serve
from bench.workloads import Prompt, Timing, Workload

BATCH = 2048
TYPES = {
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "float32": gguf.GGMLQuantizationType.F32,
}


def convert(source: Path, target: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Writes the GGUF again with its matrices in another type; vectors stay float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kinds = field.types
        sub = kinds[-1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kinds[0], sub_type=sub)
    for tensor in reader.tensors:
        data = gguf.dequantize(tensor.data, tensor.tensor_type)
        if data.ndim == 1:
            writer.add_tensor(tensor.name, data.astype(np.float32))
        else:
            writer.add_tensor(tensor.name, gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def common_prefix(prompts: tuple[Prompt, ...]) -> int:
    """Tokens that all prompts begin with, at least one left over for each."""
    if len(prompts) < 2:
        return 0
    shortest = min(len(prompt.token_ids) for prompt in prompts) - 1
    for position in range(shortest):
        if len({prompt.token_ids[position] for prompt in prompts}) > 1:
            return position
    return shortest


class Llama:
    """A model; each run gets a context made for its workload, outside the time it takes."""

    def __init__(self, path: Path, threads: int) -> None:
        lc.llama_backend_init()
        self.threads = threads
        model_params = lc.llama_model_default_params()
        self.model = lc.llama_model_load_from_file(str(path).encode(), model_params)
        self.vocabulary = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(self.model))
        self.batch = lc.llama_batch_init(BATCH, 0, 1)

    def run(self, workload: Workload) -> Timing:
        shared = common_prefix(workload.prompts)
        if shared < 64:
            shared = 0
        sizes = [len(prompt.token_ids) + prompt.new_tokens for prompt in workload.prompts]
        params = lc.llama_context_default_params()
        params.n_batch = BATCH
        params.n_seq_max = workload.in_flight
        params.n_threads = params.n_threads_batch = self.threads
        # One unified cache is what lets sequences share a prefix; apart from that, a cache of
        # its own for each sequence keeps attention from scanning everybody's tokens.
        params.kv_unified = bool(shared)
        params.n_ctx = (
            shared + sum(size - shared for size in sizes)
            if shared
            else workload.in_flight * (max(sizes) + 1)
        )
        self.context = lc.llama_init_from_model(self.model, params)
        self.memory = lc.llama_get_memory(self.context)
        try:
            return self._run(workload, shared)
        finally:
            lc.llama_free(self.context)

    def _run(self, workload: Workload, shared: int) -> Timing:
        waiting = list(enumerate(workload.prompts))
        free = list(range(workload.in_flight))
        active: dict[int, tuple[Prompt, int, int]] = {}  # sequence -> prompt, done, next token
        start = time.perf_counter()
        first = last = 0.0
        new_tokens = 0
        if shared:
            ids = workload.prompts[0].token_ids[:shared]
            self._decode([(token, i, free[0], False) for i, token in enumerate(ids)])
            for sequence in free[1:]:
                lc.llama_memory_seq_cp(self.memory, free[0], sequence, 0, shared)
        while waiting or active:
            rows = []  # token, position, sequence, wants logits
            for sequence, (prompt, done, token) in active.items():
                rows.append((token, len(prompt.token_ids) + done - 1, sequence, True))
            while waiting and free:
                _, prompt = waiting[0]
                if len(rows) + len(prompt.token_ids) - shared > BATCH:
                    break
                waiting.pop(0)
                sequence = free.pop()
                end = len(prompt.token_ids) - 1
                for i in range(shared, len(prompt.token_ids)):
                    rows.append((prompt.token_ids[i], i, sequence, i == end))
                active[sequence] = (prompt, 0, 0)
            sampled = self._decode(rows)
            last = time.perf_counter() - start
            first = first or last
            for sequence, token in sampled.items():
                prompt, done, _ = active[sequence]
                new_tokens += 1
                if done + 1 == prompt.new_tokens:
                    del active[sequence]
                    lc.llama_memory_seq_rm(self.memory, sequence, -1, -1)
                    free.append(sequence)
                else:
                    active[sequence] = (prompt, done + 1, token)
        prompt_tokens = sum(len(prompt.token_ids) for prompt in workload.prompts)
        return Timing(first, last, prompt_tokens, new_tokens)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Runs one batch; the greedy token of each sequence that wants one."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, logits) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = logits
        status = lc.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        return {
            sequence: int(
                np.ctypeslib.as_array(
                    lc.llama_get_logits_ith(self.context, i), (self.vocabulary,)
                ).argmax()
            )
            for i, (_, _, sequence, logits) in enumerate(rows)
            if logits
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gguf", default=os.environ.get("SHOAL_BENCH_GGUF"), required=False)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        convert(Path(args.gguf), path, TYPES[args.dtype])
        llama = Llama(path, args.threads)
    serve({"dtype": args.dtype, "llama-cpp-python": lc.__version__}, llama.run)


if __name__ == "__main__":
    main()
