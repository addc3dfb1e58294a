"""Ranks that are processes: over shared memory, over sockets, and what becomes of them when one of
them or their driver dies."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from bench.parallel import random_checkpoint
from shoal.worker.executor import DeviceLost
from shoal.worker.parallel.driver import GroupExecutor, sweep
from shoal.worker.parallel.invitation import Order
from shoal.worker.parallel.local import LocalLauncher
from shoal.worker.request import SamplingParams
from shoal.worker.runner import create_executor
from shoal.worker.step import Row, SlotInit, StepPlan

pytestmark = pytest.mark.slow
WAIT_SECONDS = 60.0
PROMPT = (5, 6, 7, 8, 9, 10, 11)


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not what():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


@pytest.mark.parametrize("nodes", [("localhost", "localhost"), ("127.0.0.1", "127.0.0.2")])
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_processes_answer_as_one_rank_does(
    nodes: tuple[str, ...],
    tensor: int,
    pipeline: int,
    groups: ModuleType,
    tmp_path: Path,
) -> None:
    """Ranks of one node share memory; ranks that count as two nodes talk over gloo. Nothing of
    either is left in memory or among the processes."""
    path = random_checkpoint(tmp_path)
    config = groups.settings()
    reference = create_executor(path, config, lambda phase, seconds: None)
    wanted = groups.generate(reference, config, [PROMPT], 8)
    before = set(Path("/dev/shm").iterdir())
    launcher = LocalLauncher(2, nodes=nodes)
    order = Order(str(path), str(path), None, None, config)
    executor = GroupExecutor(order, tensor, pipeline, launcher, lambda phase, seconds: None)
    assert groups.generate(executor, config, [PROMPT], 8) == wanted
    pids = launcher.pids
    assert set(Path("/dev/shm").iterdir()) <= before
    executor.close()
    assert not any(map(psutil.pid_exists, pids))


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_stops_is_named_and_ends_the_group(
    signal_number: int, groups: ModuleType, tmp_path: Path
) -> None:
    """While a step waits for it: the step fails as the device's loss, the other rank ends."""
    path = random_checkpoint(tmp_path)
    launcher = LocalLauncher(2)
    order = Order(str(path), str(path), None, None, groups.settings())
    executor = GroupExecutor(order, 2, 1, launcher, lambda phase, seconds: None)
    pids = launcher.pids
    assert executor.lost is None
    os.kill(pids[1], signal_number)
    init = SlotInit(0, PROMPT, len(PROMPT), SamplingParams(temperature=0.0), 0, (1, 2))
    with pytest.raises(DeviceLost, match="rank 1"):
        executor.submit(StepPlan(1, (init,), (), (Row(0, 0, len(PROMPT), True),)))
        executor.collect()
    assert executor.lost is not None and "rank 1" in executor.lost
    executor.close()
    assert not any(map(psutil.pid_exists, pids))


def test_no_rank_outlives_a_killed_driver(tmp_path: Path) -> None:
    """SIGKILL of the engine's process, while its ranks serve."""
    path = random_checkpoint(tmp_path)
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from shoal.worker.config import EngineConfig, ParallelConfig\n"
        "from shoal.worker.parallel.create import create_group\n"
        f"config = EngineConfig(block_size=4, kv_cache_blocks=50, dtype='float32', threads=1)\n"
        f"group = create_group(Path({str(path)!r}), config, ParallelConfig(2, 1), print)\n"
        "print(*group._launcher.pids, flush=True)\n"
        "time.sleep(600)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    try:
        for line in driver.stdout:
            if line.replace(" ", "").strip().isdigit():
                break
        pids = [int(word) for word in line.split()]
        assert all(map(psutil.pid_exists, pids))
    finally:
        driver.kill()
        driver.wait()
        driver.stdout.close()
    until(lambda: not any(map(_runs, pids)))


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_nothing_is_left_of_a_rank_that_is_killed_while_it_loads(
    groups: ModuleType, tmp_path: Path
) -> None:
    """Names of shared memory are gone before weights are loaded, so no end of a rank leaves any."""
    path = random_checkpoint(tmp_path)
    before = set(Path("/dev/shm").iterdir())
    launcher = LocalLauncher(2)
    named: list[set[Path]] = []

    def kill(phase: str, seconds: float) -> None:
        if phase == "load":
            named.append(set(Path("/dev/shm").iterdir()) - before)
            os.kill(launcher.pids[1], signal.SIGKILL)

    order = Order(str(path), str(path), None, None, groups.settings())
    with pytest.raises(DeviceLost, match="rank 1"):
        GroupExecutor(order, 2, 1, launcher, kill)
    assert named == [set()]
    assert set(Path("/dev/shm").iterdir()) <= before
    assert not any(map(psutil.pid_exists, launcher.pids))


def test_a_driver_sweeps_the_names_of_its_group_only(tmp_path: Path) -> None:
    """What a rank left that was killed before all had opened it."""
    for name in ("shoal-a-s0", "shoal-a-r1", "shoal-b-s0"):
        (tmp_path / name).touch()
    sweep("shoal-a", tmp_path)
    sweep("shoal-a", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["shoal-b-s0"]
