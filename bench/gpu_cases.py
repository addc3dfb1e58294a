"""One kernel on one shape beside what else a user could call, as the benchmark of a GPU runs it."""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.roofline import Limits, Work
from shoal.kernels.measure import Clock, Launch

OURS = "shoal"


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the cases are run with."""

    rows: tuple[int, ...]  # of linears
    linears: tuple[tuple[int, int], ...]  # outputs, inputs
    batches: tuple[int, ...]  # sequences that decode
    contexts: tuple[int, ...]
    prompt: int  # tokens of a prefill
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    latent: tuple[int, int, int]  # heads, rank and rotary elements of latent attention
    vocab: int
    experts: int
    per_token: int
    expert_inner: int
    ranks: tuple[int, ...]
    kv_tokens: int  # a case whose contexts are more together is left out


# Layers of Llama 3.1 8B; experts of Qwen3-30B-A3B; latents of DeepSeek-V3.
FULL = Sizes(
    rows=(1, 4, 16, 64, 256),
    linears=((6144, 4096), (4096, 14336)),
    batches=(1, 8, 64, 256),
    contexts=(128, 2048, 16384),
    prompt=8192,
    hidden=4096,
    inner=14336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    block_size=16,
    latent=(128, 512, 64),
    vocab=128256,
    experts=128,
    per_token=8,
    expert_inner=768,
    ranks=(16, 64),
    kv_tokens=2 << 20,
)

# What Triton's interpreter runs in seconds.
TINY = Sizes(
    rows=(1, 20),
    linears=((64, 128),),
    batches=(2,),
    contexts=(24,),
    prompt=16,
    hidden=128,
    inner=128,
    heads=4,
    kv_heads=2,
    head_dim=64,
    block_size=16,
    latent=(16, 64, 16),
    vocab=96,
    experts=4,
    per_token=2,
    expert_inner=128,
    ranks=(8,),
    kv_tokens=64,
)


@dataclass(frozen=True, slots=True)
class Case:
    """`prepare` makes inputs and returns what to time: our launch under `OURS`, others' beside."""

    table: str
    name: str
    work: Work
    prepare: Callable[[torch.device], Mapping[str, Launch]]


@dataclass(frozen=True, slots=True)
class Figure:
    """How one peer did on one case. Seconds are of one launch, or of one step."""

    table: str
    case: str
    peer: str
    median: float | None  # None: it could not run; `note` says why
    least: float | None
    most: float | None
    share: float | None  # of the device's limit; None where the peer does other work
    bound: str  # memory | products
    note: str = ""
    failed: bool = False  # ours, and it should have run


def half(device: torch.device) -> torch.dtype:
    """The type of activations: the interpreter computes wrongly in bfloat16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float16


def randn(device: torch.device, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    made = torch.randn(shape, device=device, dtype=torch.float32)
    return made.to(half(device) if dtype is None else dtype)


def failed(table: str, case: str, peer: str, error: Exception) -> Figure:
    """A figure that says why there is none; what of ours failed is shown in full as well."""
    if peer == OURS:
        traceback.print_exception(error)
    why = str(error).strip().partition("\n")[0][:120]
    note = f"{type(error).__name__}: {why}"
    return Figure(table, case, peer, None, None, None, None, "", note, failed=peer == OURS)


def run(case: Case, clock: Clock, limits: Limits, seconds: float) -> list[Figure]:
    """Times every peer. What cannot run is a figure that says why: a peer may lack a type, a
    shape or this device, and a fault of ours does not keep the rest from being measured."""
    try:
        launches = case.prepare(clock.device)
    except Exception as error:
        return [failed(case.table, case.name, OURS, error)]
    figures = []
    for peer, launch in launches.items():
        try:
            times = clock.measure(launch, seconds)
        except Exception as error:
            figures.append(failed(case.table, case.name, peer, error))
            continue
        figures.append(
            Figure(
                table=case.table,
                case=case.name,
                peer=peer,
                median=times.median,
                least=times.least,
                most=times.most,
                share=limits.share(case.work, times.median) if peer == OURS else None,
                bound=limits.bound(case.work),
            )
        )
    return figures
