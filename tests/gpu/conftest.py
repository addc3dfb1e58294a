"""Kernels against their oracles: in Triton's interpreter, or on the GPU that is there.

The interpreter is chosen when a kernel is decorated, so these tests have a process of their own:
`TRITON_INTERPRET=1 pytest tests/gpu`. In the process of the other tests nothing here is collected.
"""

import os
from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*"]
elif find_spec("triton") is None:  # a platform that torch has no Triton for
    collect_ignore_glob = ["test_[!c]*"]  # all but the checks

if not INTERPRETED:
    # A machine with a GPU is rare: what fails there fails again in the next run.
    settings.register_profile("device", derandomize=True, deadline=None)
    settings.load_profile("device")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(scope="session")
def float_types() -> tuple[torch.dtype, ...]:
    """The interpreter's arithmetic in bfloat16 is wrong without a word."""
    half = (torch.float32, torch.float16)
    return half if INTERPRETED else (*half, torch.bfloat16)
