"""Which keys a program attends when a sequence's keys are split, and the merge of the parts.

Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018: parts of a softmax
join by their log-sum-exps. Those here are in base 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.gpu.attention_plan import MOST_SPLITS, Plan
from shoal.kernels.gpu.variant import Variant

# Columns of one merging program: parts times columns fit its registers.
_COLUMNS = 64


@triton.jit
def first_key(context, window, KEYS: tl.constexpr):
    """The first key that a query after `context` tokens sees, down to a multiple of KEYS."""
    begin = 0
    if window is not None:
        begin = tl.maximum(context + 1 - window, 0) // KEYS * KEYS
    return begin


@triton.jit
def keys_of_a_split(span, splits, least, KEYS: tl.constexpr):
    """How many of `span` keys each split gets, a multiple of KEYS; the last ones may get none."""
    return tl.cdiv(tl.maximum(tl.cdiv(span, splits), least), KEYS) * KEYS


@triton.jit(do_not_specialize=["splits", "least", "window"])
def _merge(
    parts,  # [sequences, QUERIES, heads, splits, DIM]
    sums,  # [sequences, QUERIES, heads, splits]
    out,  # [tokens, heads, DIM]
    starts,
    lengths,
    splits,
    least,
    window,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    sequence, query = row // QUERIES, row % QUERIES
    start = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - start
    if (query >= count) | (count > QUERIES):
        return
    length = tl.load(lengths + sequence)
    begin = first_key(length - count, window, KEYS)
    used = tl.cdiv(length - begin, keys_of_a_split(length - begin, splits, least, KEYS))
    if used <= 1:
        return
    each = tl.arange(0, SPLITS)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    part = (row.to(tl.int64) * HEADS + head) * splits + each
    inside = (each < used)[:, None] & (columns < DIM)[None, :]
    values = tl.load(parts + part[:, None] * DIM + columns[None, :], mask=inside, other=0.0)
    logs = tl.load(sums + part, mask=each < used, other=float("-inf"))
    peak = tl.max(logs, 0)
    weights = tl.exp2(logs - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(weights, 0)
    merged = tl.sum(values * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    target = ((start + query).to(tl.int64) * HEADS + head) * DIM + columns
    tl.store(out + target, merged.to(out.dtype.element_ty), mask=columns < DIM)


def merge_splits(
    parts: Tensor,
    sums: Tensor,
    out: Tensor,
    starts: Tensor,
    lengths: Tensor,
    window: int | None,
    plan: Plan,
) -> None:
    """Writes the rows of `out` that more than one split attended; the others are there already.

    parts [sequences, queries, heads, splits, value_dim] float32: each split's attention; sums
    [sequences, queries, heads, splits] float32: log2 of its sum of 2^score; out [tokens, heads,
    value_dim] contiguous.
    """
    assert plan.few is not None, "only rows of few queries are split"
    sequences, queries, heads, splits, dim = parts.shape
    columns = min(_COLUMNS, triton.next_power_of_2(dim))
    _merge[(sequences * queries, heads, triton.cdiv(dim, columns))](
        parts,
        sums,
        out,
        starts,
        lengths,
        splits,
        plan.least_keys,
        window,
        HEADS=heads,
        QUERIES=queries,
        KEYS=plan.few.keys,
        SPLITS=triton.next_power_of_2(splits),
        DIM=dim,
        COLUMNS=columns,
        num_warps=4,
    )


def split_workspace(
    workspace: Tensor | None,
    plan: Plan,
    sequences: int,
    heads: int,
    value_dim: int,
    device: torch.device,
) -> tuple[Tensor, Tensor] | None:
    """The parts and sums of `merge_splits`, in `workspace` if one is given; None: no split.

    Raises ValueError where the workspace is not contiguous float32 or too small.
    """
    needed = plan.workspace(sequences, heads, value_dim)
    if plan.few is None or not needed:
        return None
    if workspace is None:
        workspace = torch.empty(needed, dtype=torch.float32, device=device)
    if (
        workspace.dtype is not torch.float32
        or not workspace.is_contiguous()
        or workspace.device != device
        or workspace.numel() < needed
    ):
        raise ValueError(
            f"workspace has {workspace.numel()} elements of {workspace.dtype} on "
            f"{workspace.device}, expected {needed} contiguous torch.float32 on {device}; "
            f"`attention_workspace` says how many"
        )
    rows = sequences * plan.few.queries * heads * plan.splits
    shape = (sequences, plan.few.queries, heads, plan.splits)
    flat = workspace.view(-1)
    parts = flat[: rows * value_dim].view(*shape, value_dim)
    return parts, flat[rows * value_dim : needed].view(shape)


def variants() -> tuple[Variant, ...]:
    """The merge of the most parts, and of latent attention's wide rows."""

    def variant(dim: int, splits: int) -> Variant:
        return Variant(
            name=f"merge_splits {splits} parts d{dim}",
            kernel=_merge,
            signature={
                "parts": "*fp32",
                "sums": "*fp32",
                "out": "*bf16",
                "starts": "*i32",
                "lengths": "*i32",
                "splits": "i32",
                "least": "i32",
            },
            constants={
                "window": None,
                "HEADS": 32,
                "QUERIES": 1,
                "KEYS": 64,
                "SPLITS": splits,
                "DIM": dim,
                "COLUMNS": _COLUMNS,
            },
            aligned=("parts", "sums", "out"),
        )

    return variant(128, MOST_SPLITS), variant(512, 16)
