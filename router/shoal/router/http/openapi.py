"""/openapi.json from the types that validate, a page that shows it, and an index."""

from functools import cache
from importlib.resources import files
from typing import Any

import orjson
from pydantic.json_schema import models_json_schema

from shoal.router.http.api import Api
from shoal.router.http.exchange import JSON, Exchange
from shoal.router.http.requests import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from shoal.router.http.responses import (
    Chat,
    Completion,
    Detokenized,
    Error,
    Model,
    ModelList,
    Status,
    Tokenized,
)

_REF = "#/components/schemas/{model}"
_BODIES = (ChatBody, CompletionBody, TokenizeBody, DetokenizeBody)
_ANSWERS = (Chat, Completion, Tokenized, Detokenized, Model, ModelList, Status, Error)
_INDEX = {
    "name": "shoal",
    "endpoints": [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/health",
        "/ready",
        "/metrics",
        "/openapi.json",
        "/docs",
    ],
}
_REFUSALS = {
    "400": "The request is wrong: the message names field, value and limit.",
    "404": "No such model.",
    "408": "The body came too slowly.",
    "413": "The body is too long.",
    "415": "The body is not JSON.",
    "429": "Too many requests are waiting: try again after Retry-After.",
    "503": "No replica can answer: try again after Retry-After.",
}
_RETRY_AFTER = {
    "Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
}


def _schema(kind: type) -> dict[str, str]:
    return {"$ref": _REF.format(model=kind.__name__)}


def _refusals(*statuses: str) -> dict[str, Any]:
    return {
        status: {
            "description": _REFUSALS[status],
            "content": {"application/json": {"schema": _schema(Error)}},
        }
        | ({"headers": _RETRY_AFTER} if status in ("429", "503") else {})
        for status in statuses
    }


def _post(name: str, summary: str, body: type, answer: type, streams: bool) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _schema(answer)}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "post": {
            "operationId": name,
            "summary": summary,
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": _schema(body)}},
            },
            "responses": {
                "200": {"description": "The answer.", "content": content},
                **_refusals(*_REFUSALS),
            },
        }
    }


def _get(
    name: str, summary: str, content: dict[str, Any], *refusals: str, **more: object
) -> dict[str, Any]:
    return {
        "get": {
            "operationId": name,
            "summary": summary,
            **more,
            "responses": {
                "200": {"description": summary, "content": content},
                **_refusals(*refusals),
            },
        }
    }


def _json(kind: type) -> dict[str, Any]:
    return {"application/json": {"schema": _schema(kind)}}


def build() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    _, bodies = models_json_schema(
        [(kind, "validation") for kind in _BODIES], ref_template=_REF, by_alias=True
    )
    _, answers = models_json_schema(
        [(kind, "serialization") for kind in _ANSWERS], ref_template=_REF, by_alias=True
    )
    named = {
        "name": "model",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "minLength": 1},
    }
    text = {"text/plain": {"schema": {"type": "string"}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Shoal", "version": "1", "description": "OpenAI's API, and a bit more."},
        "paths": {
            "/v1/chat/completions": _post("chat", "Answer a chat.", ChatBody, Chat, True),
            "/v1/completions": _post(
                "completions", "Continue prompts.", CompletionBody, Completion, True
            ),
            "/v1/models": _get("models", "The models served here.", _json(ModelList)),
            "/v1/models/{model}": _get(
                "model", "One model.", _json(Model), "404", parameters=[named]
            ),
            "/tokenize": _post("tokenize", "Text to token ids.", TokenizeBody, Tokenized, False),
            "/detokenize": _post(
                "detokenize", "Token ids to text.", DetokenizeBody, Detokenized, False
            ),
            "/health": _get("health", "The process serves.", _json(Status)),
            "/ready": _get("ready", "Requests can be routed.", _json(Status), "503"),
            "/metrics": _get("metrics", "Prometheus' text format.", text),
        },
        "components": {"schemas": {**bodies["$defs"], **answers["$defs"]}},
    }


@cache
def _document() -> bytes:
    return orjson.dumps(build())


@cache
def _page() -> bytes:
    return (files("shoal.router.http") / "docs.html").read_bytes()


async def document(api: Api, exchange: Exchange) -> None:
    """GET /openapi.json."""
    await exchange.respond(200, _document(), JSON)


async def page(api: Api, exchange: Exchange) -> None:
    """GET /docs."""
    await exchange.respond(200, _page(), [(b"content-type", b"text/html; charset=utf-8")])


async def index(api: Api, exchange: Exchange) -> None:
    """GET /."""
    await exchange.respond(200, orjson.dumps(_INDEX), JSON)
