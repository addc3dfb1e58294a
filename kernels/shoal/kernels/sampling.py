"""The pieces of sampling: penalties, filters, keyed draws and logprobs, each over a batch of rows.

Functions whose name ends in `_` change `logits` [rows, vocab] float32 in place. A filter drops a
token by setting its logit to -inf; tokens that tie with the last one kept stay.
"""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint64]

_CHUNK = 256  # tokens whose probabilities are summed as one when a draw looks for its place


def argmax_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The first largest logit of every row: ids [rows] int64, values [rows] float32.

    A NaN counts as the largest, so a value that is not finite tells of a broken row.
    """
    # NumPy's argmax is vectorised and torch's is not: 10 against 100 microseconds a row.
    ids = torch.from_numpy(logits.numpy().argmax(axis=1))
    return ids, logits.gather(1, ids.unsqueeze(1)).squeeze(1)


def count_tokens(tokens: Tensor, valid: Tensor, vocab: int) -> Tensor:
    """How often each token occurs: tokens [rows, length] int64, valid [rows, length] bool
    -> [rows, vocab] float32."""
    counts = torch.zeros(tokens.shape[0], vocab)
    return counts.scatter_add_(1, torch.where(valid, tokens, 0), valid.to(torch.float32))


def penalize_(
    logits: Tensor,
    prompt_counts: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """Repetition, frequency and presence penalties; the last three arguments are [rows].

    Repetition divides positive and multiplies negative logits of all tokens seen, prompt
    included (Keskar et al., "CTRL", 2019). Frequency and presence subtract, for generated
    tokens only, as OpenAI's API defines them.
    """
    seen = (prompt_counts + output_counts) > 0
    factor = torch.where(seen, repetition.unsqueeze(1), 1.0)
    logits.copy_(torch.where(logits > 0, logits / factor, logits * factor))
    logits.sub_(output_counts * frequency.unsqueeze(1))
    logits.sub_((output_counts > 0) * presence.unsqueeze(1))


def filter_min_p_(logits: Tensor, min_p: Tensor) -> None:
    """Drops tokens less likely than `min_p` [rows] times the likeliest one."""
    floor = logits.amax(-1) + min_p.log()
    logits.masked_fill_(logits < floor.unsqueeze(1), -torch.inf)


def filter_top_k_(logits: Tensor, top_k: Tensor) -> None:
    """Keeps the `top_k` [rows] int64 likeliest tokens, 1 <= top_k <= vocab."""
    largest = logits.topk(int(top_k.max()), dim=-1).values
    floor = largest.gather(1, top_k.unsqueeze(1) - 1)
    logits.masked_fill_(logits < floor, -torch.inf)


def filter_top_p_(logits: Tensor, top_p: Tensor) -> None:
    """Keeps the fewest likeliest tokens whose probabilities reach `top_p` [rows], 0 < top_p <= 1
    (Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020)."""
    probabilities = logits.softmax(-1)
    # All tokens below this sum up to less than 1 - top_p, so none of them is ever kept.
    # Only the others are sorted.
    negligible = ((1 - top_p) / logits.shape[1]).unsqueeze(1)
    candidates = max(int((probabilities >= negligible).sum(-1).max()), 1)
    largest = probabilities.topk(candidates, dim=-1).values
    before = largest.cumsum(-1, dtype=torch.float64) - largest
    kept = (before < top_p.unsqueeze(1)).sum(-1, keepdim=True)
    floor = largest.gather(1, (kept - 1).clamp_(min=0))
    logits.masked_fill_(probabilities < floor, -torch.inf)


def filter_typical_p_(logits: Tensor, typical_p: Tensor) -> None:
    """Keeps the tokens whose surprise is nearest to the entropy, until their probabilities
    reach `typical_p` [rows] (Meister et al., "Locally Typical Sampling", 2023)."""
    logprobs = logits.log_softmax(-1)
    probabilities = logprobs.exp()
    entropy = -torch.nansum(probabilities * logprobs, -1, keepdim=True)
    distance = (-logprobs - entropy).abs()
    ordered, order = distance.sort(-1)
    mass = probabilities.gather(1, order).cumsum(-1, dtype=torch.float64)
    last = (mass < typical_p.unsqueeze(1)).sum(-1, keepdim=True).clamp_(max=logits.shape[1] - 1)
    logits.masked_fill_(distance > ordered.gather(1, last), -torch.inf)


def uniforms(seeds: Words, positions: Words) -> Floats:
    """One number in [0, 1) for each (seed, position), whatever else is in the batch.

    Two rounds of the SplitMix64 finaliser (Steele et al., "Fast Splittable Pseudorandom Number
    Generators", 2014), the position added between them; the upper 53 bits are the fraction.
    """
    with np.errstate(over="ignore"):
        mixed = _finalise(_finalise(seeds + _GAMMA) + (positions + np.uint64(1)) * _GAMMA)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _finalise(words: Words) -> Words:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Inverse CDF in the order of token ids: ids [rows] int64 for uniform [rows] float64.

    Sums run over chunks first, then within one chunk. A token of logit -inf is never drawn;
    every row must hold a finite logit.
    """
    rows, vocab = logits.shape
    weights = (logits - logits.amax(-1, keepdim=True)).exp_()
    if vocab % _CHUNK:
        weights = F.pad(weights, (0, _CHUNK - vocab % _CHUNK))
    chunks = weights.view(rows, -1, _CHUNK)
    ends = chunks.sum(-1).cumsum(-1, dtype=torch.float64)
    target = uniform.unsqueeze(1) * ends[:, -1:]
    chunk = _place(ends, target)
    before = torch.where(chunk > 0, ends.gather(1, (chunk - 1).clamp_(min=0)), 0.0)
    within = chunks[torch.arange(rows), chunk.squeeze(1)].cumsum(-1, dtype=torch.float64)
    return (chunk * _CHUNK + _place(within, target - before)).squeeze(1)


def _place(ends: Tensor, target: Tensor) -> Tensor:
    """The first index where the rising `ends` [rows, n] pass `target` [rows, 1].

    Rounding may push a target out of [0, last end). Inside it the index has positive mass.
    """
    last = ends[:, -1:]
    inside = torch.minimum(target.clamp(min=0), last.nextafter(torch.zeros_like(last)))
    return torch.searchsorted(ends, inside, right=True)


def token_logprobs(
    logits: Tensor, chosen: Tensor, top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-softmax in float32 at the chosen tokens and at the `top` likeliest.

    logits [rows, vocab] float32, chosen [rows] int64 -> logprob [rows], rank [rows] (1 is the
    likeliest), likeliest ids [rows, top], their logprobs [rows, top] in falling order.
    """
    norm = logits.logsumexp(-1, keepdim=True)
    picked = logits.gather(1, chosen.unsqueeze(1))
    rank = (logits > picked).sum(-1) + 1
    values, ids = logits.topk(top, dim=-1)
    return (picked - norm).squeeze(1), rank, ids, values - norm
