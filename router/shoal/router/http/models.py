"""GET /v1/models, POST /tokenize, POST /detokenize, health and metrics."""

import orjson
from prometheus_client import exposition

from shoal.router.http.api import Api, model_not_found, read_body
from shoal.router.http.errors import ApiError
from shoal.router.http.exchange import JSON, Exchange
from shoal.router.http.prompts import chat_prompt, encode
from shoal.router.http.requests import DetokenizeBody, TokenizeBody
from shoal.router.http.sampling import check_ids


def _model(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "shoal"}


async def list_models(api: Api, exchange: Exchange) -> None:
    """Every model id, aliases included."""
    data = [_model(name) for name, _ in api.core.models()]
    await exchange.respond(200, orjson.dumps({"object": "list", "data": data}), JSON)


async def get_model(api: Api, exchange: Exchange) -> None:
    """One of them."""
    name = exchange.path.removeprefix("/v1/models/")
    if api.core.find(name) is None:
        raise model_not_found(name, api.core.models())
    await exchange.respond(200, orjson.dumps(_model(name)), JSON)


async def tokenize(api: Api, exchange: Exchange) -> None:
    """Token ids of a text or of a chat, in vLLM's shape."""
    body = await read_body(exchange, TokenizeBody)
    given = body.model_fields_set & {"prompt", "messages"}
    if len(given) != 1:
        raise ApiError(400, "give either prompt or messages", param="prompt", code="invalid_value")
    _, text = await api.text(exchange, body.model)
    if body.messages:
        prompt = await chat_prompt(text, body.messages, body.add_generation_prompt is not False)
        ids = await encode(text, prompt, bool(body.add_special_tokens), "messages")
    else:
        special = body.add_special_tokens is not False
        ids = await encode(text, body.prompt, special, "prompt") if body.prompt else []
    strings = [text.vocabulary.token_text(i) for i in ids] if body.return_token_strs else None
    answer = {
        "count": len(ids),
        "max_model_len": text.model.max_model_len,
        "tokens": ids,
        "token_strs": strings,
    }
    await exchange.respond(200, orjson.dumps(answer), JSON)


async def detokenize(api: Api, exchange: Exchange) -> None:
    """The text of token ids, special ones included, in vLLM's shape."""
    body = await read_body(exchange, DetokenizeBody)
    _, text = await api.text(exchange, body.model)
    check_ids(body.tokens, text.model.vocab_size, "tokens")
    prompt = text.decode(body.tokens, skip_special_tokens=False)
    await exchange.respond(200, orjson.dumps({"prompt": prompt}), JSON)


async def health(api: Api, exchange: Exchange) -> None:
    """The process serves HTTP; says nothing about models."""
    await exchange.respond(200, b'{"status":"ok"}', JSON)


async def ready(api: Api, exchange: Exchange) -> None:
    """200 once requests can be routed."""
    if not api.core.ready:
        raise ApiError(
            503, "not ready: no route table has been read yet", code="not_ready", retry_after=1
        )
    await exchange.respond(200, b'{"status":"ready"}', JSON)


async def metrics(api: Api, exchange: Exchange) -> None:
    """Prometheus' text format."""
    body = exposition.generate_latest(api.core.registry)
    kind = exposition.CONTENT_TYPE_PLAIN_0_0_4.encode()
    await exchange.respond(200, body, [(b"content-type", kind)])
