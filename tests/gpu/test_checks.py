"""What a wrapper says of a tensor that does not fit."""

import pytest
import torch

from shoal.kernels.gpu.checks import expect, expect_together


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        (torch.zeros(3, 4), r"queries has shape \[3, 4\], expected \[any, 8\]"),
        (torch.zeros(3, 8, dtype=torch.int32), "queries is torch.int32, expected torch.float32"),
        (torch.zeros(8, 3).t(), r"queries has strides \[1, 3\], expected its last 1 dimensions"),
        (torch.zeros(8), r"queries has shape \[8\], expected \[any, 8\]"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tensor: torch.Tensor, sentence: str) -> None:
    """The sentence says which argument, what it is and what it should be."""
    with pytest.raises(ValueError, match=sentence):
        expect("queries", tensor, (None, 8), torch.float32)


def test_gaps_between_rows_are_allowed_where_only_rows_are_dense() -> None:
    """A slice of a wider matrix is fine until both dimensions must be dense."""
    wide = torch.zeros(4, 16)[:, :8]
    expect("x", wide, (4, 8), torch.float32)
    with pytest.raises(ValueError, match="last 2 dimensions"):
        expect("x", wide, (4, 8), torch.float32, dense=2)


def test_tensors_of_two_devices_are_refused() -> None:
    """Addresses of two devices never reach one kernel."""
    with pytest.raises(ValueError, match="weight is on meta, x on cpu"):
        expect_together(x=torch.zeros(1), weight=torch.zeros(1, device="meta"))
