"""Proof without a GPU: every kernel compiles for every architecture and keeps its promises.

`python -m shoal.kernels.compile_proof [kernel file ...]` builds the variants that the files of
`shoal.kernels.gpu` list, each for sm_80, sm_90 and sm_100, reads registers, stack and shared
memory from the machine code (`cuobjdump`, in Triton's wheel) and the kind of matrix instruction
from the PTX, prints a table, and exits with 1 where a variant breaks what it promises.

Triton decides at decoration whether a kernel is interpreted, so this runs without
TRITON_INTERPRET in the environment.
"""

import argparse
import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import shoal.kernels.gpu
from shoal.kernels.gpu.configs import Table, Tunable, tables
from shoal.kernels.gpu.variant import ARCHITECTURES, Variant


@dataclass(frozen=True, slots=True)
class Architecture:
    """Limits of one compute capability (CUDA C++ Programming Guide, table of technical specs)."""

    shared_per_block: int  # bytes, after the opt-in
    shared_per_sm: int  # bytes
    threads_per_sm: int
    registers_per_sm: int = 65536
    blocks_per_sm: int = 32


LIMITS = {
    80: Architecture(shared_per_block=163 << 10, shared_per_sm=164 << 10, threads_per_sm=2048),
    90: Architecture(shared_per_block=227 << 10, shared_per_sm=228 << 10, threads_per_sm=2048),
    100: Architecture(shared_per_block=227 << 10, shared_per_sm=228 << 10, threads_per_sm=2048),
}

# What stands in the PTX for a product on tensor cores.
PRODUCTS = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync"}

# What a tile of 64 rows or more compiles to; older tensor cores have mma alone.
WIDE_PRODUCT = {90: "wgmma", 100: "tcgen05"}


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the machine code of one variant uses on one architecture."""

    variant: Variant
    architecture: int
    registers: int  # of a thread
    stack: int  # bytes of a thread in local memory: spilled registers
    shared: int  # bytes of a block
    products: tuple[str, ...]  # kinds of matrix instructions, best first
    num_warps: int

    @property
    def blocks_per_sm(self) -> int:
        """How many blocks fit a multiprocessor at once; registers are given out by 8 a thread."""
        limits = LIMITS[self.architecture]
        threads = self.num_warps * 32
        registers = -(-max(self.registers, 1) // 8) * 8 * threads
        fits = min(
            limits.blocks_per_sm,
            limits.threads_per_sm // threads,
            limits.registers_per_sm // registers,
        )
        # Each block takes 1 KiB of shared memory for the system.
        return min(fits, limits.shared_per_sm // (self.shared + 1024))


def gpu_modules() -> tuple[str, ...]:
    """Names of the files of `shoal.kernels.gpu` that list variants, sorted."""
    names = sorted(entry.name for entry in pkgutil.iter_modules(shoal.kernels.gpu.__path__))
    return tuple(name for name in names if hasattr(_gpu_module(name), "variants"))


def variants_of(module: str) -> tuple[Variant, ...]:
    """The variants that kernels/gpu/<module>.py lists."""
    listed: tuple[Variant, ...] = _gpu_module(module).variants()
    return listed


def tunables() -> tuple[Tunable, ...]:
    """What the files of `shoal.kernels.gpu` list to be tuned."""
    modules = [_gpu_module(name) for name in gpu_modules()]
    return tuple(
        tunable
        for module in modules
        if hasattr(module, "tunables")
        for tunable in module.tunables()
    )


def tuned_variants(tables: Iterable[Table], known: Iterable[Tunable]) -> Iterator[Variant]:
    """The compilations that tables ask for, each for its table's architecture.

    Raises ValueError for a kernel that a table names and nobody lists.
    """
    by_name = {tunable.kernel: tunable for tunable in known}
    for table in tables:
        for kernel, entries in table.kernels.items():
            if kernel not in by_name:
                raise ValueError(f"the table of {table.device} tunes {kernel}, which is no kernel")
            for entry in entries:
                variant = by_name[kernel].variant(entry.shape, entry.config)
                sizes = " ".join(f"{name}={size}" for name, size in entry.shape.items())
                yield replace(
                    variant,
                    name=f"{variant.name} {sizes}, tuned on {table.device}",
                    architectures=(_built_for(table.capability),),
                )


def _built_for(capability: int) -> int:
    """The architecture of the proof whose code a device of this capability is closest to."""
    return max((each for each in ARCHITECTURES if each <= capability), default=ARCHITECTURES[0])


def _gpu_module(name: str) -> ModuleType:
    return importlib.import_module(f"shoal.kernels.gpu.{name}")


def types(variant: Variant) -> dict[str, str]:
    """Triton's type of each argument; a constant needs no line in the signature."""
    return {**dict.fromkeys(variant.constants, "constexpr"), **variant.signature}


