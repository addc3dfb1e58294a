"""What every handler has at hand, and how a handler looks."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from pydantic import ValidationError

from shoal.router.http.core import Core
from shoal.router.http.errors import ApiError, from_validation
from shoal.router.http.exchange import Exchange, HttpSettings
from shoal.router.http.fields import Body
from shoal.router.text import TextModel

_Body = TypeVar("_Body", bound=Body)


@dataclass(frozen=True, slots=True)
class Api:
    """The HTTP front's surroundings."""

    core: Core
    settings: HttpSettings
    clock: Callable[[], float]  # seconds since the epoch

    async def text(self, exchange: Exchange, model_id: str) -> tuple[str, TextModel]:
        """Service and text model of a model id. A client that hangs up while it waits for them
        leaves the queue. Raises ApiError, GenerationError."""
        service = self.core.find(model_id)
        if service is None:
            raise model_not_found(model_id, self.core.models())
        text = self.core.known_text(service)
        if text is None:
            with exchange.given_up_on_hangup():
                text = await self.core.text(service, self.settings.model_timeout_seconds)
        return service, text


Handler = Callable[[Api, Exchange], Awaitable[None]]


async def read_body(exchange: Exchange, kind: type[_Body]) -> _Body:
    """The validated body. Raises ApiError."""
    raw = await exchange.json_body()
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise from_validation(error, kind.model_fields) from None


def model_not_found(model_id: str, models: list[tuple[str, str]]) -> ApiError:
    """404 that names what is served."""
    served = ", ".join(name for name, _ in models[:20]) or "none yet"
    return ApiError(
        404,
        f"the model {model_id!r} does not exist; models served here: {served}",
        param="model",
        code="model_not_found",
    )
