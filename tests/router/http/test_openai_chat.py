"""Chat completions over a scripted core: shapes, choices, stops, logprobs, usage."""

import json
from typing import Any

import pytest

from shoal.router.http.responses import Chat

PATH = "/v1/chat/completions"


def ask(**more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **more}


def test_a_whole_answer_has_openai_s_shape(core: Any, support: Any) -> None:
    """Text, finish reason, ids, usage with cached tokens; eos is counted and not shown."""
    answer = support.post(core, PATH, ask())
    assert answer.status == 200
    body = answer.json()
    Chat.model_validate(body)
    assert body["choices"][0]["message"]["content"] == "Hello world"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["stop_reason"] is None
    prompt = len("user: Hi\nassistant: ")
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 12,
        "total_tokens": prompt + 12,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert answer.headers["x-shoal-endpoint"] == "pod-1"
    assert body["id"] == f"chatcmpl-{answer.headers['x-request-id']}"


def test_a_stream_tells_the_same_as_the_whole_answer(core: Any, support: Any) -> None:
    """Role first, then text, then the finish reason, then [DONE]."""
    answer = support.post(core, PATH, ask(stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = answer.events()
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert text == "Hello world"
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 3 + ["stop"]
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({c["id"] for c in chunks}) == 1
    assert "usage" not in chunks[0]


def test_usage_comes_last_when_asked_for(core: Any, support: Any) -> None:
    """Every chunk has usage null but the last, which has no choice."""
    chunks = support.post(
        core, PATH, ask(stream=True, stream_options={"include_usage": True})
    ).events()
    assert [c["usage"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 12


def test_continuous_usage_grows(core: Any, support: Any) -> None:
    """Each chunk tells the tokens so far."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = support.post(core, PATH, ask(stream=True, stream_options=options)).events()
    counts = [c["usage"]["completion_tokens"] for c in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 12


@pytest.mark.parametrize("stream", [False, True])
def test_samples_are_told_apart(core: Any, support: Any, stream: bool) -> None:
    """n samples of different length each keep their text and end."""
    core.reply = lambda request, index: [b"abc"[: index + 1], b"!" * index]
    answer = support.post(core, PATH, ask(n=3, stream=stream))
    if stream:
        texts = ["", "", ""]
        for chunk in answer.events():
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["delta"].get("content", "")
    else:
        texts = [choice["message"]["content"] for choice in answer.json()["choices"]]
    assert texts == ["a", "ab!", "abc!!"]
    assert core.requests[0].n == 3


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("pieces", [[b"one END two"], [b"one E", b"ND two"], [b"one EN", b"D"]])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_sample_and_frees_it(
    core: Any, support: Any, pieces: list[bytes], stream: bool, include: bool
) -> None:
    """Text up to the stop string, whatever the chunks; the core is told to stop."""
    core.reply, core.hang = support.says(*pieces), True
    body = ask(stop=["END"], stream=stream, include_stop_str_in_output=include)
    answer = support.post(core, PATH, body)
    if stream:
        chunks = answer.events()
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        end = chunks[-1]["choices"][0]
    else:
        end = answer.json()["choices"][0]
        text = end["message"]["content"]
        assert answer.json()["usage"]["completion_tokens"] == len("one END")
    assert text == ("one END" if include else "one ")
    assert (end["finish_reason"], end["stop_reason"]) == ("stop", "END")
    assert core.cancelled == [0]


def test_a_stop_string_that_never_completes_is_shown(core: Any, support: Any) -> None:
    """What was held back as a possible beginning comes out at the end."""
    core.reply = support.says(b"one EN")
    body = support.post(core, PATH, ask(stop="END")).json()
    assert body["choices"][0]["message"]["content"] == "one EN"


def test_stop_strings_do_not_count_before_min_tokens(core: Any, support: Any) -> None:
    """As with stop tokens, so many tokens come first."""
    core.reply = support.says(b"x.", b"y.z")
    body = support.post(core, PATH, ask(stop=".", min_tokens=2)).json()
    assert body["choices"][0]["message"]["content"] == "x.y"


def test_logprobs_in_chat_shape(core: Any, support: Any) -> None:
    """One entry a shown token with bytes and alternatives; eos has none."""
    core.reply = support.says("é".encode())
    body = support.post(core, PATH, ask(logprobs=True, top_logprobs=2)).json()
    Chat.model_validate(body)
    content = body["choices"][0]["logprobs"]["content"]
    assert [token["bytes"] for token in content] == [[0xC3], [0xA9]]
    assert content[0]["token"] == "bytes:\\xc3"
    assert content[0]["logprob"] == -0.5
    assert [len(token["top_logprobs"]) for token in content] == [2, 2]
    assert core.requests[0].sampling.logprobs == 2


def test_logprobs_of_a_stream_equal_those_of_the_whole(core: Any, support: Any) -> None:
    """Concatenated over chunks, also where text is held back."""
    core.reply = support.says(b"a\xc3", b"\xa9b")
    body = ask(logprobs=True)
    whole = support.post(core, PATH, body).json()["choices"][0]
    chunks = support.post(core, PATH, body | {"stream": True}).events()
    content = [
        token
        for c in chunks
        for token in ((c["choices"][0]["logprobs"] or {}).get("content") or [])
    ]
    assert content == whole["logprobs"]["content"]
    assert len(content) == 4


def test_minus_infinity_is_written_as_a_number(core: Any, support: Any) -> None:
    """JSON has no infinity; OpenAI writes -9999."""
    infinite = support.engine_pb2.TokenLogprobs(token_ids=[97], logprobs=[float("-inf")])

    class Core(support.FakeCore):  # type: ignore[misc, name-defined]
        def submit(self, request: Any) -> Any:
            generation = support.Generation(request, self, 0.0)
            generation.deliver(support.Output(0, [97], logprobs=[infinite], finish=support.LENGTH))
            return generation

    body = support.post(Core(core.text_model), PATH, ask(logprobs=True)).json()
    assert body["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


def test_token_ids_and_prompt_logprobs_of_vllm(core: Any, support: Any) -> None:
    """return_token_ids and prompt_logprobs give vLLM's fields."""
    body = support.post(core, PATH, ask(return_token_ids=True, prompt_logprobs=1)).json()
    Chat.model_validate(body)
    assert bytes(body["choices"][0]["token_ids"]) == b"Hello world"
    assert bytes(body["prompt_token_ids"]) == b"user: Hi\nassistant: "
    first, second = body["prompt_logprobs"][:2]
    assert first is None
    assert second[str(ord("s"))] == {"logprob": -0.5, "rank": 2, "decoded_token": "s"}


@pytest.mark.parametrize("path", [PATH, "/v1/completions"])
def test_a_streams_token_ids_are_complete(core: Any, support: Any, path: str) -> None:
    """Tokens that show no text yet (half a character, a special token) are streamed too."""
    core.reply = support.says(b"a\xc3", b"\xa4", b"\xe2", b"\x82", b"\xac")
    body = {"model": "m", "stream": True, "return_token_ids": True, "max_tokens": 6}
    body |= ask() if path == PATH else {"prompt": "Hi"}
    chunks = support.post(core, path, body | {"stream": True}).events()
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    ids = [token_id for choice in choices for token_id in choice.get("token_ids", ())]
    assert bytes(ids) == "a\u00e4\u20ac".encode()


@pytest.mark.parametrize("path", [PATH, "/v1/completions"])
def test_a_stream_refuses_prompt_logprobs(core: Any, support: Any, path: str) -> None:
    """What a stream would not carry is refused by name, not dropped."""
    body = ask() if path == PATH else {"model": "m", "prompt": "Hi"}
    answer = support.post(core, path, {**body, "stream": True, "prompt_logprobs": 1})
    error = answer.json()["error"]
    assert (answer.status, error["param"]) == (400, "prompt_logprobs")
    assert not core.requests


def test_the_body_reaches_the_core(core: Any, support: Any) -> None:
    """Sampling fields, priority, tenant, session and pin arrive as given."""
    support.post(
        core,
        PATH,
        ask(
            temperature=0.5,
            top_p=0.9,
            top_k=-1,
            min_p=0.1,
            typical_p=0.8,
            presence_penalty=1,
            frequency_penalty=-1,
            repetition_penalty=1.5,
            logit_bias={"65": 2},
            seed=-1,
            stop_token_ids=[7],
            min_tokens=2,
            max_completion_tokens=9,
            ignore_eos=True,
            priority=-3,
            user="tenant",
            cache_salt="salt",
        ),
        headers=[
            ("content-type", "application/json; charset=utf-8"),
            ("x-session-id", "s1"),
            ("x-shoal-revision", "r9"),
            ("x-request-id", "mine"),
        ],
    )
    request = core.requests[0]
    sampling = request.sampling
    assert sampling.temperature == 0.5
    assert (sampling.top_p, sampling.top_k, sampling.min_p) == (0.9, 0, 0.1)
    assert (sampling.typical_p, sampling.repetition_penalty) == (0.8, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1)
    assert dict(sampling.logit_bias) == {65: 2.0}
    assert sampling.seed == 2**64 - 1
    assert list(sampling.stop_token_ids) == [7]
    assert (sampling.min_tokens, sampling.max_tokens) == (2, 9)
    assert sampling.ignore_eos
    assert not sampling.HasField("logprobs")
    assert (request.priority, request.tenant, request.salt) == (-3, "tenant", "salt")
    assert (request.session, request.revision) == ("s1", "r9")
    assert request.text is core.text_model


def test_the_model_s_own_defaults_hold_where_the_body_is_silent(
    support: Any, byte_tokenizer: bytes
) -> None:
    """generation_config fills what is not given, and null counts as not given."""
    defaults = support.engine_pb2.Sampling(temperature=0.2, top_p=0.7, max_tokens=3)
    text = support.TextModel.load(support.model(byte_tokenizer, default_sampling=defaults))
    core = support.FakeCore(text)
    support.post(core, PATH, ask(top_p=0.4, temperature=None))
    sampling = core.requests[0].sampling
    assert (sampling.temperature, sampling.top_p) == (0.2, 0.4)
    assert sampling.max_tokens == 512 - len("user: Hi\nassistant: ")


def test_content_parts_and_developer_become_what_templates_know(core: Any, support: Any) -> None:
    """Text parts are joined, developer is system."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be"}, {"role": "user", "content": parts}]
    support.post(core, PATH, ask(messages=messages, add_generation_prompt=False))
    assert bytes(core.requests[0].token_ids) == b"system: be\nuser: a\nb\n"


def test_an_answer_can_be_sent_back_as_a_message(core: Any, support: Any) -> None:
    """Clients append the message they got, with all its fields."""
    message = support.post(core, PATH, ask()).json()["choices"][0]["message"]
    again = [{"role": "user", "content": "Hi"}, message, {"role": "user", "content": "So?"}]
    assert support.post(core, PATH, ask(messages=again)).status == 200


def test_an_error_in_the_middle_of_a_stream_is_an_event(core: Any, support: Any) -> None:
    """The status is out, so the stream says what happened and ends."""
    core.reply = support.says(b"Hel", support.GenerationError(503, "lost", "no replica is left"))
    chunks = support.post(core, PATH, ask(stream=True)).events()
    assert chunks[1]["choices"][0]["delta"]["content"] == "Hel"
    assert chunks[-1] == {
        "error": {
            "message": "no replica is left",
            "type": "server_error",
            "param": None,
            "code": "lost",
        }
    }


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_is_a_status(core: Any, support: Any, stream: bool) -> None:
    """Also for a stream: nothing has been sent."""
    core.reply = support.says(
        support.GenerationError(429, "queue_full", "too many", retry_after=2.5)
    )
    answer = support.post(core, PATH, ask(stream=stream))
    assert answer.status == 429
    assert answer.headers["retry-after"] == "3"
    assert answer.json()["error"]["code"] == "queue_full"


def test_chunks_are_valid_json_for_any_text(core: Any, support: Any) -> None:
    """Quotes, newlines, controls and U+2028 arrive as they are."""
    text = '"\\\n\r\t\x00\x1f\u2028\u2029</script>🎉data: x\n\n'
    core.reply = support.says(*[bytes([byte]) for byte in text.encode()])
    chunks = support.post(core, PATH, ask(stream=True)).events()
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == text
    assert json.loads(json.dumps(chunks))
