"""Command-line flags from the fields of a pydantic model: `spec.engine` of the API's types.

The type says everything: name, kind, bounds, default and help. Flags that are not given stay
out of the document, so its defaults remain the API's.
"""

import types
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo


class YamlValue(click.ParamType[object]):
    """A structured field on the command line: `--speculative '{method: ngram, tokens: 4}'`."""

    name = "yaml"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        import yaml

        try:
            return yaml.safe_load(value)
        except yaml.YAMLError as error:
            self.fail(f"not YAML: {error}", param, ctx)


def model_flags(
    model: type[BaseModel],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds one option per field of `model`; the parameter has the field's Python name."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name, field in reversed(model.model_fields.items()):
            function = _option(name, field)(function)
        return function

    return decorate


def given(model: type[BaseModel], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `model` that were given as flags, under their aliases."""
    return {
        field.alias or name: parameters[name]
        for name, field in model.model_fields.items()
        if parameters.get(name) is not None
    }


def _option(name: str, field: FieldInfo) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    flag = name.replace("_", "-")
    kind = _param_type(field)
    declaration = f"--{flag}/--no-{flag}" if kind is click.BOOL else f"--{flag}"
    metavar = None if kind is click.BOOL or isinstance(kind, click.Choice) else kind.name.upper()
    return click.option(
        declaration,
        name,
        type=None if kind is click.BOOL else kind,
        default=None,
        metavar=metavar,
        help=f"{field.description or ''}{_default_text(field)}",
    )


def _param_type(field: FieldInfo) -> click.ParamType[Any]:
    annotation = _without_none(field.annotation)
    if annotation is bool:
        return click.BOOL
    if annotation in (int, float):
        return _number_type(annotation is int, field.metadata)
    if get_origin(annotation) is Literal:
        return click.Choice(get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return click.Choice([member.value for member in annotation])
    if annotation is str:
        return click.STRING
    return YamlValue()


def _number_type(whole: bool, metadata: list[Any]) -> click.ParamType[Any]:
    bounds: dict[str, Any] = {}
    for constraint in metadata:
        for attribute, bound, is_open in (
            ("ge", "min", False),
            ("gt", "min", True),
            ("le", "max", False),
            ("lt", "max", True),
        ):
            value = getattr(constraint, attribute, None)
            if value is not None:
                bounds |= {bound: value, f"{bound}_open": is_open}
    return click.IntRange(**bounds) if whole else click.FloatRange(**bounds)


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        if len(kinds) == 1:
            return _without_none(kinds[0])
    return annotation


def _default_text(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=False)
    if default is None or field.is_required() or isinstance(default, BaseModel):
        return ""
    value = default.value if isinstance(default, Enum) else default
    return f"  [default: {str(value).lower() if isinstance(value, bool) else value}]"
