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
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "shoal" / "kernels"
LIBRARY = "_native_avx512bf16.so"
FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fno-math-errno"),
    *(
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx512bf16",
        "-mavx512vnni",
        "-mfma",
    ),
    # GCC's own vector headers start from undefined registers on purpose.
    *("-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
)


def compile_native(folder: Path = FOLDER) -> bool:
    """Whether the library is there now. A compiler that fails is reported, not fatal."""
    library = folder / LIBRARY
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None or sys.platform != "linux" or platform.machine() != "x86_64":
        library.unlink(missing_ok=True)  # of an earlier installation: it may not fit these sources
        return False
    fresh = library.with_suffix(f".{os.getpid()}.so")
    command = [*compiler.split(), *FLAGS, str(folder / "csrc" / "step.cpp"), "-o", str(fresh)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        print(f"native kernels were not built:\n{done.stderr[-4000:]}", file=sys.stderr)
        fresh.unlink(missing_ok=True)
        library.unlink(missing_ok=True)
        return False
    fresh.replace(library)
    return True


if __name__ == "__main__":
    sys.exit(not compile_native())
