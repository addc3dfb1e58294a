"""POST /v1/completions."""

import orjson

from shoal.api.v1 import engine_pb2
from shoal.router.http.api import Api, read_body
from shoal.router.http.chat import check_stream, text_stream
from shoal.router.http.errors import ApiError
from shoal.router.http.exchange import JSON, Exchange
from shoal.router.http.fields import MAX_SAMPLES
from shoal.router.http.logprobs import CompletionLogprobs, prompt_logprobs, token_offsets
from shoal.router.http.prompts import encode_prompts, room, submit
from shoal.router.http.requests import CompletionBody
from shoal.router.http.run import Run, Step
from shoal.router.http.sampling import build_sampling
from shoal.router.http.sse import COMPLETION, Chunks, Extras, stream
from shoal.router.text import TextModel
from shoal.router.text_stream import TextStream

_DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def completions(api: Api, exchange: Exchange) -> None:
    """Continues one prompt or several, streamed or whole."""
    body = await read_body(exchange, CompletionBody)
    service, text = await api.text(exchange, body.model)
    check_stream(body)
    samples = _samples(body)
    add_special_tokens = body.add_special_tokens is not False
    prompts = await encode_prompts(text, body.prompt, add_special_tokens)
    if len(prompts) * samples > MAX_SAMPLES * 8:
        raise ApiError(
            400,
            f"{len(prompts)} prompts of {samples} samples each are {len(prompts) * samples} "
            f"choices, but one request has at most {MAX_SAMPLES * 8}",
            param="prompt",
            code="invalid_value",
        )
    asked = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    requests = []
    for place, (_, ids) in enumerate(prompts):
        param = "prompt" if len(prompts) == 1 else f"prompt[{place}]"
        max_tokens = room(text, len(ids), max(asked, 1), param, "max_tokens")
        requests.append((ids, _sampling(body, text, max_tokens, samples)))
    generations = submit(api, exchange, body, service, text, requests, samples)
    streams = [
        text_stream(body, text, ids, offsets=body.logprobs is not None)
        for _, ids in prompts
        for _ in range(samples)
    ]
    run = Run(generations, streams, discard=asked == 0)
    answer = _Answer(body, text, run, prompts)
    identity = (f"cmpl-{exchange.request_id.decode('latin-1')}", int(api.clock()), body.model)
    if not body.stream:
        await _whole(exchange, answer, identity)
        return
    options = body.stream_options
    usage = options is not None and bool(options.include_usage)
    continuous = usage and options is not None and bool(options.continuous_usage_stats)
    chunks = Chunks(COMPLETION, identity, run, usage=usage, continuous=continuous)
    plain = body.logprobs is None and not body.return_token_ids
    await stream(
        exchange,
        run,
        chunks,
        None if plain else answer.extras,
        answer.echo if body.echo else None,
    )


def _samples(body: CompletionBody) -> int:
    """How many samples a prompt gets. Raises ApiError where best_of contradicts the rest."""
    n = body.n or 1
    best_of = n if body.best_of is None else body.best_of
    if best_of < n:
        raise ApiError(
            400,
            f"best_of is {best_of}, but must be at least n ({n})",
            param="best_of",
            code="invalid_value",
        )
    if body.stream and best_of > n:
        raise ApiError(
            400,
            f"best_of is {best_of}, but a stream must have it equal to n ({n})",
            param="best_of",
            code="invalid_value",
        )
    return best_of


def _sampling(
    body: CompletionBody, text: TextModel, max_tokens: int, samples: int
) -> engine_pb2.Sampling:
    logprobs = body.logprobs
    if logprobs is None and samples > (body.n or 1):
        logprobs = 0  # to tell which samples are best
    sampling = build_sampling(body, text, max_tokens=max_tokens, logprobs=logprobs)
    if body.echo and body.logprobs is not None:
        sampling.prompt_logprobs = max(body.logprobs, body.prompt_logprobs or 0)
    return sampling


