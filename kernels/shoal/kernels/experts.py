"""Mixtures of experts: which experts a token goes through, and the sum of what they return."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """How scores choose experts."""

    per_token: int
    sigmoid: bool  # of each logit; else the softmax of a token's logits
    renormalize: bool  # the chosen scores sum to one
    scale: float
    groups: int  # experts are chosen from the `groups_kept` best of this many groups
    groups_kept: int
    group_best: int  # a group's score is the sum of its so many best


def route(logits: Tensor, correction: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights.

    logits [tokens, experts]; correction [experts] float32 is added to the scores that choose, not
    to those that weigh. Returns ids [tokens, per_token] int64 and weights [tokens, per_token]
    float32. Groups: DeepSeek-V2 (2024), section 2.1.2, and V3 (2024), section 2.1.2.
    """
    logits = logits.float()
    scores = logits.sigmoid() if routing.sigmoid else logits.softmax(-1)
    choosing = scores if correction is None else scores + correction
    if routing.groups > 1:
        by_group = choosing.view(len(choosing), routing.groups, -1)
        best = by_group.topk(routing.group_best, -1).values.sum(-1)
        kept = best.topk(routing.groups_kept, -1).indices
        out = torch.ones_like(best, dtype=torch.bool).scatter_(-1, kept, False)
        choosing = by_group.masked_fill(out.unsqueeze(-1), -torch.inf).view(choosing.shape)
    ids = choosing.topk(routing.per_token, -1).indices
    weights = scores.gather(-1, ids)
    if routing.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights * routing.scale


def mix_experts(
    x: Tensor, ids: Tensor, weights: Tensor, experts: Sequence[Callable[[Tensor], Tensor]]
) -> Tensor:
    """The weighted sum of each token's experts. Only experts that a token goes through run, each
    once, over all of its tokens.

    x [tokens, hidden]; ids and weights [tokens, n]; an expert maps [rows, hidden] to the same.
    Returns [tokens, hidden] float32.
    """
    out = torch.zeros(x.shape, dtype=torch.float32)
    chosen, order = ids.flatten().sort(stable=True)
    tokens = order // ids.shape[1]
    counts = torch.bincount(chosen, minlength=len(experts)).tolist()
    first = 0
    for expert, count in zip(experts, counts, strict=True):
        if count:
            rows = tokens[first : first + count]
            weight = weights.flatten()[order[first : first + count]].unsqueeze(1)
            out.index_add_(0, rows, expert(x[rows]).float().mul_(weight))
            first += count
    return out
