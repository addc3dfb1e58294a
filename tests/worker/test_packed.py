"""Packed weights on the cache volume: the same answers, without reading the checkpoint."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from shoal.kernels.native import unavailable
from shoal.worker.config import EngineConfig
from shoal.worker.model.native import NativeBackend
from shoal.worker.model.packed import PackedStore
from shoal.worker.request import SamplingParams
from shoal.worker.runner import InProcessExecutor, create_executor
from shoal.worker.step import Row, SlotBlocks, SlotInit, StepPlan

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@pytest.fixture
def checkpoint(models: ModuleType, tmp_path: Path) -> Iterator[Path]:
    threads = torch.get_num_threads()
    yield models.save(models.tiny("groups-of-64"), tmp_path / "model")
    torch.set_num_threads(threads)


def start(checkpoint: Path, folder: Path | None, quantization: str = "none") -> InProcessExecutor:
    config = EngineConfig(
        max_num_seqs=2,
        block_size=16,
        kv_cache_blocks=20,
        dtype="bfloat16",
        threads=1,
        quantization=quantization,
    )
    executor = create_executor(checkpoint, config, lambda phase, seconds: None, packed=folder)
    for thread in threading.enumerate():
        if thread.name == "packed weights":
            thread.join(20)
    return executor


def backend(executor: InProcessExecutor) -> NativeBackend:
    (found,) = executor._backends.values()
    assert isinstance(found, NativeBackend)
    return found


def tokens(executor: InProcessExecutor, count: int = 12) -> list[int]:
    """Greedy tokens after a fixed prompt."""
    prompt = tuple(range(3, 40))
    blocks = tuple(range(1, 6))
    begin = SlotInit(0, prompt, len(prompt), SamplingParams(temperature=0.0), 0, blocks)
    rows = (Row(0, 0, len(prompt), sample=True),)
    found = [executor.execute(StepPlan(1, (begin,), (), rows)).sampled[0].token_id]
    none: tuple[SlotBlocks, ...] = ()
    for place in range(len(prompt), len(prompt) + count):
        rows = (Row(0, place, 1, sample=True),)
        found.append(executor.execute(StepPlan(2, (), none, rows)).sampled[0].token_id)
    return found


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_second_start_maps_what_the_first_kept(
    checkpoint: Path, tmp_path: Path, quantization: str
) -> None:
    """The same tokens, and not a tensor of the checkpoint is read."""
    folder = tmp_path / "packed"
    first = start(checkpoint, folder, quantization)
    (kept,) = folder.glob("*.packed")
    second = start(checkpoint, folder, quantization)
    assert (backend(first).mapped, backend(second).mapped) == (False, True)
    assert backend(second).times.load == backend(second).times.pack == 0.0
    assert tokens(first) == tokens(second)
    assert [path for path in folder.iterdir() if path.suffix == ".new"] == []
    assert kept.stat().st_mode & 0o777 == 0o644


def test_without_a_folder_nothing_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    """A pod whose cache ends with it writes nothing."""
    before = sorted(tmp_path.rglob("*"))
    assert not backend(start(checkpoint, None)).mapped
    assert sorted(tmp_path.rglob("*")) == before


def test_another_checkpoint_or_quantization_is_packed_anew(
    models: ModuleType, checkpoint: Path, tmp_path: Path
) -> None:
    """A file that was replaced under the same name is not taken for what it was."""
    folder = tmp_path / "packed"
    start(checkpoint, folder)
    assert not backend(start(checkpoint, folder, "int8")).mapped
    weights = next(checkpoint.glob("*.safetensors"))
    os.utime(weights, ns=(1, 1))
    assert not backend(start(checkpoint, folder)).mapped
    assert len(list(folder.glob("*.packed"))) == 3


@pytest.mark.parametrize("damage", ["cut", "another format", "empty", "no header"])
def test_a_damaged_file_is_read_around(checkpoint: Path, tmp_path: Path, damage: str) -> None:
    """The start takes longer, answers are right, and the file is made anew."""
    folder = tmp_path / "packed"
    right = tokens(start(checkpoint, folder))
    (kept,) = folder.glob("*.packed")
    whole = kept.read_bytes()
    kept.write_bytes(
        {
            "cut": whole[:-64],
            "another format": b"SHOALPK0" + whole[8:],
            "empty": b"",
            "no header": whole[:16] + b"x" * (len(whole) - 16),
        }[damage]
    )
    again = start(checkpoint, folder)
    assert not backend(again).mapped
    assert tokens(again) == right
    assert kept.read_bytes() == whole


def test_old_files_go(checkpoint: Path, tmp_path: Path) -> None:
    """Eight stay, those used last; what a killed writer left goes too."""
    folder = tmp_path / "packed"
    folder.mkdir()
    for age in range(10):
        (folder / f"old-{age}.packed").write_bytes(b"")
        os.utime(folder / f"old-{age}.packed", (1000 - age, 1000 - age))
    (folder / "x.new").write_bytes(b"")
    start(checkpoint, folder)
    kept = {path.name for path in folder.glob("*.packed")}
    assert len(kept) == 8
    assert {"old-0.packed", "old-6.packed"} <= kept
    assert "old-7.packed" not in kept
    assert not list(folder.glob("*.new"))


def test_one_writer_at_a_time(checkpoint: Path, tmp_path: Path) -> None:
    """Who finds the lock taken, or the folder closed, serves without keeping anything."""
    from fcntl import LOCK_EX, flock

    folder = tmp_path / "packed"
    folder.mkdir()
    with (folder / "packed.lock").open("a") as lock:
        flock(lock, LOCK_EX)
        assert tokens(start(checkpoint, folder))
        assert not list(folder.glob("*.packed"))
    (tmp_path / "file").write_text("")
    assert PackedStore(tmp_path / "file", checkpoint, "bfloat16", "none").load() is None
    assert tokens(start(checkpoint, tmp_path / "file"))
