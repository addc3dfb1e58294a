"""What every API type has in common: frozen, camelCase on the wire, unknown keys refused."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
)
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MAX_COUNT = 10_000  # replicas of one service, at most


class ApiModel(BaseModel):
    """Base of the API types. Attributes are snake_case, their aliases camelCase."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        populate_by_name=True,
        allow_inf_nan=False,
    )


@dataclass(frozen=True, slots=True)
class Unique:
    """Marks a list whose elements differ: in `key`, or in whole where that is None.

    To Kubernetes such lists are maps and sets, whose elements have owners of their own.
    """

    key: str | None = None

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        if self.key is None:
            return {**handler(schema), "x-kubernetes-list-type": "set"}
        return {
            **handler(schema),
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": [self.key],
        }

    def _check(self, items: tuple[Any, ...]) -> tuple[Any, ...]:
        seen = set()
        for item in items:
            key = item if self.key is None else getattr(item, self.key)
            if key in seen:
                raise PydanticCustomError(
                    "duplicate", "{key} is given twice; take one out", {"key": str(key)}
                )
            seen.add(key)
        return items


def _count_as_text(value: object) -> object:
    """A quantity may be a plain integer, as in `cpu: 8`."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"

Quantity = Annotated[
    str,
    BeforeValidator(_count_as_text),
    Field(pattern=QUANTITY_PATTERN, max_length=32),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "pattern": QUANTITY_PATTERN,
            "maxLength": 32,
        }
    ),
]
"""A Kubernetes quantity such as `500m`, `8`, `64Gi` (see `shoal.api.quantity`)."""

PATH_PATTERN = "^/"
MODEL_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$"
ModelId = Annotated[str, Field(pattern=MODEL_ID_PATTERN, max_length=128)]
"""The name by which clients ask for a model."""

Uri = Annotated[str, Field(min_length=1, max_length=1024)]
"""Where a model lies; its scheme is checked by `shoal.api.rules`."""
