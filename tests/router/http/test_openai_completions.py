"""Completions over a scripted core: prompts of every kind, echo, logprobs, best_of."""

from typing import Any

import pytest

from shoal.router.http.responses import Completion

PATH = "/v1/completions"


def ask(**more: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": "Hi", **more}


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("Hi", [b"Hi"]),
        (["Hi", "Ho"], [b"Hi", b"Ho"]),
        ([72, 105], [b"Hi"]),
        ([[72, 105], [72]], [b"Hi", b"H"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_every_kind_of_prompt(
    core: Any, support: Any, prompt: object, prompts: list[bytes], stream: bool
) -> None:
    """Each prompt is a generation, and choices come in the prompts' order."""
    core.reply = lambda request, index: [bytes(request.token_ids)[:1], b"-%d" % index]
    answer = support.post(core, PATH, ask(prompt=prompt, n=2, stream=stream))
    assert [bytes(request.token_ids) for request in core.requests] == prompts
    expected = [f"H-{sample}" for _ in prompts for sample in range(2)]
    if stream:
        texts = [""] * len(expected)
        for chunk in answer.events():
            assert chunk["object"] == "text_completion"
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["text"]
        assert texts == expected
    else:
        body = answer.json()
        Completion.model_validate(body)
        assert [choice["text"] for choice in body["choices"]] == expected
        assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))
        assert body["usage"]["prompt_tokens"] == sum(map(len, prompts))


def test_sixteen_tokens_unless_told_otherwise(core: Any, support: Any) -> None:
    """OpenAI's default for completions."""
    core.reply = support.says(b"x" * 100)
    body = support.post(core, PATH, ask()).json()
    assert body["choices"][0]["text"] == "x" * 16
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_echo_repeats_the_prompt(core: Any, support: Any, stream: bool) -> None:
    """The prompt's text comes first, also where ids were given."""
    for prompt in ("Hi", [72, 105]):
        answer = support.post(core, PATH, ask(prompt=prompt, echo=True, stream=stream))
        if stream:
            text = "".join(c["choices"][0]["text"] for c in answer.events())
        else:
            text = answer.json()["choices"][0]["text"]
        assert text == "HiHello world"


@pytest.mark.parametrize("stream", [False, True])
def test_no_token_at_all_scores_the_prompt(core: Any, support: Any, stream: bool) -> None:
    """max_tokens 0 with echo and logprobs is how prompts are scored."""
    answer = support.post(core, PATH, ask(echo=True, logprobs=1, max_tokens=0, stream=stream))
    assert core.requests[0].sampling.max_tokens == 1
    if stream:
        choices = [c["choices"][0] for c in answer.events()]
        assert choices[0]["logprobs"]["tokens"] == ["H", "i"]
        assert choices[-1]["finish_reason"] == "length"
        assert "".join(choice["text"] for choice in choices) == "Hi"
        return
    body = answer.json()
    Completion.model_validate(body)
    choice = body["choices"][0]
    assert choice["text"] == "Hi"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] == {
        "tokens": ["H", "i"],
        "token_logprobs": [None, -0.5],
        "top_logprobs": [None, {"j": pytest.approx(-0.1), "i": -0.5}],
        "text_offset": [0, 1],
    }
    assert body["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_offsets_point_into_the_text(core: Any, support: Any, echo: bool, stream: bool) -> None:
    """Between a token's offset and the next is its text, with characters of several tokens at
    the last of them."""
    core.reply = support.says(b"a\xc3", b"\xa9", "日b".encode())
    answer = support.post(core, PATH, ask(prompt="é", echo=echo, logprobs=0, stream=stream))
    if stream:
        text, tokens, offsets = "", [], []
        for chunk in answer.events():
            choice = chunk["choices"][0]
            text += choice["text"]
            if choice["logprobs"]:
                tokens += choice["logprobs"]["tokens"]
                offsets += choice["logprobs"]["text_offset"]
    else:
        choice = answer.json()["choices"][0]
        text, tokens = choice["text"], choice["logprobs"]["tokens"]
        offsets = choice["logprobs"]["text_offset"]
    assert text == ("é" if echo else "") + "aé日b"
    base = 1 if echo else 0
    prompt_offsets = [0, 0] if echo else []
    assert offsets == [*prompt_offsets, *[base + o for o in (0, 1, 1, 2, 2, 2, 3)]]
    assert len(tokens) == len(offsets)


def test_best_of_returns_the_likeliest(core: Any, support: Any) -> None:
    """Of best_of samples the n with the highest mean logprob, best first."""
    values = [-3.0, -0.2, -1.0, -2.0]

    class Core(support.FakeCore):  # type: ignore[misc, name-defined]
        def submit(self, request: Any) -> Any:
            self.requests.append(request)
            generation = support.Generation(request, self, 0.0)
            for index in range(request.n):
                token = support.engine_pb2.TokenLogprobs(
                    token_ids=[97 + index], logprobs=[values[index]]
                )
                generation.deliver(
                    support.Output(index, [97 + index], logprobs=[token], finish=support.LENGTH)
                )
            return generation

    fake = Core(core.text_model)
    body = support.post(fake, PATH, ask(best_of=4, n=2)).json()
    assert [choice["text"] for choice in body["choices"]] == ["b", "c"]
    assert [choice["logprobs"] for choice in body["choices"]] == [None, None]
    assert body["usage"]["completion_tokens"] == 4
    assert fake.requests[0].n == 4


def test_a_failing_prompt_cancels_the_others(core: Any, support: Any) -> None:
    """One error ends the request, and nothing of it runs on."""
    lost = support.GenerationError(503, "lost", "gone")
    core.reply = lambda request, index: [lost] if request.token_ids[0] == 98 else [b"x"] * 50
    core.hang = True
    answer = support.post(core, PATH, ask(prompt=["a", "b", "c"], max_tokens=100))
    assert answer.status == 503
    assert core.cancelled == [None, None]


def test_a_refused_prompt_cancels_those_before(core: Any, support: Any) -> None:
    """A queue that fills up halfway takes none of the request."""

    class Core(support.FakeCore):  # type: ignore[misc, name-defined]
        def submit(self, request: Any) -> Any:
            if self.requests:
                raise support.GenerationError(429, "queue_full", "full")
            return super().submit(request)

    fake = Core(core.text_model)
    assert support.post(fake, PATH, ask(prompt=["a", "b"])).status == 429
    assert fake.cancelled == [None]
