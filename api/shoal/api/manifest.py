"""Manifests in, InferenceServices out, or one line for each problem.

Types are strict, as they are at the Kubernetes API server: "8" is no number and 0.1 no string.
The rules between fields are looked at once every field is right alone.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from shoal.api import names
from shoal.api.base import MODEL_ID_PATTERN, PATH_PATTERN, QUANTITY_PATTERN
from shoal.api.rules import violations
from shoal.api.service import InferenceService
from shoal.api.yamltext import InvalidYaml, check_json, load_documents

_SHOWN_LENGTH = 60


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong at one dotted path; the path is empty where it is the whole document."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class InvalidManifest(ValueError):
    """A manifest is wrong. The message has a line for each problem: path, value, way out."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


def parse_manifest(text: str) -> list[InferenceService]:
    """The services of a YAML (or JSON) text, in its order.

    InvalidManifest names every problem of every document.
    """
    try:
        documents = load_documents(text)
    except InvalidYaml as error:
        raise InvalidManifest([Problem("", str(error))]) from None
    if not documents:
        raise InvalidManifest(
            [Problem("", f"there is no document in it; write at least one {names.KIND}")]
        )
    services: list[InferenceService] = []
    problems: list[Problem] = []
    seen: set[tuple[str, str]] = set()
    for number, document in enumerate(documents, 1):
        prefix = f"document {number}: " if len(documents) > 1 else ""
        try:
            service = parse_document(document)
        except InvalidManifest as error:
            problems += [
                Problem(prefix + p.path, p.message) if p.path else Problem("", prefix + p.message)
                for p in error.problems
            ]
            continue
        key = (service.metadata.namespace, service.name)
        if key in seen:
            problems.append(
                Problem(
                    f"{prefix}metadata.name",
                    f"an earlier document has the name {service.name} too; give it another",
                )
            )
        seen.add(key)
        services.append(service)
    if problems:
        raise InvalidManifest(problems)
    return services


def parse_document(doc: object) -> InferenceService:
    """The service that one document (JSON values) describes.

    InvalidManifest names every problem.
    """
    wrong_kind = _kind_problems(doc)
    if wrong_kind:
        raise InvalidManifest(wrong_kind)
    try:
        check_json(doc)
        text = json.dumps(_without_nulls(doc, InferenceService), allow_nan=False)
    except InvalidYaml as error:
        raise InvalidManifest([Problem("", str(error))]) from None
    try:
        service = InferenceService.model_validate_json(
            text, strict=True, by_alias=True, by_name=False
        )
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=True)
        told = [detail for detail in details if not _is_consequence(detail, details)]
        raise InvalidManifest(list(dict.fromkeys(map(_explain, told)))) from None
    broken = [Problem(found.path, found.message) for found in violations(service)]
    if broken:
        raise InvalidManifest(broken)
    return service


def to_document(service: InferenceService) -> dict[str, Any]:
    """The service as JSON values in camelCase, defaults spelled out, nulls left out.

    `parse_document` turns it back into an equal service.
    """
    document: dict[str, Any] = _without_nulls(
        service.model_dump(mode="json", by_alias=True), InferenceService
    )
    return document


def _kind_problems(doc: object) -> list[Problem]:
    if not isinstance(doc, dict):
        return [
            Problem(
                "",
                f"a manifest is a mapping with apiVersion, kind, metadata and spec, "
                f"but {_typed(doc)}",
            )
        ]
    wanted = {"apiVersion": names.API_VERSION, "kind": names.KIND}
    return [
        Problem(key, f"is missing; write {key}: {value}") if doc.get(key) is None
        else Problem(key, f"{_shown(doc[key])} is not served here; write {key}: {value}")
        for key, value in wanted.items()
        if doc.get(key) != value
    ]  # fmt: skip


def _is_consequence(detail: ErrorDetails, details: Sequence[ErrorDetails]) -> bool:
    """Whether a list is called too short only because its elements are wrong."""
    loc, least = detail["loc"], detail.get("ctx", {}).get("min_length", 0)
    below = any(other["loc"][: len(loc)] == loc and other["loc"] != loc for other in details)
    return detail["type"] == "too_short" and below and len(detail["input"]) >= least


