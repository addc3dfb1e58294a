"""The benchmark of a GPU runs to its end: every case and a small model, at sizes of seconds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_attention, gpu_kernels, gpu_linears, gpu_models
from bench.gpu_cases import OURS, TINY, Case, Figure, run
from bench.gpu_linears import PLAIN
from bench.gpu_models import Plan
from bench.gpu_report import Run, dumped, goals, markdown
from bench.roofline import Limits, ModelShape, Work
from shoal.kernels.measure import clock_of
from shoal.worker.config import EngineConfig
from shoal.worker.gpu.choose import device_precision
from shoal.worker.gpu.device import CudaDevice, Device, HostDevice

LIMITS = Limits(copy=1e12, multiply={"bf16": 1e15, "fp8": 2e15, "int8": 2e15})

CASES = [*gpu_linears.cases(TINY), *gpu_attention.cases(TINY), *gpu_kernels.cases(TINY)]


@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")  # of flex_attention that is not compiled
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.table}: {case.name}")
def test_every_case_runs(case: Case, device: torch.device) -> None:
    """Ours in any case; a peer runs, or is a figure that says why it cannot."""
    figures = run(case, clock_of(device), LIMITS, 0.0)
    assert figures[0].peer == OURS
    assert figures[0].share is not None
    assert figures[0].share > 0
    assert not any(figure.failed for figure in figures)
    for figure in figures:
        assert (figure.median is None) == bool(figure.note)
    if "linear" in case.table:
        assert any(figure.peer == PLAIN and figure.median is not None for figure in figures)


def test_limits_are_those_of_the_device(device: torch.device) -> None:
    """Copies and products of every kind have a rate, where torch has no such product that of
    sixteen bits."""
    limits = gpu.limits_of(clock_of(device), square=64, copied=1 << 16)
    assert limits.copy > 0
    assert limits.multiply.keys() == {"bf16", "fp8", "int8"}


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_random_weights_runs_every_job(tied: bool, device: torch.device) -> None:
    """Prefills, decode steps and requests through the engine; what does not fit says so."""
    shape = ModelShape("tiny", 1, 64, 64, 2, 1, 32, 96, tied)
    plan = Plan(
        shape=shape,
        config=EngineConfig(
            max_model_len=64,
            max_num_seqs=2,
            max_batched_tokens=32,
            kv_cache_blocks=6,
            enable_prefix_caching=False,
        ),
        batches=(1, 2),
        contexts=(20, 40),
        prompts=(16,),
        steps=2,
        requests=2,
        asked=5,
        answered=2,
    )
    seam: Device = CudaDevice() if device.type == "cuda" else HostDevice(1 << 30)
    kind = "cuda" if device.type == "cuda" else "interpreter"
    bench = gpu_models.load(plan, seam, device_precision("float32", kind), LIMITS)
    figures = list(gpu_models.run(bench, float("inf"), lambda name: pytest.fail(name)))
    bench.executor.close()
    assert [figure.table for figure in figures] == ["prefill", *["decode step"] * 4, "serving"]
    *measured, too_long, served = figures
    assert all(figure.median and figure.share for figure in measured)
    assert too_long.note == "the KV cache holds 80 tokens"
    assert served.note.startswith("2 done")


def test_jobs_behind_the_deadline_are_named_not_run() -> None:
    """A run that has no time left says what it left out."""
    budget = gpu.Budget(ends=0.0, clock=lambda: 1.0)
    never = Case("linear fp8", "1 rows", Work(1.0), lambda device: pytest.fail("ran"))
    assert not list(gpu.timed([never], clock_of(torch.device("cpu")), LIMITS, budget))
    assert budget.left_out == ["linear fp8, 1 rows"]


def figure(table: str, case: str, peer: str, median: float, share: float | None) -> Figure:
    return Figure(table, case, peer, median, median, median, share, "memory")


def test_a_fault_is_a_figure_and_the_rest_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """Ours is marked as failed and its traceback shown; a peer that cannot run is a note."""

    def broken() -> None:
        raise RuntimeError("no such type\nand more")

    case = Case("t", "c", Work(1.0), lambda device: {OURS: broken, "a": broken, "b": lambda: None})
    ours, a, b = run(case, clock_of(torch.device("cpu")), LIMITS, 0.0)
    assert ours.failed and not a.failed and not b.failed
    assert a.note == "RuntimeError: no such type"
    assert b.median is not None
    assert "in broken" in capsys.readouterr().err
    unprepared = replace(case, prepare=lambda device: broken())
    (only,) = run(unprepared, clock_of(torch.device("cpu")), LIMITS, 0.0)
    assert only.failed


def test_goals_name_the_worst_figure() -> None:
    """Each goal says its worst value, where it is, and whether all reach it."""
    figures = [
        figure("decode step", "A, batch 1", OURS, 1.0, 0.9),
        figure("decode step", "A, batch 8", OURS, 1.0, 0.5),
        figure("linear int4", "1 rows", OURS, 1.0, 0.8),
        figure("linear int4", "1 rows", PLAIN, 3.0, None),
        figure("linear int4", "64 rows", OURS, 1.0, 0.8),
        figure("linear int4", "64 rows", PLAIN, 1.0, None),
        figure("attention decode", "8 x 128 tokens, KV 16 bits", OURS, 1.0, 0.1),
        figure("attention decode", "8 x 16384 tokens, KV 16 bits", OURS, 1.0, 0.95),
    ]
    lines = [goal.line() for goal in goals(figures)]
    assert lines[0].endswith("| 0.50 (A, batch 8) | met by 1 of 2 |")
    assert lines[1].endswith("| - | not measured |")
    assert lines[2].endswith("| 0.95 (8 x 16384 tokens, KV 16 bits) | met |")
    assert lines[5].endswith("| 3.00 (1 rows) | met |")


def test_the_report_shows_every_figure(tmp_path: Path) -> None:
    """Tables for people, JSON for programs; a peer that could not run says why."""
    peer = replace(figure("linear int4", "1 rows", PLAIN, 3e-6, None), least=2e-6, most=4e-6)
    absent = Figure("linear int4", "1 rows", "other", None, None, None, None, "", "no such type")
    figures = (figure("linear int4", "1 rows", OURS, 1e-6, 0.8), peer, absent)
    found = Run("X1", "driver 1", "2026-01-02", LIMITS, figures, ("serving",))
    text = markdown(found)
    assert "| 1 rows | shoal | 1.0 us | 80% | memory |  |" in text
    assert f"| 1 rows | {PLAIN} | 3.0 (2.0-4.0) us |  | memory | 3.00 x |" in text
    assert "| 1 rows | other | no such type | | | |" in text
    assert "Left out for want of time: serving." in text
    assert json.loads(dumped(found))["figures"][0]["share"] == 0.8


def test_without_a_gpu_the_benchmark_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends with one sentence, not a traceback."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "torch finds none" in capsys.readouterr().err
