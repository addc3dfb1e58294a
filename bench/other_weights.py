"""Another revision of a model's weights: the same file with its norms changed a little.

    python -m bench.other_weights MODEL.gguf OTHER.gguf

Same shapes, same tokenizer, other greedy answers: what a swap of weights needs to be tried with.
"""

import argparse
import shutil
from math import prod
from pathlib import Path

import numpy as np

from shoal.worker.gguf_header import read_header

_FLOAT32 = 0  # of ggml's types; norms are kept in it


def other_weights(model: Path, to: Path, *, scale: float = 0.05, seed: int = 1) -> Path:
    """Copies a .gguf file and multiplies every float32 norm by 1 + scale * noise. The name of the
    copy is `to`, which is returned."""
    shutil.copyfile(model, to)
    rng = np.random.default_rng(seed)
    data = np.memmap(to, np.uint8, mode="r+")
    for tensor in read_header(to).tensors:
        if tensor.ggml_type == _FLOAT32 and "norm" in tensor.name:
            size = prod(tensor.shape)
            raw = data[tensor.offset : tensor.offset + 4 * size]
            values = raw.view(np.float32)
            values *= (1 + scale * rng.standard_normal(size)).astype(np.float32)
    data.flush()
    return to


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("to", type=Path)
    args = parser.parse_args()
    print(other_weights(args.model, args.to))
