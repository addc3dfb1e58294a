"""How results are printed: tables as kubectl's, or JSON, YAML and names for programs."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from shoal.api.names import GROUP

RESOURCE = f"inferenceservice.{GROUP}"


def output_option(*choices: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`-o/--output`, limited to the formats that the command has."""
    return click.option(
        "-o", "--output", type=click.Choice(choices), help="Print in this format instead."
    )


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, three spaces apart, headers in capitals, no trailing blanks."""
    table = [[header.upper() for header in headers], *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(headers))]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def format_data(data: object, output: str) -> str:
    """`data` (plain dicts and lists) as indented JSON or as YAML."""
    if output == "json":
        return json.dumps(data, indent=2, ensure_ascii=False)
    import yaml

    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return text.rstrip("\n")


def as_list(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several objects as Kubernetes prints them: one List."""
    return {"apiVersion": "v1", "kind": "List", "items": list(items)}


def format_age(seconds: float) -> str:
    """A duration as in kubectl: 5s, 3m20s, 45m, 7h, 2d."""
    whole = max(0, int(seconds))
    if whole < 120:
        return f"{whole}s"
    minutes = whole // 60
    if minutes < 10:
        return f"{minutes}m{whole % 60}s" if whole % 60 else f"{minutes}m"
    if minutes < 180:
        return f"{minutes}m"
    hours = minutes // 60
    return f"{hours}h" if hours < 48 else f"{hours // 24}d"
