"""Linear layers whose weights are packed once, when a model is loaded.

oneDNN keeps a packed weight in the blocked layout that its GEMM reads, which saves the
reordering that `torch.nn.functional.linear` does on every call. Where oneDNN cannot pack, the
plain layout and torch's own GEMM do the same arithmetic.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware."""
    if not _has_onednn():
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


class PackedLinear:
    """`y = x W^T + b`, with W [out_features, in_features] and b [out_features] or none.

    The weight's dtype (float32 or bfloat16) is the dtype of x and of y; sums are in float32.
    The given weight is not kept when it could be packed, so its memory is free to go.
    """

    __slots__ = ("bias", "in_features", "nbytes", "out_features", "packed", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"weight must be a float32 or bfloat16 matrix, got {weight.dtype} "
                f"of shape {tuple(weight.shape)}"
            )
        self.out_features, self.in_features = weight.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(f"bias must be [{self.out_features}], got {list(bias.shape)}")
        self.nbytes = weight.nbytes + (bias.nbytes if bias is not None else 0)
        self.bias = None if bias is None else bias.to(weight.dtype).contiguous()
        self.packed = _pack(weight)
        self.weight = weight.contiguous() if self.packed is None else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, in_features] -> [rows, out_features]."""
        if self.packed is None:
            assert self.weight is not None
            return F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


def gated_silu(x: Tensor, gate: PackedLinear, up: PackedLinear) -> Tensor:
    """`silu(gate(x)) * up(x)`: x [rows, in_features] -> [rows, out_features].

    With packed weights both the activation and the product happen inside the GEMMs, on their
    float32 sums.
    """
    if gate.packed is None or up.packed is None:
        return F.silu(gate(x)).mul_(up(x))
    activated = torch.ops.mkldnn._linear_pointwise(x, gate.packed, gate.bias, "swish", [], "")
    y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, activated, up.packed, up.bias, "mul")
    return y


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]  # torch's


def _pack(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's layout, or None where this machine has none for its dtype."""
    if not _has_onednn() or weight.device.type != "cpu":
        return None
    if weight.dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return packed
