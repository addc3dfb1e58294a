"""Every GPU kernel compiles for every architecture, without a GPU, and keeps its promises."""

import ast
import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("torch has no Triton on this platform", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel has no machine code", allow_module_level=True)

import triton
import triton.language as tl

import shoal.kernels.gpu
from shoal.kernels.compile_proof import (
    ARCHITECTURES,
    Compiled,
    broken,
    build,
    gpu_modules,
    row,
    tunables,
    tuned_variants,
    variants_of,
)
from shoal.kernels.gpu.configs import Entry, Table, tables
from shoal.kernels.gpu.variant import Variant

(HOME,) = map(Path, shoal.kernels.gpu.__path__)
TABLE = Path(__file__).parents[2] / "bench" / "results" / "gpu_compile.md"


def files_that_say(words: str) -> list[str]:
    return sorted(file.stem for file in HOME.glob("*.py") if words in file.read_text())


def launched(module: str) -> set[str]:
    """Names of the kernels that the file launches: `kernel[grid](...)`."""
    source = importlib.import_module(f"shoal.kernels.gpu.{module}")
    named = {
        node.func.value.id
        for node in ast.walk(ast.parse((HOME / f"{module}.py").read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
    }
    found = (getattr(source, name, None) for name in named)
    return {kernel.__name__ for kernel in found if isinstance(kernel, triton.JITFunction)}


@pytest.mark.parametrize("module", files_that_say("def variants("))
def test_every_variant_compiles_for_every_architecture_and_keeps_its_promises(module: str) -> None:
    """No spill in a hot kernel, matrix instructions where promised, shared memory in bounds."""
    faults = {
        (variant.name, architecture): found
        for variant in variants_of(module)
        for architecture in variant.architectures
        if (found := broken(build(variant, architecture)))
    }
    assert not faults


def test_every_kernel_that_is_launched_has_a_variant() -> None:
    """A kernel that nobody lists would be compiled first on a user's device."""
    kernels = set().union(*map(launched, files_that_say("import triton")))
    listed = {each.kernel.__name__ for name in gpu_modules() for each in variants_of(name)}
    assert kernels
    assert kernels <= listed


def test_the_committed_table_shows_every_variant() -> None:
    """`python -m shoal.kernels.compile_proof` was run again since a variant came or went."""
    cells = [line.split("|")[1:3] for line in TABLE.read_text().splitlines() if "|" in line]
    shown = {(name.strip(), architecture.strip()) for name, architecture in cells[2:]}
    assert shown == {
        (variant.name, str(architecture))
        for name in gpu_modules()
        for variant in variants_of(name)
        for architecture in variant.architectures
    }


def test_what_may_be_tuned_compiles() -> None:
    """The first and the last candidate of each kernel, and all that tables of devices hold."""
    known = tunables()
    made = Table(
        device="none",
        capability=90,
        software="",
        kernels={
            each.kernel: tuple(Entry(each.shapes[0], each.configs[i], 0.0) for i in (0, -1))
            for each in known
        },
    )
    variants = list(tuned_variants([made, *tables()], known))
    assert len(variants) >= 2 * len(known)
    for variant in variants:
        assert build(variant, *variant.architectures).registers > 0


@triton.jit
def product_kernel(a, b, c, length, rows: tl.constexpr, tile: tl.constexpr):
    """One tile of a [rows, length] times b [length, 64], in float32."""
    row = tl.arange(0, rows)[:, None]
    column = tl.arange(0, 64)[None, :]
    step = tl.arange(0, tile)
    total = tl.zeros((rows, 64), tl.float32)
    for start in range(0, length, tile):
        left = tl.load(a + row * length + (start + step)[None, :])
        right = tl.load(b + (start + step)[:, None] * 64 + column)
        total = tl.dot(left, right, total)
    tl.store(c + row * 64 + column, total)


PRODUCT = Variant(
    name="product",
    kernel=product_kernel,
    signature={
        "a": "*fp16",
        "b": "*fp16",
        "c": "*fp32",
        "length": "i32",
    },
    constants={"rows": 64, "tile": 32},
    aligned=("a", "b", "c", "length"),
    tensor_cores=True,
    wgmma=True,
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_product_of_64_rows_uses_the_best_instruction_there_is(architecture: int) -> None:
    """mma on sm_80, wgmma on sm_90, tcgen05 on sm_100, with registers read from the code."""
    compiled = build(PRODUCT, architecture)
    best = {80: "mma", 90: "wgmma", 100: "tcgen05"}[architecture]
    assert best in compiled.products
    assert 0 < compiled.registers <= 255
    assert compiled.shared > 0
    assert not broken(compiled)


def test_a_product_of_16_rows_is_no_wgmma() -> None:
    """The proof tells mma from wgmma: a small tile that promises wgmma is refused."""
    small = replace(PRODUCT, constants={"rows": 16, "tile": 32})
    assert broken(build(small, 90)) == ("has mma, not wgmma",)


def test_each_broken_promise_is_named() -> None:
    """Spills, missing tensor cores and too much shared memory are told apart."""
    compiled = Compiled(PRODUCT, 80, 255, 16, 1 << 20, (), 4)
    assert broken(compiled) == (
        "spills 16 bytes a thread",
        "has no matrix instruction",
        "takes 1048576 bytes of shared memory, a block has 166912",
    )
    assert "spills 16 bytes" in row(compiled)[-1]
    cold = replace(PRODUCT, hot=False, tensor_cores=False)
    assert broken(replace(compiled, variant=cold, shared=0)) == ()


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"signature": {"a": "*fp16"}}, r"constants lack \['b', 'c', 'length'\]"),
        ({"constants": {"rows": 64}}, r"lack \['tile'\]"),
        ({"constants": {"rows": 64, "tile": 32, "a": 1}}, r"\['a'\] are constants and typed"),
        ({"aligned": ("z",)}, "aligned names z, which is no argument"),
    ],
)
def test_a_variant_that_does_not_fit_its_kernel_is_named(
    changed: dict[str, object], sentence: str
) -> None:
    """A kernel's new argument that its variants forgot is one clear sentence."""
    with pytest.raises(ValueError, match=sentence):
        build(replace(PRODUCT, **changed), 90)


def test_blocks_that_fit_a_multiprocessor_follow_from_what_a_block_uses() -> None:
    """128 threads of 128 registers: four blocks; 100 KiB of shared memory: two."""
    compiled = Compiled(PRODUCT, 90, 128, 0, 0, ("wgmma",), 4)
    assert compiled.blocks_per_sm == 4
    assert replace(compiled, shared=100 << 10).blocks_per_sm == 2
