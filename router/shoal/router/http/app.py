"""The HTTP front: an ASGI application over the router's core.

Raw ASGI, no framework: a request is one task (the server's own) plus a watch for the client
hanging up. Whatever goes wrong becomes an error in OpenAI's shape.
"""

import itertools
import logging
import secrets
import time
from collections.abc import Callable, Mapping

from shoal.router.generation import GenerationError
from shoal.router.http import models, openapi
from shoal.router.http.api import Api, Handler
from shoal.router.http.chat import chat
from shoal.router.http.completions import completions
from shoal.router.http.core import Core
from shoal.router.http.errors import ApiError, from_generation
from shoal.router.http.exchange import JSON, Exchange, HttpSettings, Receive, Scope, Send

log = logging.getLogger(__name__)

ROUTES: Mapping[str, Mapping[str, Handler]] = {
    "/": {"GET": openapi.index},
    "/v1/chat/completions": {"POST": chat},
    "/v1/completions": {"POST": completions},
    "/v1/models": {"GET": models.list_models},
    "/tokenize": {"POST": models.tokenize},
    "/detokenize": {"POST": models.detokenize},
    "/health": {"GET": models.health},
    "/ready": {"GET": models.ready},
    "/metrics": {"GET": models.metrics},
    "/openapi.json": {"GET": openapi.document},
    "/docs": {"GET": openapi.page},
}
_MODEL_ROUTE: Mapping[str, Handler] = {"GET": models.get_model}
_REQUEST_ID_LENGTH = 128


class App:
    """The ASGI application. See `create_app`."""

    def __init__(self, api: Api, new_id: Callable[[], str]) -> None:
        self._api = api
        self._new_id = new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send, self._api.settings, b"")
        exchange.request_id = self._request_id(exchange)
        try:
            await _handler(exchange)(self._api, exchange)
        except ApiError as error:
            await _refuse(exchange, error)
        except GenerationError as error:
            await _refuse(exchange, from_generation(error))
        except Exception:
            log.exception("%s %s failed", exchange.method, exchange.path)
            await _refuse(exchange, ApiError(500, "the router failed; its log says why"))
        finally:
            exchange.close()

    def _request_id(self, exchange: Exchange) -> bytes:
        """The client's own, where it is fit for a header, else a new one."""
        given = exchange.header(b"x-request-id")
        if given and len(given) <= _REQUEST_ID_LENGTH and given.isascii():
            text = given.decode("ascii")
            if text.isprintable():
                return given
        return self._new_id().encode("ascii")


def create_app(
    core: Core,
    settings: HttpSettings | None = None,
    *,
    clock: Callable[[], float] = time.time,
    new_id: Callable[[], str] | None = None,
) -> App:
    """The application over a core. Run it where the core runs: one event loop.

    `new_id`: makes the id of a request that brings none; default: random for each application,
    then counted.
    """
    api = Api(core, settings or HttpSettings(), clock)
    return App(api, new_id or _numbered(secrets.token_hex(12)))


def _numbered(prefix: str) -> Callable[[], str]:
    count = itertools.count(1)
    return lambda: f"{prefix}{next(count):08x}"


def _handler(exchange: Exchange) -> Handler:
    """Raises ApiError 404 or 405."""
    path, method = exchange.path, exchange.method
    methods = ROUTES.get(path)
    if methods is None and len(path) > len("/v1/models/") and path.startswith("/v1/models/"):
        methods = _MODEL_ROUTE
    if methods is None:
        raise ApiError(404, f"there is no {path} here; GET / lists what is", code="unknown_url")
    handler = methods.get("GET" if method == "HEAD" else method)
    if handler is not None:
        return handler
    allowed = ", ".join([*methods, *(["HEAD"] if "GET" in methods else []), "OPTIONS"])
    if method == "OPTIONS":
        return _options(allowed)
    raise ApiError(
        405,
        f"{path} does not take {method}, but {allowed}",
        code="method_not_allowed",
        headers=[(b"allow", allowed.encode())],
    )


def _options(allowed: str) -> Handler:
    async def options(api: Api, exchange: Exchange) -> None:
        await exchange.start(204, [(b"allow", allowed.encode())])
        await exchange.send(b"", more=False)

    return options


async def _refuse(exchange: Exchange, error: ApiError) -> None:
    """Sends an error, unless nobody is there to read it or the response has begun."""
    if not exchange.started and not exchange.gone:
        await exchange.respond(error.status, error.body(), [*JSON, *error.headers()])


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
