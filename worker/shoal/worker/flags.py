"""Command-line flags for every field of EngineConfig, from the dataclass itself."""

import argparse
import types
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from shoal.worker.config import EngineConfig
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
