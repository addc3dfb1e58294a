"""Paged attention's tiles as configurations: how tables of a device set them, what is measured.

A tile of few rows is looked up by its rows, the programs of one split (`rows` of the table's
shapes), the group of heads, the head's size and the cache's bits; a tile of many by the last
three.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import triton

from shoal.kernels.gpu.attention_kernel import attention_kernel
from shoal.kernels.gpu.attention_plan import Load, Plan, Tile
from shoal.kernels.gpu.configs import TUNED, Config, Shape, Tunable, choose
from shoal.kernels.gpu.variant import ARCHITECTURES, Variant

FEW, MANY = "paged_attention_few", "paged_attention_many"
# (KEYS, num_warps, num_stages) of few rows, after ROWS of many
_FEW_CONFIGS = (
    (32, 4, 3),
    (32, 4, 5),
    (64, 4, 3),
    (64, 4, 4),
    (64, 8, 3),
    (128, 4, 3),
    (128, 8, 3),
)
_MANY_CONFIGS = (
    *((64, 64, 4, 3), (64, 128, 4, 2), (128, 32, 8, 3), (128, 64, 8, 2)),
    *((128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (64, 64, 8, 3)),
)
_CACHE_TYPES = {16: torch.bfloat16, 8: torch.float8_e4m3fn}

# What measures: (load, head_dim, cache dtype, device) -> a function that attends as planned.
Prepare = Callable[[Load, int, torch.dtype, torch.device], Callable[[Plan], object]]


def tuned(plan: Plan, load: Load, head_dim: int, cache_bits: int, device: torch.device) -> Plan:
    """The plan with the tiles that the device's table holds for such a load."""
    few, many = plan.few, plan.many
    if few is not None:
        shape = _few_shape(load, few, head_dim, cache_bits)
        few = configured(few, choose(FEW, _config(few), device, TUNED, **shape))
    if many is not None:
        shape = _many_shape(load, head_dim, cache_bits)
        default = {"ROWS": many.rows, **_config(many)}
        many = configured(many, choose(MANY, default, device, TUNED, **shape))
    return replace(plan, few=few, many=many)


def configured(tile: Tile, config: Config) -> Tile:
    """The tile with a configuration's sizes; ROWS, where given, is filled with queries."""
    rows = config.get("ROWS", tile.rows)
    heads = min(tile.heads, rows)
    queries = tile.queries if rows == tile.rows else rows // heads
    return Tile(queries, heads, rows, config["KEYS"], config["num_warps"], config["num_stages"])


def _config(tile: Tile) -> dict[str, int]:
    return {"KEYS": tile.keys, "num_warps": tile.warps, "num_stages": tile.stages}


def _few_shape(load: Load, few: Tile, head_dim: int, cache_bits: int) -> dict[str, int]:
    programs = load.sequences * load.kv_heads
    return {"rows": programs, "tile": few.rows, **_many_shape(load, head_dim, cache_bits)}


def _many_shape(load: Load, head_dim: int, cache_bits: int) -> dict[str, int]:
    return {"group": load.group, "head_dim": head_dim, "cache_bits": cache_bits}


