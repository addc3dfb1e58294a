"""Log-probabilities on the device against the CPU's."""

import pytest
import torch

from shoal.kernels import sampling as oracle
from shoal.kernels.gpu.logprobs import logprobs


def logits_of(rows: int, vocab: int) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab))


@pytest.mark.parametrize("vocab", [5, 64, 301])
@pytest.mark.parametrize("top", [0, 1, 5])
def test_logprobs_are_the_oracles(
    vocab: int, top: int, device: torch.device, float_types: tuple[torch.dtype, ...]
) -> None:
    """Chosen tokens at either end, the likeliest in falling order, whichever tile has them."""
    for dtype in float_types:
        logits = logits_of(3, vocab).to(dtype)
        chosen = torch.tensor([0, vocab - 1, int(logits[2].argmax())])
        wanted = oracle.token_logprobs(logits.float(), chosen, top)
        found = logprobs(logits.to(device), chosen.to(device), top, tile=64)
        for one, other in zip(found, wanted, strict=True):
            if other.dtype == torch.int64 and dtype != torch.float32 and other.dim() == 2:
                # Rounded logits tie; the ids are judged by their logits.
                one, other = logits.gather(1, one.cpu()), logits.gather(1, other)
            torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-5)
        assert found[1][2] == 1


def test_ties_and_minus_infinities(device: torch.device) -> None:
    """Of equals the smaller id comes first, each once, and what cannot be drawn comes last."""
    logits = torch.full((1, 200), -torch.inf)
    logits[0, [150, 3, 70]] = 1.0
    logits[0, 199] = 2.0
    found = logprobs(logits.to(device), torch.tensor([150], device=device), 6, tile=64)
    logprob, rank, ids, values = (part.cpu() for part in found)
    assert rank.tolist() == [2] and ids.tolist() == [[199, 3, 70, 150, 0, 1]]
    wanted = logits.log_softmax(-1)
    torch.testing.assert_close(logprob, wanted[:, 150])
    torch.testing.assert_close(values, wanted.gather(1, ids))


def test_results_go_where_they_are_wanted(device: torch.device) -> None:
    """Buffers of a graph are written to and handed back."""
    logits = logits_of(2, 40).to(device)
    ids = torch.tensor([1, 2], device=device)
    out = tuple(torch.full_like(part, -9) for part in logprobs(logits, ids, 3))
    again = logprobs(logits, ids, 3, out=out)
    assert all(one is other for one, other in zip(again, out, strict=True))
    assert (out[1] > 0).all() and (out[2] >= 0).all()


def test_too_many_are_refused(device: torch.device) -> None:
    """The limit is named, as is a vocabulary that is smaller."""
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="top is 65, expected 0 to 64"):
        logprobs(torch.zeros(1, 100, device=device), ids, 65)
    with pytest.raises(ValueError, match="top is 9, expected 0 to 8"):
        logprobs(torch.zeros(1, 8, device=device), ids, 9)
