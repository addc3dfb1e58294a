"""The JSON schema of a chart's values, and their table, from the comments of its values.yaml.

Above every key stands a comment, which is its description; the types follow from the defaults.
Lines of the comment that begin with an @ say what cannot be seen there:

    @enum: a, b          one of these
    @type: integer, null one of these types
    @pattern: REGEX      of a string
    @minimum: N, @maximum: N
    @items: string       a list of these; object is any mapping, as Kubernetes has it
    @map: string         a mapping with keys of the user's own; any is any value

Every other mapping is closed: a key that the chart does not know is refused.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

Schema = dict[str, Any]

_NOTE = re.compile(r"@(\w+): (.+)")
_TYPES = {"str": "string", "bool": "boolean", "int": "integer", "float": "number"}
_ANY: dict[str, Schema] = {"any": {}, "object": {"type": "object"}}


class ValuesError(ValueError):
    """values.yaml does not say what a schema needs; the message names line and key."""


@dataclass(frozen=True, slots=True)
class Value:
    """One key of the values: its dotted path, description, notes and default."""

    path: tuple[str, ...]
    description: str
    notes: dict[str, str]
    default: Any
    children: "tuple[Value, ...]" = field(default=())

    @property
    def leaf(self) -> bool:
        """Whether users set it as a whole."""
        return not self.children


def read_values(text: str) -> tuple[Value, ...]:
    """The top-level values. Raises ValuesError where a key has no description or no type."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(node, yaml.MappingNode):
        return ()
    return tuple(_read(node, text.splitlines(), ()))


def values_schema(values: tuple[Value, ...], title: str) -> Schema:
    """The schema of the whole document."""
    # Helm adds `global` to the values of every chart.
    properties = {value.path[-1]: _schema(value) for value in values} | {
        "global": {"type": "object", "description": "Helm's own."}
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        **_closed(properties),
    }


def values_table(values: tuple[Value, ...]) -> str:
    """A Markdown table of every value that users set."""
    rows = [
        f"| `{'.'.join(v.path)}` | {_shown(v.default)} | {_sentence(v)} |" for v in _leaves(values)
    ]
    return "\n".join(("| value | default | meaning |", "|---|---|---|", *rows))


def _read(node: yaml.MappingNode, lines: list[str], path: tuple[str, ...]) -> Iterator[Value]:
    for key, value in node.value:
        below = (*path, key.value)
        description, notes = _comment(lines, key.start_mark.line)
        where = f"values.yaml line {key.start_mark.line + 1}, {'.'.join(below)}"
        if not description:
            raise ValuesError(f"{where}: no description; write a comment above the key")
        default = yaml.SafeLoader("").construct_document(value)
        children: tuple[Value, ...] = ()
        if isinstance(value, yaml.MappingNode) and "map" not in notes:
            children = tuple(_read(value, lines, below))
            if not children:
                raise ValuesError(f"{where}: say what the mapping holds, such as @map: string")
        if isinstance(value, yaml.SequenceNode) and "items" not in notes:
            raise ValuesError(f"{where}: say what the list holds, such as @items: string")
        yield Value(below, description, notes, default, children)


def _comment(lines: list[str], line: int) -> tuple[str, dict[str, str]]:
    """Description and notes of the key in that line: the comment right above it."""
    indent = len(lines[line]) - len(lines[line].lstrip())
    prefix = " " * indent + "#"
    first = line
    while first > 0 and lines[first - 1].startswith(prefix):
        first -= 1
    texts = [text.strip().removeprefix("#").strip() for text in lines[first:line]]
    found = [_NOTE.fullmatch(text) for text in texts]
    notes = {match[1]: match[2] for match in found if match}
    return " ".join(text for text, match in zip(texts, found, strict=True) if not match), notes


def _schema(value: Value) -> Schema:
    described: Schema = {"description": value.description}
    if value.children:
        return described | _closed({child.path[-1]: _schema(child) for child in value.children})
    if (kind := value.notes.get("map")) is not None:
        return described | {"type": "object", "additionalProperties": _typed(kind)}
    if (kind := value.notes.get("items")) is not None:
        return described | {"type": "array", "items": _typed(kind)}
    return described | {"type": _type(value)} | _limits(value.notes)


def _limits(notes: dict[str, str]) -> Schema:
    readers: dict[str, Callable[[str], Any]] = {
        "enum": lambda text: [choice.strip() for choice in text.split(",")],
        "pattern": str,
        "minimum": float,
        "maximum": float,
    }
    return {name: read(notes[name]) for name, read in readers.items() if name in notes}


def _type(value: Value) -> str | list[str]:
    if "type" in value.notes:
        types = [name.strip() for name in value.notes["type"].split(",")]
        return types[0] if len(types) == 1 else types
    found = _TYPES.get(type(value.default).__name__)
    if found is None:
        raise ValuesError(f"{'.'.join(value.path)}: say its type, such as @type: string, null")
    return found


def _typed(kind: str) -> Schema:
    return _ANY.get(kind, {"type": kind})


def _closed(properties: dict[str, Schema]) -> Schema:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _leaves(values: tuple[Value, ...]) -> Iterator[Value]:
    for value in values:
        if value.leaf:
            yield value
        else:
            yield from _leaves(value.children)


def _shown(default: Any) -> str:
    if default == "":
        return ""
    text = yaml.safe_dump(default, default_flow_style=True, width=10_000).strip()
    return f"`{text.removesuffix('...').strip()}`"


def _sentence(value: Value) -> str:
    choices = value.notes.get("enum")
    return value.description + (f" One of {choices}." if choices else "")
