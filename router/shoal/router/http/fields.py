"""Field types of request bodies: bounds once, for validation and for /openapi.json."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Required, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    with_config,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from shoal.router.stop import MAX_STOP_LENGTH, MAX_STOP_STRINGS

MAX_LOGPROBS = 20
MAX_SAMPLES = 128
MAX_PROMPTS = 1024
_INT32 = 2**31 - 1
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Body(BaseModel):
    """A JSON body: unknown fields, NaN and values of another type are refused."""

    model_config = _STRICT


class NotYet:
    """A field of OpenAI's whose feature is not there yet: only values that ask for nothing."""

    def __init__(self, *allowed: object) -> None:
        self._allowed = (None, *allowed)

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": list(self._allowed), "description": "Not supported yet."}

    def _check(self, value: object) -> object:
        for allowed in self._allowed:
            if type(value) is type(allowed) and value == allowed:
                return value
        raise PydanticCustomError("not_supported", "not supported yet")


def _tagger(*cases: tuple[str, Callable[[object], bool]]) -> Callable[[object], str | None]:
    return lambda value: next((tag for tag, holds in cases if holds(value)), None)


def _is_str(value: object) -> bool:
    return isinstance(value, str)


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _is_list_of(*kinds: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and bool(value) and type(value[0]) in kinds


def _integral(value: object) -> object:
    """JSON does not tell 2.0 from 2."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _integral_items(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    """The same for a list, at no cost for lists of integers."""
    try:
        return handler(value)
    except ValidationError:
        if not isinstance(value, list):
            raise
        return handler([_integral(item) for item in value])


_WHOLE = BeforeValidator(_integral)
Model = Annotated[str, Field(min_length=1, max_length=256, description="A model id.")]
Temperature = Annotated[float, Field(ge=0, le=2, description="0 is greedy.")]
Share = Annotated[float, Field(gt=0, le=1)]
MinP = Annotated[float, Field(ge=0, le=1)]
TopK = Annotated[int, Field(ge=-1, le=_INT32, description="0 or -1: off."), _WHOLE]
Penalty = Annotated[float, Field(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Field(gt=0, le=100)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
LogitBias = Annotated[
    dict[TokenKey, Bias], Field(max_length=4096, description="Token id, as a string, to bias.")
]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1), _WHOLE]
TokenId = Annotated[int, Field(ge=0, le=_INT32)]
TokenIds = Annotated[
    list[TokenId], Field(min_length=1, fail_fast=True), WrapValidator(_integral_items)
]
StopIds = Annotated[
    list[TokenId], Field(max_length=256, fail_fast=True), WrapValidator(_integral_items)
]
Samples = Annotated[int, Field(ge=1, le=MAX_SAMPLES), _WHOLE]
Count = Annotated[int, Field(ge=0, le=_INT32), _WHOLE]
AtLeastOne = Annotated[int, Field(ge=1, le=_INT32), _WHOLE]
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), _WHOLE]
Priority = Annotated[int, Field(ge=-(2**31), le=_INT32, description="Smaller is sooner."), _WHOLE]
Name = Annotated[str, Field(max_length=512)]
Salt = Annotated[str, Field(min_length=1, max_length=512)]

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop = Annotated[
    Annotated[StopString, Tag("<string>")]
    | Annotated[Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)], Tag("<strings>")],
    Discriminator(
        _tagger(("<string>", _is_str), ("<strings>", _is_list)),
        custom_error_type="stop_type",
        custom_error_message="must be a string or an array of strings",
    ),
]

_T = TypeVar("_T")
_Prompts = Annotated[list[_T], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[_Prompts[str], Tag("<texts>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[_Prompts[TokenIds], Tag("<id lists>")],
    Discriminator(
        _tagger(
            ("<text>", _is_str),
            ("<ids>", _is_list_of(int, float)),
            ("<id lists>", _is_list_of(list)),
            ("<texts>", _is_list),
        ),
        custom_error_type="prompt_type",
        custom_error_message="must be a string, an array of strings, an array of token ids, "
        "or an array of arrays of token ids",
    ),
]


@with_config(_STRICT)
class TextPart(TypedDict):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[
        Annotated[list[TextPart], Field(min_length=1, max_length=4096, fail_fast=True)],
        Tag("<parts>"),
    ],
    Discriminator(
        _tagger(("<text>", _is_str), ("<parts>", _is_list)),
        custom_error_type="content_type",
        custom_error_message="must be a string or an array of text parts",
    ),
]


@with_config(_STRICT)
class Message(TypedDict, total=False):
    """One turn of a chat. The fields after `name` are those that answers carry, so that an
    answer can be sent back as it came."""

    role: Required[Literal["system", "developer", "user", "assistant"]]
    content: Required[Content]
    name: Name | None
    refusal: Annotated[object, NotYet()]
    annotations: Annotated[object, NotYet([])]
    audio: Annotated[object, NotYet()]
    tool_calls: Annotated[object, NotYet([])]
    function_call: Annotated[object, NotYet()]


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]


class StreamOptions(Body):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # padding against eavesdroppers; none is added
