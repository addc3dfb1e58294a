"""Tables of tuned configurations: looked up, written, read again, measured and compiled."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("torch has no Triton on this platform", allow_module_level=True)

from triton.runtime.errors import OutOfResources

from shoal.kernels.compile_proof import tuned_variants
from shoal.kernels.gpu import configs
from shoal.kernels.gpu.configs import Config, Entry, Shape, Table, Tunable
from shoal.kernels.gpu.variant import Variant
from shoal.kernels.measure import HostClock, Launch, Times
from shoal.kernels.tune import chosen, merged, tune

CPU = torch.device("cpu")


def entry(rows: int, columns: int, tile: int) -> Entry:
    return Entry({"rows": rows, "columns": columns}, {"TILE": tile, "num_warps": 4}, 1.0)


def table(*entries: Entry, device: str = "NVIDIA X1 80GB", capability: int = 90) -> Table:
    return Table(device, capability, "driver 1", {"product": entries})


@pytest.mark.parametrize(
    ("rows", "columns", "tile"),
    [(1, 64, 16), (2, 64, 32), (16, 64, 32), (17, 64, 32), (1, 32, 8), (1, 48, None)],
)
def test_rows_are_rounded_up_to_what_was_measured(
    rows: int, columns: int, tile: int | None
) -> None:
    """The next measured number of rows, the largest beyond it; other sizes must be the same."""
    tuned = table(entry(1, 64, 16), entry(16, 64, 32), entry(1, 32, 8))
    found = tuned.find("product", {"rows": rows, "columns": columns})
    assert (None if found is None else found.config["TILE"]) == tile
    assert tuned.find("other", {"rows": rows, "columns": columns}) is None


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    """One file a device, named after it."""
    tuned = table(entry(1, 64, 16), entry(16, 64, 32))
    path = configs.write(tuned, tmp_path)
    assert path.name == "nvidia_x1_80gb.json"
    assert configs.read(path) == tuned
    assert configs.tables(tmp_path) == (tuned,)
    assert configs.load(tuned.device, tmp_path) == tuned
    assert configs.load("another device", tmp_path) is None


def test_a_file_that_is_no_table_is_named(tmp_path: Path) -> None:
    """With the command that writes a right one."""
    path = tmp_path / "x.json"
    path.write_text('{"device": "x"}')
    with pytest.raises(ValueError, match=r"x.json is no table .*capability.*shoal.kernels.tune"):
        configs.read(path)


def test_without_a_table_the_default_holds() -> None:
    """On the interpreter's CPU there is nothing to look up; the caller's mapping stays his own."""
    default = {"TILE": 64}
    found = configs.choose("product", default, CPU, rows=1, columns=64)
    found["TILE"] = 1
    assert default == {"TILE": 64}


@dataclass(frozen=True)
class ToldClock:
    """A clock whose launches take as long as they say."""

    device: torch.device = CPU

    def measure(self, launch: Launch, seconds: float = 0.05) -> Times:
        said = launch()
        assert isinstance(said, float)
        return Times.of([said])


def product(times: Mapping[int, float | None]) -> Tunable:
    """A kernel whose tiles take the given seconds; None: more than the device has."""

    def prepare(shape: Shape, device: torch.device) -> Callable[[Config], object]:
        def launch(config: Config) -> float:
            seconds = times[config["TILE"]]
            if seconds is None:
                raise OutOfResources(2, 1, "shared memory")
            return seconds * shape["rows"]

        return launch

    return Tunable(
        kernel="product",
        shapes=({"rows": 1, "columns": 64}, {"rows": 16, "columns": 64}),
        configs=tuple({"TILE": tile} for tile in times),
        prepare=prepare,
        variant=lambda shape, config: Variant(f"product t{config['TILE']}", None, {}, dict(config)),
    )


def test_the_fastest_configuration_that_fits_is_kept() -> None:
    """One that the device has no room for is passed over; each choice is said in a line."""
    said: list[str] = []
    entries = tune(product({16: 3e-6, 32: 1e-6, 64: None}), ToldClock(), 0.0, said.append)
    assert [(e.shape["rows"], e.config["TILE"]) for e in entries] == [(1, 32), (16, 32)]
    assert entries[0].microseconds == pytest.approx(1.0)
    assert said[0].startswith("product rows=1 columns=64: not TILE=64: out of resource")
    assert said[1] == (
        "product rows=1 columns=64: 1.0 us with TILE=32, 3.0 x faster than the slowest of 2"
    )


def test_a_kernel_that_fits_no_device_is_an_error() -> None:
    """A table without an entry would hide it."""
    with pytest.raises(RuntimeError, match="no configuration of product runs"):
        tune(product({64: None}), ToldClock(), 0.0, lambda line: None)


def test_tuning_one_kernel_keeps_the_entries_of_others() -> None:
    """The table of a device grows kernel by kernel."""
    old = Table("x", 90, "old", {"product": (entry(1, 64, 16),), "norm": ()})
    new = Table("x", 90, "new", {"product": (entry(1, 64, 32),)})
    both = merged(old, new)
    assert both.software == "new"
    assert both.kernels == {"product": new.kernels["product"], "norm": ()}
    assert merged(None, new) == new


def test_a_kernel_that_cannot_be_tuned_is_named() -> None:
    """Beside those that can."""
    known = [product({16: 1.0})]
    assert chosen((), known) == chosen(("product",), known) == known
    with pytest.raises(ValueError, match=r"named \['poem'\]: there are \['product'\]"):
        chosen(("poem",), known)


@pytest.mark.parametrize(("capability", "architecture"), [(75, 80), (89, 80), (90, 90), (120, 100)])
def test_what_a_table_chose_is_compiled_for_its_device(capability: int, architecture: int) -> None:
    """A tuned entry is one more variant of the proof, on the architecture it was measured on."""
    tuned = table(entry(1, 64, 16), capability=capability)
    (variant,) = tuned_variants([tuned], [product({16: 1.0})])
    assert variant.name == "product t16 rows=1 columns=64, tuned on NVIDIA X1 80GB"
    assert variant.architectures == (architecture,)
    with pytest.raises(ValueError, match="tunes product, which is no kernel"):
        list(tuned_variants([tuned], []))


def test_the_host_clock_times_one_launch() -> None:
    """The stand-in of a device measures what it was given, once."""
    launches: list[int] = []
    times = HostClock().measure(lambda: launches.append(1))
    assert launches == [1]
    assert times.count == 1
    assert times.least == times.median == times.most >= 0
