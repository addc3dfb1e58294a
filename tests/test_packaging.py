"""The layout holds: one namespace package over several roots, and no room drags in another's."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("api", "kernels", "worker", "router", "operator", "cli")
# What the process of a room must not load, because its image does not hold it.
FORBIDDEN = {
    "api": ("torch", "kopf", "kubernetes", "uvicorn"),
    "kernels": ("grpc", "kopf", "kubernetes", "uvicorn"),
    "worker": ("kopf", "kubernetes", "uvicorn", "fastokens", "transformers"),
    "router": ("torch", "kopf", "kubernetes", "transformers"),
    "operator": ("torch", "transformers", "uvicorn"),
    "cli": ("torch", "transformers"),
}


def modules(room: str) -> list[str]:
    """Every module of a room that can be imported without running it."""
    root = ROOT / room
    paths = (path.relative_to(root) for path in sorted((root / "shoal" / room).rglob("*.py")))
    return [
        ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for path in paths
        if path.name != "__main__.py"
    ]


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_namespace_has_no_init() -> None:
    """One stray shoal/__init__.py would hide all other rooms, while mypy passes."""
    assert not list(ROOT.glob("*/shoal/__init__.py"))


def test_tests_have_no_init() -> None:
    """Tests are imported by path; a package of tests would shadow by name."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_operator_stays_the_standard_library() -> None:
    """The folder operator/ is a source root, and no module, even from the repository's root."""
    assert run_python("import operator; print(operator.itemgetter(1)('ab'))") == "b\n"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_and_stays_light(room: str) -> None:
    """Every module of the room imports, without what the room's image does not hold."""
    names = modules(room)
    assert names
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print(*sorted({set(FORBIDDEN[room])!r} & sys.modules.keys()))"
    )
    assert run_python(code).split() == []
