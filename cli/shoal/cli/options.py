"""Options and arguments that several commands share."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from shoal.operator.local.store import Store

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Duration(click.ParamType[float]):
    """Seconds, also written as 90s, 5m or 1h."""

    name = "duration"
    _PATTERN = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<unit>s|m|h)?")

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, int | float):
            return float(value)
        match = self._PATTERN.fullmatch(value.strip())
        if match is None:
            self.fail(f"{value!r} is no duration; write 90, 90s, 5m or 1h", param, ctx)
        return float(match["number"]) * {"s": 1, "m": 60, "h": 3600}[match["unit"] or "s"]


def file_option(*, required: bool = True) -> Decorator:
    """`-f/--filename`, repeatable; `-` is standard input, a folder means its YAML files."""
    return click.option(
        "-f",
        "--filename",
        "filenames",
        multiple=True,
        required=required,
        type=click.Path(),
        help="YAML file of one or more services, a folder of them, or - for standard input. "
        "May be given several times.",
    )


def store_option() -> Decorator:
    """`--state-dir`; the command gets a `store` on it."""
    return click.option(
        "--state-dir",
        "store",
        type=click.Path(file_okay=False, path_type=Path),
        callback=_open_store,
        help="Where services, status and logs are kept. "
        "Default: $SHOAL_STATE_DIR, else ~/.local/state/shoal.",
    )


def _open_store(ctx: click.Context, param: click.Parameter, value: Path | None) -> "Store | None":
    if ctx.resilient_parsing:
        return None
    from shoal.operator.local.store import Store, default_root

    return Store((value or default_root()).expanduser().absolute())


def timeout_option(default: str) -> Decorator:
    """`--timeout`, a duration."""
    return click.option(
        "--timeout",
        type=Duration(),
        default=default,
        show_default=True,
        help="Give up after this time, such as 90s or 5m.",
    )
