"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

Every message about a field names the field, its value and the limit.
"""

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from math import ceil, isfinite
from typing import Any

import orjson
from pydantic import ValidationError

from shoal.router.generation import GenerationError

Headers = list[tuple[bytes, bytes]]

_VALUE_LENGTH = 60  # characters of a value that a message repeats
_MAX_PROBLEMS = 1000  # beyond, listing them would itself take long
_JSON_TYPES: dict[type, str] = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    list: "an array",
    dict: "an object",
    type(None): "null",
}
_EXPECTED = {
    "string_type": "a string",
    "bool_type": "a boolean",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "typed_dict_type": "an object",
}
_LIMITS = {  # pydantic's type -> (key of the limit, words, OpenAI's code)
    "greater_than": ("gt", "must be greater than", "below_min_value"),
    "greater_than_equal": ("ge", "must be at least", "below_min_value"),
    "less_than": ("lt", "must be less than", "above_max_value"),
    "less_than_equal": ("le", "must be at most", "above_max_value"),
}
# Values that OpenAI knows and Shoal does not serve yet.
_LATER = ("tool", "function", "image_url", "input_audio", "file", "refusal")


class ApiError(Exception):
    """A refusal that becomes the response, or an event in a running stream."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self.extra_headers = tuple(headers)

    def body(self) -> bytes:
        """The JSON document."""
        return orjson.dumps(
            {
                "error": {
                    "message": self.message,
                    "type": _type_of(self.status),
                    "param": self.param,
                    "code": self.code,
                }
            }
        )

    def headers(self) -> Headers:
        """Headers that belong to this error alone."""
        headers = list(self.extra_headers)
        if self.retry_after is not None:
            headers.append((b"retry-after", b"%d" % max(1, ceil(self.retry_after))))
        return headers


def _type_of(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def from_generation(error: GenerationError) -> ApiError:
    """What the core says, as a response."""
    return ApiError(
        error.status,
        error.message,
        param=error.field and error.field.removeprefix("sampling."),
        code=error.code,
        retry_after=error.retry_after,
    )


def from_validation(error: ValidationError, known: Iterable[str]) -> ApiError:
    """The first problem of a body, a feature that is not there yet before others.

    `known`: the fields of the body, to name the one that was meant.
    """
    if error.error_count() > _MAX_PROBLEMS:
        return ApiError(400, f"the body has {error.error_count()} unknown or wrong fields")
    problems = error.errors(include_url=False)
    problem: Any = next((p for p in problems if p["type"] == "not_supported"), problems[0])
    kind, value, limits = problem["type"], problem["input"], problem.get("ctx", {})
    path = _path(problem["loc"])
    if kind == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {limits['error']}", code="invalid_json")
    if not path:
        return ApiError(
            400, f"the body must be a JSON object, not {_type_name(value)}", code="invalid_type"
        )
    message, code = _explain(kind, path, value, limits, problem["msg"])
    if kind == "extra_forbidden":
        near = get_close_matches(path, known, n=1) if len(problem["loc"]) == 1 else []
        message += f"; did you mean {near[0]}?" if near else ""
    return ApiError(400, message, param=path, code=code)


def _explain(
    kind: str, path: str, value: object, limits: Mapping[str, Any], fallback: str
) -> tuple[str, str]:
    """Message and code of one problem."""
    shown = show(value)
    if kind == "missing":
        return f"{path} is required", "missing_required_parameter"
    if kind == "extra_forbidden":
        return f"unknown field: {path}", "unknown_parameter"
    if kind == "not_supported" or (kind == "literal_error" and value in _LATER):
        return f"not supported yet: {path}={shown}", "unsupported_parameter"
    if kind in _EXPECTED:
        wanted = _EXPECTED[kind]
        return f"{path} must be {wanted}, not {_type_name(value)} ({shown})", "invalid_type"
    if kind in _LIMITS:
        key, words, suffix = _LIMITS[kind]
        number = "integer" if isinstance(value, int) else "decimal"
        return f"{path} is {shown}, but {words} {show(limits[key])}", f"{number}_{suffix}"
    if kind == "finite_number":
        return f"{path} is {shown}, but must be a finite number", "invalid_value"
    if kind == "literal_error":
        return f"{path} is {shown}, but must be {limits['expected']}", "invalid_value"
    if kind in ("too_long", "string_too_long"):
        length = limits.get("actual_length") or (len(value) if isinstance(value, str) else "more")
        what = "string" if kind == "string_too_long" else "array"
        return (
            f"{path} has length {length}, but must have at most {limits['max_length']}",
            f"{what}_above_max_length",
        )
    if kind in ("too_short", "string_too_short"):
        what = "string" if kind == "string_too_short" else "array"
        return (
            f"{path} is {shown}, but must have a length of at least {limits['min_length']}",
            f"{what}_below_min_length",
        )
    return f"{path}: {fallback} (got {shown})", "invalid_value"


def show(value: object) -> str:
    """A value as JSON, cut to a length fit for a message. NaN and infinities are named."""
    try:
        finite = not isinstance(value, float) or isfinite(value)
        text = orjson.dumps(value).decode() if finite else json.dumps(value)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= _VALUE_LENGTH else f"{text[:_VALUE_LENGTH]}..."


def _type_name(value: object) -> str:
    return _JSON_TYPES.get(type(value), "something else")


def _path(location: tuple[str | int, ...]) -> str:
    """`messages[0].content`; the tags of unions, written `<tag>`, are left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("<") and part != "[key]":
            path += f".{part}" if path else part
    return path
