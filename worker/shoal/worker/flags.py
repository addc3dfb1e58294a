"""Command-line flags for every field of EngineConfig and ParallelConfig, from the dataclasses."""

import argparse
import types
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from shoal.worker.config import EXECUTORS, EngineConfig, ParallelConfig
from shoal.worker.validate import LEAST


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """`max_num_seqs: int` becomes `--max-num-seqs N`, a bool `--name` and `--no-name`."""
    group = parser.add_argument_group("engine")
    hints = get_type_hints(EngineConfig)
    for field in fields(EngineConfig):
        flag = "--" + field.name.replace("_", "-")
        default = "chosen by the engine" if field.default is None else field.default
        kind = _plain(hints[field.name])
        if kind is bool:
            group.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=field.default,
                help=f"default: {'on' if field.default else 'off'}",
            )
        else:
            group.add_argument(
                flag,
                type=_at_least(LEAST[field.name]) if field.name in LEAST else kind,
                default=field.default,
                metavar={int: "N", float: "X"}.get(kind, "NAME"),
                help=f"default: {default}",
            )


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The settings that the parsed flags say."""
    return EngineConfig(**{field.name: getattr(args, field.name) for field in fields(EngineConfig)})


def add_parallel_flags(parser: argparse.ArgumentParser) -> None:
    """`--tensor`, `--pipeline`, `--executor` and `--ray-address`."""
    add = parser.add_argument_group("parallelism").add_argument
    one = _at_least(1)
    add("--tensor", type=one, default=1, metavar="N", help="ranks of each layer; default: 1")
    add("--pipeline", type=one, default=1, metavar="N", help="stages of layers; default: 1")
    add(
        "--executor",
        choices=EXECUTORS,
        default="auto",
        help="where ranks run; default: auto, processes of this host where there are several",
    )
    add(
        "--ray-address",
        metavar="HOST:PORT",
        help="head of a Ray cluster, for --executor ray; default: a cluster of this host",
    )


def parallel_config(args: argparse.Namespace) -> ParallelConfig:
    """What the parsed flags say. Raises ValueError for those that contradict each other."""
    if args.ray_address and args.executor != "ray":
        raise ValueError(f"--ray-address needs --executor ray, not {args.executor}")
    return ParallelConfig(args.tensor, args.pipeline, args.executor, args.ray_address)


def _at_least(low: int) -> Callable[[str], int]:
    """Reads an integer that is not below `low`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
        return value

    return integer


def _plain(hint: Any) -> Any:
    """`int` of `int | None`."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (arg for arg in get_args(hint) if arg is not types.NoneType)
    return hint