def _explain(detail: ErrorDetails) -> Problem:
    path = _dotted(detail["loc"])
    value, context = detail["input"], detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            return Problem(path, f"unknown field; {_nearest_field(detail['loc'])}")
        case "missing":
            return Problem(path, f"is required{_described(detail['loc'])}")
        case "greater_than_equal":
            return Problem(path, f"{_shown(value)} is too small; at least {context['ge']}")
        case "less_than_equal":
            return Problem(path, f"{_shown(value)} is too large; at most {context['le']}")
        case "greater_than":
            return Problem(path, f"{_shown(value)} is too small; more than {context['gt']:g}")
        case "enum" | "literal_error":
            return Problem(path, _not_one_of(value, context["expected"]))
        case "string_pattern_mismatch":
            form = _FORMS.get(context["pattern"], f"of the form {context['pattern']}")
            return Problem(path, f"{_shown(value)} is not {form}")
        case "string_too_long":
            limit = context["max_length"]
            return Problem(path, f"{len(value)} characters are too many; at most {limit}")
        case "string_too_short":
            return Problem(path, f"{_shown(value)} is too short; at least {context['min_length']}")
        case "too_short":
            return Problem(path, f"{len(value)} entries are too few; at least "
                                 f"{context['min_length']}")  # fmt: skip
        case "too_long":
            return Problem(path, f"{len(value)} entries are too many; at most "
                                 f"{context['max_length']}")  # fmt: skip
        case "duplicate":
            return Problem(path, detail["msg"])
    expected = _EXPECTED.get(detail["type"])
    if expected is None:
        return Problem(path, f"{_shown(value)} is refused: {detail['msg']}")
    return Problem(path, f"{_typed(value)}, but must be {expected}{_quote_hint(value, expected)}")


_FORMS = {
    QUANTITY_PATTERN: "a quantity; write a number and a unit, as in 500m, 8 or 64Gi",
    MODEL_ID_PATTERN: "a model id; use letters, digits and . _ : / -, a letter or digit first",
    PATH_PATTERN: "an absolute path; begin with /",
}

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of at most 64 bits",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "list_type": "a list",
    "datetime_type": "a time such as 2025-01-31T12:00:00Z",
    "datetime_from_date_parsing": "a time such as 2025-01-31T12:00:00Z",
    "datetime_parsing": "a time such as 2025-01-31T12:00:00Z",
    "timezone_aware": "a time with its zone, such as 2025-01-31T12:00:00Z",
}


def _quote_hint(value: object, expected: str) -> str:
    if expected == "a string" and isinstance(value, bool | int | float):
        return "; put it in quotes"
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "yes", "no"):
        return "; leave the quotes out" if expected == "true or false" else ""
    if isinstance(value, str) and "number" in expected and value.strip().isdigit():
        return "; leave the quotes out"
    return ""


def _not_one_of(value: object, expected: str) -> str:
    choices = [part.strip().strip("'") for part in expected.replace(" or ", ", ").split(",")]
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{_shown(value)} is not one of {', '.join(choices)}{hint}"


def _without_nulls(value: Any, model: type[BaseModel] | None) -> Any:
    """The value with fields left out that are null: null stands for the default, as it does at
    the API server. Unknown keys stay, so that they are refused rather than dropped."""
    if isinstance(value, list):
        return [_without_nulls(item, model) for item in value]
    if not isinstance(value, dict) or model is None:
        return value
    below = _below(model)
    return {
        key: _without_nulls(item, below.get(key))
        for key, item in value.items()
        if item is not None or key not in below
    }


@cache
def _below(model: type[BaseModel]) -> Mapping[str, type[BaseModel] | None]:
    """The keys of a type in documents, each with the type of what stands there, if it is ours."""
    return {
        field.alias or name: next(_models_in(field.annotation), None)
        for name, field in model.model_fields.items()
    }


def _nearest_field(loc: tuple[int | str, ...]) -> str:
    model = _model_at(loc[:-1])
    known = [field.alias or name for name, field in model.model_fields.items()] if model else []
    folded = {name.casefold(): name for name in known}
    key = str(loc[-1]).replace("_", "").replace("-", "").casefold()
    near = difflib.get_close_matches(key, folded, n=1, cutoff=0.6) or [
        name for name in folded if len(key) > 2 and name.startswith(key)
    ]
    if near:
        return f"did you mean {folded[near[0]]}?"
    return f"known here: {', '.join(known)}"


def _described(loc: tuple[int | str, ...]) -> str:
    model = _model_at(loc[:-1])
    fields = model.model_fields.items() if model else ()
    text = next((f.description for name, f in fields if (f.alias or name) == loc[-1]), None)
    return f": {text[0].lower()}{text[1:].rstrip('.')}" if text else ""


def _model_at(loc: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The API type whose fields stand below `loc` in a document."""
    models: list[type[BaseModel]] = [InferenceService]
    for step in loc:
        if isinstance(step, int):
            continue
        models = [
            below
            for model in models
            for name, field in model.model_fields.items()
            if (field.alias or name) == step
            for below in _models_in(field.annotation)
        ]
    return models[0] if models else None


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, tuple):
        for argument in get_args(annotation):
            yield from _models_in(argument)


def _dotted(loc: tuple[int | str, ...]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc).lstrip(".")


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN_LENGTH else text[:_SHOWN_LENGTH] + "..."


def _typed(value: object) -> str:
    """The value with the name of its type, as the beginning of a sentence."""
    match value:
        case None:
            return "nothing is given"
        case bool():
            return f"{_shown(value)} is a boolean"
        case int() | float():
            return f"{_shown(value)} is a number"
        case str():
            return f"{_shown(value)} is a string"
        case list() | tuple():
            return "this is a list"
    return "this is a mapping"
