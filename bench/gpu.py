"""Everything that is measured on a GPU, within a time: `make gpu-bench`.

    python -m bench.gpu [--seconds 270] [--only models linears attention kernels]

Writes bench/results/gpu.md and gpu.json with the device, its driver and the date. Models come
first, then products, attention and the other kernels; what the time does not reach is said.
"""

import argparse
import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import linear

from bench import gpu_attention, gpu_kernels, gpu_linears, gpu_models
from bench.gpu_cases import FULL, OURS, Case, Figure, failed, half, randn, run
from bench.gpu_models import Plan
from bench.gpu_report import Run, dumped, markdown
from bench.roofline import LLAMA_8B, QWEN3_06B, Limits, ModelShape
from shoal.kernels.measure import Clock, CudaClock, software
from shoal.worker.config import EngineConfig
from shoal.worker.gpu.choose import device_precision
from shoal.worker.gpu.device import CudaDevice

RESULTS = Path(__file__).parent / "results"
PARTS = ("models", "linears", "attention", "kernels")
_SQUARE = 8192  # of the products that say what the device multiplies at most
_COPIED = 1 << 30  # bytes


def limits_of(clock: Clock, square: int = _SQUARE, copied: int = _COPIED) -> Limits:
    """Measured with torch's own copy and products. A kind that the device has not is left out."""
    device = clock.device
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * copied / clock.measure(partial(target.copy_, source), 0.3).median
    del source, target
    rates: dict[str, float] = {}
    a, b = (randn(device, square, square, dtype=half(device)) for _ in range(2))
    for kind, launch in {
        "bf16": lambda: linear(a, b),
        "fp8": _fp8_product(square, device),
        "int8": _int8_product(square, device),
    }.items():
        try:
            rates[kind] = 2 * square**3 / clock.measure(launch, 0.3).median
        except (RuntimeError, ValueError) as error:
            print(f"no rate of {kind} products: {str(error).partition(chr(10))[0]}")
    # What no torch product shows is held against the 16 bits that the device has at least.
    return Limits(copy, {"fp8": rates["bf16"], "int8": rates["bf16"], **rates})


def _fp8_product(square: int, device: torch.device) -> Callable[[], object]:
    """Of random codes, as all of them: equal ones take less power, and so run faster."""
    codes = torch.randn(square, square, device=device).to(torch.float8_e4m3fn)
    scale = torch.ones((), device=device)
    return lambda: torch._scaled_mm(
        codes, codes.t(), scale_a=scale, scale_b=scale, out_dtype=half(device)
    )


def _int8_product(square: int, device: torch.device) -> Callable[[], object]:
    codes = torch.randint(-127, 128, (square, square), dtype=torch.int8, device=device)
    return lambda: torch._int_mm(codes, codes.t())


def plan_of(shape: ModelShape) -> Plan:
    return Plan(
        shape=shape,
        config=EngineConfig(
            max_model_len=16384 + 128,
            max_num_seqs=256,
            max_batched_tokens=8192,
            max_prefill_tokens=8192,
            enable_prefix_caching=False,
            dtype="bfloat16",
        ),
        batches=(1, 8, 32, 64, 128, 256),
        contexts=(128, 2048, 16384),
        prompts=(2048, 8192),
        steps=16,
        requests=1000,
        asked=1024,
        answered=256,
    )


@dataclasses.dataclass(slots=True)
class Budget:
    """Until when parts may begin something new, and what did not."""

    ends: float
    clock: Callable[[], float] = time.perf_counter
    left_out: list[str] = dataclasses.field(default_factory=list)

    @property
    def spent(self) -> bool:
        return self.clock() >= self.ends


def timed(
    cases: Iterable[Case], clock: Clock, limits: Limits, budget: Budget, seconds: float = 0.05
) -> Iterator[Figure]:
    for case in cases:
        if budget.spent:
            budget.left_out.append(f"{case.table}, {case.name}")
            continue
        yield from run(case, clock, limits, seconds)


def modelled(
    shapes: Sequence[ModelShape], clock: Clock, limits: Limits, budget: Budget, share: float
) -> Iterator[Figure]:
    """Each model has an equal part of `share` of the time that is left."""
    begun = time.perf_counter()
    each = share * (budget.ends - begun) / len(shapes)
    for turn, shape in enumerate(shapes):
        plan = plan_of(shape)
        precision = device_precision(plan.config.dtype, "cuda")
        try:
            bench = gpu_models.load(plan, CudaDevice(), precision, limits)
        except Exception as error:
            yield failed("model", shape.name, OURS, error)
            continue
        print(f"{shape.name} loaded after {time.perf_counter() - begun:.0f} s")
        yield from gpu_models.run(bench, begun + (turn + 1) * each, budget.left_out.append)
        bench.executor.close()
        del bench
        gc.collect()
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--seconds", type=float, default=270.0, help="for all of it")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu.md and gpu.json")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("This measures a GPU, and torch finds none on this machine.", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    budget = Budget(time.perf_counter() + given.seconds)
    clock = CudaClock(device)
    limits = limits_of(clock)
    parts: dict[str, Iterator[Figure]] = {
        "models": modelled((QWEN3_06B, LLAMA_8B), clock, limits, budget, 0.6),
        "linears": timed(gpu_linears.cases(FULL), clock, limits, budget),
        "attention": timed(gpu_attention.cases(FULL), clock, limits, budget),
        "kernels": timed(gpu_kernels.cases(FULL), clock, limits, budget),
    }
    figures: list[Figure] = []
    for name in PARTS:
        if name not in given.only:
            continue
        for figure in parts[name]:
            print(_line(figure), flush=True)
            figures.append(figure)
            # Kept after every figure: a run that is cut short has said what it measured.
            _write(given.out, device, limits, figures, budget.left_out)
    print((given.out / "gpu.md").read_text())
    return 1 if any(figure.failed for figure in figures) else 0


def _line(figure: Figure) -> str:
    if figure.median is None:
        return f"{figure.table}, {figure.case}, {figure.peer}: {figure.note}"
    share = "" if figure.share is None else f", {figure.share:.0%} of the limit"
    note = f", {figure.note}" if figure.note else ""
    return (
        f"{figure.table}, {figure.case}, {figure.peer}: {figure.median * 1e6:,.1f} us{share}{note}"
    )


def _write(
    folder: Path,
    device: torch.device,
    limits: Limits,
    figures: Sequence[Figure],
    left_out: Sequence[str],
) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    found = Run(name, software(), date, limits, tuple(figures), tuple(left_out))
    (folder / "gpu.md").write_text(markdown(found))
    (folder / "gpu.json").write_text(dumped(found))


if __name__ == "__main__":
    sys.exit(main())