class _Answer:
    """What the choices of one response hold beside their text."""

    def __init__(
        self,
        body: CompletionBody,
        text: TextModel,
        run: Run,
        prompts: list[tuple[str | None, list[int]]],
    ) -> None:
        self.body = body
        self.text = text
        self.run = run
        self.prompts = prompts
        self._skip = body.skip_special_tokens is not False

    def prompt_text(self, choice: int) -> str:
        prompt, ids = self.prompts[self.run.prompt_of(choice)]
        return self.text.decode(ids, self._skip) if prompt is None else prompt

    def logprobs(self, step: Step) -> CompletionLogprobs | None:
        """Of the tokens of this step."""
        if self.body.logprobs is None:
            return None
        choice, _, output = step
        sample = self.run.streams[choice]
        base = len(self.prompt_text(choice)) if self.body.echo else 0
        logprobs = CompletionLogprobs()
        logprobs.add(
            self.text.vocabulary,
            sample.shown_ids,
            output.logprobs,
            [base + offset for offset in sample.offsets],
            self.body.logprobs,
        )
        return logprobs

    def prompt_logprobs(self, step: Step) -> CompletionLogprobs | None:
        """Of the echoed prompt, with a choice's first step."""
        choice, _, output = step
        if self.body.logprobs is None or not output.prompt_logprobs:
            return None
        ids = self.prompts[self.run.prompt_of(choice)][1]
        fresh = TextStream(self.text, skip_special_tokens=self._skip, track_offsets=True)
        logprobs = CompletionLogprobs()
        logprobs.add(
            self.text.vocabulary,
            ids,
            output.prompt_logprobs,
            token_offsets(fresh, ids),
            self.body.logprobs,
        )
        return logprobs

    def extras(self, step: Step) -> Extras:
        """For a chunk of a stream."""
        logprobs = self.logprobs(step)
        fields: dict[str, object] = {}
        if self.body.return_token_ids:
            fields["token_ids"] = list(self.run.streams[step[0]].shown_ids)
        return Extras(logprobs if logprobs is not None and logprobs.tokens else None, fields)

    def echo(self, step: Step) -> tuple[str, Extras | None]:
        """For the chunk that repeats the prompt."""
        logprobs = self.prompt_logprobs(step)
        extras = None if logprobs is None else Extras(logprobs, {})
        return self.prompt_text(step[0]), extras


async def _whole(exchange: Exchange, answer: _Answer, identity: tuple[str, int, str]) -> None:
    body, run, count = answer.body, answer.run, len(answer.run.streams)
    texts = [""] * count
    token_ids: list[list[int]] = [[] for _ in range(count)]
    logprobs = [CompletionLogprobs() for _ in range(count)]
    of_prompt: list[object] = [None] * count
    scores = [0.0] * count  # sums of logprobs
    seen: set[int] = set()
    try:
        while not run.done:
            for step in await run.next():
                choice, piece, output = step
                if choice not in seen and body.echo:
                    texts[choice] = answer.prompt_text(choice)
                    if (echoed := answer.prompt_logprobs(step)) is not None:
                        logprobs[choice].extend(echoed)
                seen.add(choice)
                texts[choice] += piece
                token_ids[choice] += run.streams[choice].shown_ids
                if (shown := answer.logprobs(step)) is not None:
                    logprobs[choice].extend(shown)
                scores[choice] += sum(entry.logprobs[0] for entry in output.logprobs)
                if output.prompt_logprobs is not None and body.prompt_logprobs is not None:
                    of_prompt[choice] = prompt_logprobs(
                        answer.text.vocabulary, output.prompt_logprobs
                    )
    finally:
        run.cancel()
    choices: list[dict[str, object]] = []
    for choice in _best(answer, scores):
        sample = run.streams[choice]
        entry: dict[str, object] = {
            "index": len(choices),
            "text": texts[choice],
            "logprobs": logprobs[choice] if body.logprobs is not None else None,
            "finish_reason": sample.finish,
            "stop_reason": sample.stop_reason,
        }
        if body.return_token_ids:
            entry["token_ids"] = token_ids[choice]
            entry["prompt_token_ids"] = answer.prompts[run.prompt_of(choice)][1]
        if body.prompt_logprobs is not None:
            entry["prompt_logprobs"] = of_prompt[choice]
        choices.append(entry)
    document = {
        "id": identity[0],
        "object": "text_completion",
        "created": identity[1],
        "model": identity[2],
        "choices": choices,
        "usage": run.usage().json(),
    }
    await exchange.respond(200, orjson.dumps(document), [*JSON, *run.headers()])


def _best(answer: _Answer, scores: list[float]) -> list[int]:
    """The n choices of each prompt with the highest mean logprob a token, best first; all in
    their own order where none is left over."""
    n = answer.body.n or 1
    samples = len(scores) // len(answer.prompts)
    if samples == n:
        return list(range(len(scores)))
    best: list[int] = []
    for first in range(0, len(scores), samples):
        group = range(first, first + samples)
        best += sorted(
            group, key=lambda c: scores[c] / max(1, answer.run.streams[c].num_tokens), reverse=True
        )[:n]
    return best