def attention_tunables(
    plan_of: Callable[[Load, int, int], Plan], prepare: Prepare
) -> tuple[Tunable, ...]:
    """Long decoding and prefill with groups of four heads.

    plan_of: (load, head_dim, cache bits) -> the plan without a table.
    """

    def decoding(shape: Shape) -> Load:
        kv_heads = 8
        sequences = max(1, shape["rows"] // kv_heads)
        return Load(kv_heads * shape["group"], kv_heads, sequences, 1, 65536 // sequences)

    def prefill(shape: Shape) -> Load:
        return Load(8 * shape["group"], 8, 1, 4096, 4096)

    def tunable(kernel: str, load_of: Callable[[Shape], Load]) -> Tunable:
        few = kernel == FEW

        def prepare_one(shape: Shape, device: torch.device) -> Callable[[Config], object]:
            load, head_dim, bits = load_of(shape), shape["head_dim"], shape["cache_bits"]
            plan = plan_of(load, head_dim, bits)
            launch = prepare(load, head_dim, _CACHE_TYPES[bits], device)
            tile = plan.few if few else plan.many
            assert tile is not None, f"{shape} is no shape of {kernel}"

            def attend(config: Config) -> object:
                changed = configured(tile, config)
                if few:
                    return launch(replace(plan, few=changed))
                return launch(replace(plan, many=changed))

            return attend

        def variant(shape: Shape, config: Config) -> Variant:
            load, head_dim, bits = load_of(shape), shape["head_dim"], shape["cache_bits"]
            plan = plan_of(load, head_dim, bits)
            tile = plan.few if few else plan.many
            assert tile is not None, f"{shape} is no shape of {kernel}"
            kind = "*bf16" if bits == 16 else "*fp8e4nv"
            label = "decode" if few else "prefill"
            return attention_variant(
                label,
                load,
                head_dim,
                configured(tile, config),
                few and plan.splits > 1,
                not few,
                kind,
            )

        shapes = tuple(
            {
                **({"rows": rows, "tile": 16} if few else {}),
                "group": 4,
                "head_dim": head_dim,
                "cache_bits": bits,
            }
            for head_dim in (64, 128)
            for bits in (16, 8)
            for rows in ((8, 64, 512) if few else (1,))
        )
        sizes = ("KEYS", "num_warps", "num_stages")
        names: tuple[str, ...] = sizes if few else ("ROWS", *sizes)
        configs: tuple[tuple[int, ...], ...] = _FEW_CONFIGS if few else _MANY_CONFIGS
        return Tunable(
            kernel=kernel,
            shapes=shapes,
            configs=tuple(dict(zip(names, config, strict=True)) for config in configs),
            prepare=prepare_one,
            variant=variant,
        )

    return tunable(FEW, decoding), tunable(MANY, prefill)


def attention_variant(
    name: str,
    load: Load,
    head_dim: int,
    tile: Tile,
    split: bool,
    searched: bool,
    cache: str = "*bf16",
    *,
    window: bool = False,
    softcap: bool = False,
    architectures: tuple[int, ...] = ARCHITECTURES,
) -> Variant:
    """split: keys over programs; searched: tiles find their sequence; cache: Triton's type."""
    strides = ("query_stride", "query_head_stride", "block_stride", "head_stride")
    counts = ("sequences", "splits", "least", "table_stride")
    optional = {
        "skip": searched,
        "window": window,
        "softcap": softcap,
        **dict.fromkeys(("key_scales", "value_scales"), cache != "*bf16"),
        **dict.fromkeys(("parts", "sums"), split),
    }
    kinds = {
        **dict.fromkeys(("queries", "out"), "*bf16"),
        **dict.fromkeys(("keys", "values"), cache),
        **dict.fromkeys(("key_scales", "value_scales", "parts", "sums"), "*fp32"),
        **dict.fromkeys(("starts", "lengths", "tables"), "*i32"),
        **dict.fromkeys((*counts, "skip", "window", *strides), "i32"),
        **dict.fromkeys(("scale", "softcap"), "fp32"),
    }
    return Variant(
        name=f"paged_attention {name} d{head_dim}",
        kernel=attention_kernel,
        signature={arg: kind for arg, kind in kinds.items() if optional.get(arg, True)},
        constants={
            **{arg: None for arg, there in optional.items() if not there},
            "KV_HEADS": load.kv_heads,
            "GROUP": load.group,
            "BLOCK_SIZE": 16,
            "HEAD_DIM": head_dim,
            "DIMS": triton.next_power_of_2(head_dim),
            "QUERIES": tile.queries,
            "HEADS": tile.heads,
            "ROWS": tile.rows,
            "KEYS": tile.keys,
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
        aligned=("queries", "keys", "values", "out", *strides),
        tensor_cores=True,
        wgmma=tile.rows >= 64,
        architectures=architectures,
    )
