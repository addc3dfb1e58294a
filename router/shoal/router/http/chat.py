"""POST /v1/chat/completions."""

from collections.abc import Callable

import orjson

from shoal.router.http.api import Api, read_body
from shoal.router.http.errors import ApiError
from shoal.router.http.exchange import JSON, Exchange
from shoal.router.http.logprobs import chat_logprobs, prompt_logprobs
from shoal.router.http.prompts import chat_prompt, encode, room, submit
from shoal.router.http.requests import ChatBody, GenerateBody
from shoal.router.http.run import Run, Step
from shoal.router.http.sampling import build_sampling
from shoal.router.http.sse import CHAT, Chunks, Extras, stream
from shoal.router.text import TextModel
from shoal.router.text_stream import TextStream


async def chat(api: Api, exchange: Exchange) -> None:
    """Answers a chat, streamed or whole."""
    body = await read_body(exchange, ChatBody)
    service, text = await api.text(exchange, body.model)
    check_stream(body)
    top = body.top_logprobs or 0
    if top and not body.logprobs:
        raise ApiError(
            400,
            f"top_logprobs is {top}, but logprobs is not true",
            param="top_logprobs",
            code="invalid_value",
        )
    add_prompt = body.add_generation_prompt is not False
    prompt = await chat_prompt(text, body.messages, add_prompt)
    ids = await encode(text, prompt, bool(body.add_special_tokens), "messages")
    limit_param, asked = "max_completion_tokens", body.max_completion_tokens
    if asked is None:
        limit_param, asked = "max_tokens", body.max_tokens
    max_tokens = room(text, len(ids), asked, "messages", limit_param)
    sampling = build_sampling(
        body, text, max_tokens=max_tokens, logprobs=top if body.logprobs else None
    )
    samples = body.n or 1
    generations = submit(api, exchange, body, service, text, [(ids, sampling)], samples)
    streams = [text_stream(body, text) for _ in range(samples)]
    run = Run(generations, streams)
    identity = (
        f"chatcmpl-{exchange.request_id.decode('latin-1')}",
        int(api.clock()),
        body.model,
    )
    if not body.stream:
        await _whole(exchange, body, text, run, identity, ids)
        return
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    continuous = usage and bool(body.stream_options and body.stream_options.continuous_usage_stats)
    chunks = Chunks(CHAT, identity, run, usage=usage, continuous=continuous)
    await stream(exchange, run, chunks, _extras(body, text, run, top))


def check_stream(body: GenerateBody) -> None:
    """Raises ApiError for what only goes with a stream, or never does."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(
            400,
            "stream_options is given, but stream is not true",
            param="stream_options",
            code="invalid_value",
        )
    if body.stream and body.prompt_logprobs is not None:
        raise ApiError(
            400,
            f"prompt_logprobs is {body.prompt_logprobs}, but a stream does not carry them: "
            "leave it out, or set stream to false",
            param="prompt_logprobs",
            code="invalid_value",
        )


def text_stream(
    body: GenerateBody, text: TextModel, prompt_ids: list[int] | None = None, offsets: bool = False
) -> TextStream:
    """The text of one choice as the body wants it."""
    stop = body.stop or ()
    return TextStream(
        text,
        stop=(stop,) if isinstance(stop, str) else stop,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        min_tokens=body.min_tokens or 0,
        prompt_ids=prompt_ids or (),
        track_offsets=offsets,
    )


def _extras(body: ChatBody, text: TextModel, run: Run, top: int) -> Callable[[Step], Extras] | None:
    if not body.logprobs and not body.return_token_ids:
        return None

    def extras(step: Step) -> Extras:
        choice, _, output = step
        shown = run.streams[choice].shown_ids
        logprobs = None
        if body.logprobs and shown:
            content = chat_logprobs(text.vocabulary, shown, output.logprobs, top)
            logprobs = {"content": content, "refusal": None}
        return Extras(logprobs, {"token_ids": list(shown)} if body.return_token_ids else {})

    return extras


async def _whole(
    exchange: Exchange,
    body: ChatBody,
    text: TextModel,
    run: Run,
    identity: tuple[str, int, str],
    ids: list[int],
) -> None:
    texts = [""] * len(run.streams)
    token_ids: list[list[int]] = [[] for _ in run.streams]
    content: list[list[dict[str, object]]] = [[] for _ in run.streams]
    of_prompt: list[dict[str, dict[str, object]] | None] | None = None
    try:
        while not run.done:
            for choice, piece, output in await run.next():
                texts[choice] += piece
                shown = run.streams[choice].shown_ids
                if body.return_token_ids:
                    token_ids[choice] += shown
                if body.logprobs:
                    content[choice] += chat_logprobs(
                        text.vocabulary, shown, output.logprobs, body.top_logprobs or 0
                    )
                if output.prompt_logprobs is not None and of_prompt is None:
                    of_prompt = prompt_logprobs(text.vocabulary, output.prompt_logprobs)
    finally:
        run.cancel()
    choices = []
    for index, sample in enumerate(run.streams):
        entry: dict[str, object] = {
            "index": index,
            "message": {"role": "assistant", "content": texts[index], "refusal": None},
            "logprobs": {"content": content[index], "refusal": None} if body.logprobs else None,
            "finish_reason": sample.finish,
            "stop_reason": sample.stop_reason,
        }
        if body.return_token_ids:
            entry["token_ids"] = token_ids[index]
        choices.append(entry)
    answer: dict[str, object] = {
        "id": identity[0],
        "object": "chat.completion",
        "created": identity[1],
        "model": identity[2],
        "choices": choices,
        "usage": run.usage().json(),
    }
    if body.return_token_ids:
        answer["prompt_token_ids"] = ids
    if body.prompt_logprobs is not None:
        answer["prompt_logprobs"] = of_prompt
    await exchange.respond(200, orjson.dumps(answer), [*JSON, *run.headers()])
