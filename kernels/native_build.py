"""Compiles the native kernels in place: `python kernels/native_build.py`.

Installing Shoal does it (hatch_build.py), where there is a C++ compiler. Without one, or on
another processor than x86-64, the installation is complete all the same: the engine then
computes with torch, slower, and its start log says so.
"""

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "shoal" / "kernels"
_COMMON = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra")


@dataclass(frozen=True, slots=True)
class Library:
    """One shared library of the installation."""

    name: str
    source: str  # in csrc/
    flags: tuple[str, ...]
    machines: tuple[str, ...]  # processors that it is built for; none named: any

    def command(self, compiler: str, target: Path) -> list[str]:
        source = FOLDER / "csrc" / self.source
        return [*compiler.split(), *_COMMON, *self.flags, str(source), "-o", str(target)]


STEP = Library(
    "_native_avx512bf16.so",
    "step.cpp",
    (
        "-fno-math-errno",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx512bf16",
        "-mavx512vnni",
        "-mfma",
        # GCC's own vector headers start from undefined registers on purpose.
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ),
    ("x86_64",),
)
SHARED = Library("_shared.so", "shared.cpp", (), ())
LIBRARIES = (STEP, SHARED)


def compile_native(folder: Path = FOLDER) -> list[str]:
    """Names of the libraries that are there now. A compiler that fails is reported, not fatal."""
    return [library.name for library in LIBRARIES if _compile(library, folder)]


def _compile(library: Library, folder: Path) -> bool:
    path = folder / library.name
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    fits = not library.machines or platform.machine() in library.machines
    if compiler is None or sys.platform != "linux" or not fits:
        path.unlink(missing_ok=True)  # of an earlier installation: it may not fit these sources
        return False
    fresh = path.with_suffix(f".{os.getpid()}.so")
    command = library.command(compiler, fresh)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        print(f"{library.name} was not built:\n{done.stderr[-4000:]}", file=sys.stderr)
        fresh.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        return False
    fresh.replace(path)
    return True


if __name__ == "__main__":
    sys.exit(len(compile_native()) != len(LIBRARIES))
