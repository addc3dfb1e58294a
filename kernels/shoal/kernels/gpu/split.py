"""Inner products cut into parts, so that a few rows still occupy every multiprocessor.

With one to sixteen rows a linear layer is as fast as its weights are read. Where a narrow layer
has fewer tiles of outputs than the device has multiprocessors, its inputs are cut too: each part
writes float32 sums to a workspace and a second kernel adds them in order, so that the result is
the same in every run (no atomic additions; Osama et al., "Stream-K", 2023, compares the ways).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.gpu.checks import expect
from shoal.kernels.gpu.variant import Variant

COLD_BYTES = 256 << 20  # of weights that are read in turn: more than any device's L2 holds
_BLOCK = 1024


@triton.jit(do_not_specialize=["elements"])
def _add_parts_kernel(
    parts_ptr,  # [parts, elements] float32
    bias_ptr,  # [outputs] or None
    out_ptr,  # [elements]
    elements,  # rows * outputs
    outputs,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    total = tl.load(parts_ptr + at, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts_ptr + part * elements + at, mask=inside, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at % outputs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def processors(device: torch.device) -> int:
    """Multiprocessors of the device; without one, those of an H200, so that tests split too."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def parts_for(tiles: int, steps: int, device: torch.device) -> int:
    """Into how many parts to cut inputs of so many steps, for so many tiles of outputs.

    A part has four steps at least, to be worth its start, and there are eight parts at most.
    """
    wanted = processors(device) // max(tiles, 1)
    return max(1, min(wanted, steps // 4, 8))


def part_steps(steps: int, parts: int) -> tuple[int, int]:
    """(parts that have work, steps of each) for a wish of so many parts."""
    each = triton.cdiv(steps, parts)
    return triton.cdiv(steps, each), each


def room_for(
    workspace: Tensor | None, parts: int, rows: int, outputs: int, device: torch.device
) -> Tensor:
    """The [parts, rows, outputs] float32 sums: the start of `workspace`, or new memory.

    Raises ValueError for a workspace that is too small.
    """
    needed = parts * rows * outputs
    if workspace is None:
        return torch.empty(needed, dtype=torch.float32, device=device)
    expect("workspace", workspace, (None,), torch.float32)
    if workspace.numel() < needed:
        raise ValueError(
            f"workspace has {workspace.numel()} float32 elements, {needed} are needed for "
            f"{parts} parts of {rows} rows and {outputs} outputs"
        )
    return workspace[:needed]


def add_parts(parts: Tensor, count: int, bias: Tensor | None, out: Tensor) -> None:
    """out [rows, outputs] = the sum of `count` parts [rows, outputs] plus bias [outputs]."""
    elements = out.numel()
    _add_parts_kernel[(triton.cdiv(elements, _BLOCK),)](
        parts, bias, out, elements, out.shape[1], PARTS=count, BLOCK=_BLOCK, num_warps=4
    )


def variants() -> tuple[Variant, ...]:
    return (
        Variant(
            name="add_parts 4 to bf16",
            kernel=_add_parts_kernel,
            signature={
                "parts_ptr": "*fp32",
                "out_ptr": "*bf16",
                "elements": "i32",
                "outputs": "i32",
            },
            constants={"bias_ptr": None, "PARTS": 4, "BLOCK": _BLOCK},
            aligned=("parts_ptr", "out_ptr", "outputs"),
        ),
    )
