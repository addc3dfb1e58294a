"""From a body to token ids that fit the model, and to requests for the core."""

import asyncio
from collections.abc import Sequence

from shoal.api.v1 import engine_pb2
from shoal.router.chat_template import ChatTemplateError
from shoal.router.generation import Generation, GenerationError, GenerationRequest
from shoal.router.http.api import Api
from shoal.router.http.errors import ApiError
from shoal.router.http.exchange import Exchange
from shoal.router.http.fields import Message
from shoal.router.http.requests import GenerateBody
from shoal.router.http.sampling import check_ids
from shoal.router.text import TextModel

_INLINE_MESSAGES = 100  # templates render so many within a fraction of a millisecond


async def chat_prompt(text: TextModel, messages: list[Message], add_generation_prompt: bool) -> str:
    """The messages through the model's chat template. Raises ApiError."""
    turns = [_plain(message) for message in messages]
    try:
        if len(turns) <= _INLINE_MESSAGES:
            return text.apply_chat_template(turns, add_generation_prompt)
        return await asyncio.to_thread(text.apply_chat_template, turns, add_generation_prompt)
    except ChatTemplateError as error:
        raise ApiError(400, f"messages: {error}", param="messages", code="invalid_value") from None


def _plain(message: Message) -> dict[str, object]:
    """What templates know: the text of all parts, and system where OpenAI says developer."""
    content = message["content"]
    turn: dict[str, object] = {
        "role": "system" if message["role"] == "developer" else message["role"],
        "content": content if isinstance(content, str) else "\n".join(p["text"] for p in content),
    }
    if message.get("name"):
        turn["name"] = message["name"]
    return turn


async def encode(text: TextModel, prompt: str, add_special_tokens: bool, param: str) -> list[int]:
    """Token ids of a text. One that cannot fit is refused before it is tokenized."""
    limit = text.max_prompt_bytes
    if len(prompt) > limit or (len(prompt) * 4 > limit and len(prompt.encode()) > limit):
        tokens = len(prompt.encode()) * text.model.max_model_len // limit + 1
        raise _too_long(f"at least {tokens}", text, param)
    ids = await text.encode_async(prompt, add_special_tokens)
    if not ids:
        raise ApiError(
            400,
            f"{param} is empty: it has no token to continue from",
            param=param,
            code="invalid_value",
        )
    return ids


async def encode_prompts(
    text: TextModel,
    prompt: str | list[str] | list[int] | list[list[int]],
    add_special_tokens: bool,
) -> list[tuple[str | None, list[int]]]:
    """Text (None where ids were given) and ids of each prompt of a completion."""
    if isinstance(prompt, str):
        return [(prompt, await encode(text, prompt, add_special_tokens, "prompt"))]
    if isinstance(prompt[0], int):
        return [(None, _checked(text, prompt, "prompt"))]
    prompts: list[tuple[str | None, list[int]]] = []
    for place, one in enumerate(prompt):
        param = f"prompt[{place}]"
        if isinstance(one, str):
            prompts.append((one, await encode(text, one, add_special_tokens, param)))
        else:
            prompts.append((None, _checked(text, one, param)))
    return prompts


def _checked(text: TextModel, token_ids: object, param: str) -> list[int]:
    assert isinstance(token_ids, list)
    check_ids(token_ids, text.model.vocab_size, param)
    return token_ids


def room(text: TextModel, length: int, asked: int | None, param: str, limit_param: str) -> int:
    """How many tokens may follow a prompt of `length`: those asked for, else all that fit.

    Raises ApiError where they do not fit the model.
    """
    left = text.model.max_model_len - length
    if left < 1:
        raise _too_long(str(length), text, param)
    if asked is not None and asked > left:
        raise ApiError(
            400,
            f"{param} has {length} tokens and {limit_param} is {asked}, together "
            f"{length + asked}, but the model's limit (max_model_len) is "
            f"{text.model.max_model_len}",
            param=limit_param,
            code="context_length_exceeded",
        )
    return left if asked is None else asked


def _too_long(tokens: str, text: TextModel, param: str) -> ApiError:
    return ApiError(
        400,
        f"{param} has {tokens} tokens, which leaves no room for an answer: the model's limit "
        f"(max_model_len) is {text.model.max_model_len} tokens, prompt and answer together",
        param=param,
        code="context_length_exceeded",
    )


def submit(
    api: Api,
    exchange: Exchange,
    body: GenerateBody,
    service: str,
    text: TextModel,
    prompts: Sequence[tuple[list[int], engine_pb2.Sampling]],
    samples: int,
) -> list[Generation]:
    """Hands every prompt to the core, or none. Raises GenerationError."""
    session = body.prompt_cache_key or None
    header = exchange.header(api.core.session_header(service).encode("latin-1"))
    if header:
        session = header.decode("latin-1")
    named = exchange.header(b"x-shoal-revision")
    pin = named.decode("latin-1") if named else api.core.pinned(service, exchange.header)
    generations: list[Generation] = []
    try:
        for token_ids, sampling in prompts:
            request = GenerationRequest(
                service=service,
                token_ids=token_ids,
                sampling=sampling,
                n=samples,
                priority=body.priority or 0,
                tenant=body.user or body.safety_identifier or "",
                session=session,
                revision=pin,
                salt=body.cache_salt or "",
                text=text,
            )
            generations.append(api.core.submit(request))
    except GenerationError:
        for generation in generations:
            generation.cancel()
        raise
    exchange.cancel_on_hangup(generations)
    return generations
