"""YAML text to JSON values, refusing what has no single meaning in JSON.

Repeated keys, dates, NaN and keys that are no strings are accepted by YAML and by nobody who
reads the result; here they are problems with a place and a way out.
"""

import math
from collections.abc import Hashable, Iterator
from datetime import date
from typing import Any

import yaml

MAX_NODES = 100_000  # of one text, aliases expanded
MAX_DEPTH = 64


class InvalidYaml(ValueError):
    """The text is no YAML, or its values no JSON. The message says where and what to do."""


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise InvalidYaml(
                        f"line {key.start_mark.line + 1}: {key.value} is given twice; "
                        "take one of them out"
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_documents(text: str) -> list[object]:
    """The documents of a YAML text as JSON values; empty documents are left out.

    InvalidYaml where the text is no YAML or a value has no place in JSON.
    """
    try:
        documents = [doc for doc in yaml.load_all(text, Loader=_Loader) if doc is not None]
    except yaml.MarkedYAMLError as error:
        raise InvalidYaml(_syntax_message(error)) from None
    except yaml.YAMLError as error:
        raise InvalidYaml(f"this is not YAML: {error}") from None
    except RecursionError:
        raise InvalidYaml(f"values are nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:  # such as 2024-13-45, which looks like a date
        if isinstance(error, InvalidYaml):
            raise
        raise InvalidYaml(f"a value cannot be read: {error}; put it in quotes") from None
    for document in documents:
        check_json(document)
    return documents


def check_json(value: object) -> None:
    """InvalidYaml where `value` is more than strings, finite numbers, booleans, nulls, lists and
    mappings with string keys, or too large or deep for a manifest."""
    for count, problem in enumerate(_problems(value, "", 0)):
        if problem is not None:
            raise InvalidYaml(problem)
        if count >= MAX_NODES:
            raise InvalidYaml(f"more than {MAX_NODES} values, with aliases expanded")


def _problems(value: object, path: str, depth: int) -> Iterator[str | None]:
    """One entry for each value in depth-first order: what is wrong with it, or None."""
    where = path or "the document"
    if depth > MAX_DEPTH:
        yield f"values are nested more than {MAX_DEPTH} deep, at {path[:40]}..."
    elif isinstance(value, dict):
        yield None
        for key, item in value.items():
            if isinstance(key, str):
                yield from _problems(item, f"{path}.{key}".lstrip("."), depth + 1)
            else:
                yield f"{where}: the key {key!r} is not a string; put it in quotes"
    elif isinstance(value, list | tuple):
        yield None
        for index, item in enumerate(value):
            yield from _problems(item, f"{path}[{index}]", depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where}: {value} is not a finite number"
    elif isinstance(value, date):
        yield f"{where}: {value} is read as a date; put it in quotes"
    elif value is None or isinstance(value, str | bool | int | float):
        yield None
    else:
        yield f"{where}: a {type(value).__name__} has no place in a manifest"


def _syntax_message(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    reason = ", ".join(filter(None, (error.context, error.problem)))
    hint = "; indent with spaces, not tabs" if "'\\t'" in (error.problem or "") else ""
    return f"{place}this is not YAML: {reason}{hint}"
