"""The init container: a model comes into the cache once, or a sentence says why not."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoal.worker import last_words
from shoal.worker.fetch import FAILED, NOT_FOUND
from shoal.worker.sources.base import Fetch, no_space, out_of_space
from shoal.worker.sources.lock import locked
from tests.worker.test_sources import wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, and nothing else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def start(cache: Path, model: str = "py://tiny-model", *flags: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "shoal.worker.fetch", "--model", model, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "SHOAL_CACHE_DIR": str(cache)},
    )


def run(cache: Path, model: str = "py://tiny-model", *flags: str) -> tuple[int, str]:
    """Exit code and log."""
    process = start(cache, model, *flags)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_pods_that_share_a_volume_download_once(index: Path, tmp_path: Path) -> None:
    """Of three at once one installs; all end with 0 and name the same file and its size."""
    wheel(index)
    processes = [start(tmp_path / "cache") for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert sum("downloading tiny-model" in output for output in outputs) == 1
    ends = [re.search(r"py://tiny-model 1\.0: 0 MB at (\S+)", output) for output in outputs]
    assert {end[1] for end in ends if end} == {
        str(tmp_path / "cache/py/tiny-model-1.0/tiny_model/m.gguf")
    }


def test_what_a_killed_fetch_left_is_cleared(index: Path, tmp_path: Path) -> None:
    """Its lock is no lock any more, and its half-made folder goes; other files stay."""
    wheel(index)
    root = tmp_path / "cache" / "py"
    (root / ".tiny-model-ab12_xyz" / "target").mkdir(parents=True)
    (root / ".tiny-model-extra-ab12_xyz").mkdir()
    (root / ".tiny-model.lock").touch()
    code, output = run(tmp_path / "cache")
    assert code == 0, output
    assert sorted(path.name for path in root.iterdir()) == [
        ".tiny-model-extra-ab12_xyz",
        ".tiny-model.lock",
        "tiny-model-1.0",
    ]


@pytest.mark.parametrize(
    ("model", "flags", "code", "words"),
    [
        ("py://tiny-model", ("--model-revision", "9"), FAILED, "tiny-model==9"),
        ("/no/such/model.gguf", (), NOT_FOUND, "no such file"),
        ("s3://bucket/model", (), FAILED, "not supported yet"),
    ],
)
def test_what_cannot_be_had_is_said(
    index: Path, tmp_path: Path, model: str, flags: tuple[str, ...], code: int, words: str
) -> None:
    """One sentence and an exit code that tells whether to try again; no traceback."""
    wheel(index)
    ended, output = run(tmp_path / "cache", model, *flags)
    assert ended == code
    assert words in output
    assert "Traceback" not in output


def test_a_cache_that_cannot_be_written_names_the_user(tmp_path: Path) -> None:
    """The owner of a volume needs to know who has to be let in."""
    (tmp_path / "cache").touch()
    code, output = run(tmp_path / "cache")
    assert code == FAILED
    assert f"user {os.getuid()}" in output


def test_sigterm_ends_it_while_it_waits(index: Path, tmp_path: Path) -> None:
    """Also as a container's first process, where an unhandled signal would be ignored."""
    wheel(index)
    root = tmp_path / "cache" / "py"
    root.mkdir(parents=True)
    asked = Fetch("", "", None, root, lambda what, share: None, 1.0)
    with locked(root / ".tiny-model.lock", asked, time.monotonic()) as alone:
        assert alone
        process = start(tmp_path / "cache")
        assert process.stdout is not None
        for line in process.stdout:
            if "waiting for another process" in line:
                break
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM
        process.stdout.close()


def test_waiting_for_another_ends(index: Path, tmp_path: Path) -> None:
    """A holder that never lets go is named after the deadline."""
    wheel(index)
    root = tmp_path / "cache" / "py"
    root.mkdir(parents=True)
    asked = Fetch("", "", None, root, lambda what, share: None, 1.0)
    with locked(root / ".tiny-model.lock", asked, time.monotonic()):
        code, output = run(tmp_path / "cache", "py://tiny-model", "--deadline-seconds", "1")
    assert code == FAILED
    assert ".tiny-model.lock" in output


def test_a_full_disk_is_told_with_figures(tmp_path: Path) -> None:
    """The message names the volume, its size and what to do; tools' own words are understood."""
    asked = Fetch("hf://a/b", "a/b", None, tmp_path, lambda what, share: None, 1.0)
    words = str(no_space(asked, tmp_path / "not" / "there"))
    assert str(tmp_path) in words
    assert "GB free of" in words
    assert "spec.cache" in words
    assert out_of_space(OSError(28, "x"))
    assert out_of_space("ERROR: Could not install packages: [Errno 28] No space left on device")
    assert not out_of_space(OSError(13, "x"))


def test_last_words_fit_and_are_never_a_new_file(tmp_path: Path) -> None:
    """The kubelet's file is overwritten and cut at a whole character; none is made elsewhere."""
    path = tmp_path / "termination-log"
    last_words.say("lost", path)
    assert not path.exists()
    path.write_text("what was there before and is longer than the news")
    last_words.say("short", path)
    assert path.read_text() == "short"
    last_words.say("é" * 4000, path)
    text = path.read_bytes()
    assert len(text) <= 4096
    assert text.decode().endswith("é...")
