"""Generated files are committed as they are generated, and a difference is shown."""

import shutil
from pathlib import Path

import pytest

from shoal.api import generate

ROOT = Path(__file__).parents[2]


def test_the_tree_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    """What is committed is what the sources say."""
    assert generate.main(["--check"]) == 0, capsys.readouterr().out


def test_a_difference_is_shown_and_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--check prints a diff and fails; without it the files are written, then left alone."""
    protos = tmp_path / generate.PROTO_DIR
    protos.mkdir(parents=True)
    for proto in (ROOT / generate.PROTO_DIR).glob("*.proto"):
        shutil.copy(proto, protos)
    root = ["--root", str(tmp_path)]
    assert generate.main(root) == 0
    capsys.readouterr()

    crd, stale = tmp_path / generate.CRD_PATH, protos / "gone_pb2.py"
    crd.write_text(crd.read_text().replace("shortNames", "longNames"))
    stale.write_text("x = 1\n")
    assert generate.main([*root, "--check"]) == 1
    shown = capsys.readouterr()
    assert "-    longNames:" in shown.out and "+    shortNames:" in shown.out
    assert "-x = 1" in shown.out
    assert "run: make generate" in shown.err

    assert generate.main(root) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {generate.PROTO_DIR / 'gone_pb2.py'}",
        f"wrote {generate.CRD_PATH}",
    ]
    assert not stale.exists()
    assert generate.main([*root, "--check"]) == 0


def test_outside_a_checkout_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without .proto files there is nothing to generate from."""
    assert generate.main(["--root", str(tmp_path)]) == 2
    assert "run this in a source checkout" in capsys.readouterr().err