def misfit(variant: Variant) -> str | None:
    """Why the variant does not describe its kernel, in words that name the argument, or None."""
    if not hasattr(variant.kernel, "cache_key"):
        return "its kernel is interpreted: unset TRITON_INTERPRET to compile it"
    parameters = {parameter.name: parameter for parameter in variant.kernel.params}
    given, constant = set(types(variant)), set(variant.constants)
    if given != set(parameters):
        return (
            f"signature and constants lack {sorted(set(parameters) - given)} "
            f"and have {sorted(given - set(parameters))} too many"
        )
    if lacking := {name for name, kind in types(variant).items() if kind == "constexpr"} - constant:
        return f"constants lack {sorted(lacking)}"
    if twice := constant - {name for name, kind in types(variant).items() if kind == "constexpr"}:
        return f"{sorted(twice)} are constants and typed in the signature too"
    for name in variant.aligned:
        if name not in parameters:
            return f"aligned names {name}, which is no argument"
        if parameters[name].do_not_specialize:
            return f"aligned names {name}, which the kernel does not specialize"
    return None


def build(variant: Variant, architecture: int) -> Compiled:
    """Compiles for a capability such as 90, with no device at hand.

    Raises ValueError where the variant does not describe its kernel; Triton's errors as they are.
    """
    if wrong := misfit(variant):
        raise ValueError(f"variant {variant.name!r}: {wrong}")
    names = variant.kernel.arg_names
    source = ASTSource(
        fn=variant.kernel,
        signature={name: types(variant)[name] for name in names},
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "enable_fp_fusion": True,  # said, since releases of Triton differ in what they assume
    }
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, stack = _usage(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    return Compiled(
        variant=variant,
        architecture=architecture,
        registers=registers,
        stack=stack,
        shared=kernel.metadata.shared,
        products=tuple(kind for kind, opcode in PRODUCTS.items() if opcode in ptx),
        num_warps=kernel.metadata.num_warps,
    )


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of its stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool("cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {text!r}")
    return int(found[1]), int(found[2])


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def broken(compiled: Compiled) -> tuple[str, ...]:
    """The promises of the variant that its machine code breaks, a phrase each."""
    variant, architecture = compiled.variant, compiled.architecture
    faults = []
    if variant.hot and compiled.stack:
        faults.append(f"spills {compiled.stack} bytes a thread")
    if variant.tensor_cores and not compiled.products:
        faults.append("has no matrix instruction")
    wide = WIDE_PRODUCT.get(architecture)
    if variant.wgmma and wide is not None and wide not in compiled.products:
        faults.append(f"has {', '.join(compiled.products) or 'no matrix instruction'}, not {wide}")
    limit = LIMITS[architecture].shared_per_block
    if compiled.shared > limit:
        faults.append(f"takes {compiled.shared} bytes of shared memory, a block has {limit}")
    return tuple(faults)


def build_all(
    variants: Iterable[Variant], architectures: Sequence[int] = ARCHITECTURES
) -> Iterator[Compiled]:
    for variant in variants:
        for architecture in architectures:
            if architecture in variant.architectures:
                yield build(variant, architecture)


HEADINGS = ("variant", "sm", "registers", "stack", "shared", "blocks/SM", "products", "verdict")


def row(compiled: Compiled) -> tuple[str, ...]:
    variant = compiled.variant
    faults = broken(compiled)
    return (
        variant.name,
        str(compiled.architecture),
        str(compiled.registers),
        str(compiled.stack),
        f"{compiled.shared / 1024:.1f} KiB",
        str(compiled.blocks_per_sm),
        ", ".join(compiled.products) or "-",
        "; ".join(faults) if faults else "ok" if variant.hot else "ok (not hot)",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shoal.kernels.compile_proof")
    parser.add_argument("kernels", nargs="*", help="files of kernels/gpu; all that list variants")
    parser.add_argument("--sm", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--out", type=Path, help="also writes the table to this file")
    given = parser.parse_args(arguments)
    variants = [variant for name in given.kernels or gpu_modules() for variant in variants_of(name)]
    if not given.kernels:
        variants += tuned_variants(tables(), tunables())
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    print("\n".join(lines))
    failures = 0
    for compiled in build_all(variants, given.sm):
        lines.append("| " + " | ".join(row(compiled)) + " |")
        print(lines[-1], flush=True)
        failures += bool(broken(compiled))
    if given.out is not None:
        given.out.write_text(document(lines))
    if failures:
        print(f"{failures} compilations break what their variants promise", file=sys.stderr)
    return 1 if failures else 0


def document(table: Sequence[str]) -> str:
    return "\n".join(
        (
            "# What the GPU kernels compile to",
            "",
            f"`python -m shoal.kernels.compile_proof`, Triton {triton.__version__}, without a GPU.",
            "Registers are a thread's, shared memory is a block's; a stack holds spilled registers",
            "and must be empty in what runs in every step.",
            "",
            *table,
            "",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
