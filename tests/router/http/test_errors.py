"""Bad input: always 4xx in OpenAI's shape, naming field, value and limit."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from shoal.router.http.openapi import build
from shoal.router.http.responses import Error

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "m", "prompt": "Hi"},
    "/tokenize": {"model": "m", "prompt": "Hi"},
    "/detokenize": {"model": "m", "tokens": [72]},
}
WRONG: tuple[object, ...] = (
    True,
    -1,
    1.5,
    10**30,
    "x",
    "",
    [],
    [None],
    [[]],
    [True],
    {},
    {"x": 1},
    {"1": "x"},
)


def refused(answer: Any, status: int = 400) -> dict[str, Any]:
    """The error of an answer that must be one."""
    assert answer.status == status, answer.body
    document = answer.json()
    Error.model_validate(document)
    assert document["error"]["message"]
    error: dict[str, Any] = document["error"]
    return error


@pytest.mark.parametrize("path", VALID)
def test_every_field_of_the_schema_refuses_wrong_types(core: Any, support: Any, path: str) -> None:
    """Hundreds of bodies from the schema itself: what it does not allow is a 4xx that names
    the field, what it allows is answered, and nothing is ever a 5xx."""
    document = build()
    content = document["paths"][path]["post"]["requestBody"]["content"]
    name = content["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
    fields = document["components"]["schemas"][name]["properties"]
    for field in fields:
        for value in WRONG:
            answer = support.post(core, path, {**VALID[path], field: value})
            assert answer.status == 200 or 400 <= answer.status < 500, (field, value)
            if answer.status != 200:
                error = refused(answer, answer.status)
                named = (error["param"] or "") + error["message"]
                assert field in named, (field, value, error)
    assert len(fields) * len(WRONG) >= 26


CASES: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
    ({"temperature": 2.5}, "temperature", ("2.5", "2")),
    ({"top_p": 0}, "top_p", ("0", "greater than 0")),
    ({"n": 129}, "n", ("129", "128")),
    ({"n": "2"}, "n", ("integer", '"2"')),
    ({"max_tokens": 0}, "max_tokens", ("0", "1")),
    ({"max_tokens": 500}, "max_tokens", ("500", "512", "20")),
    ({"max_completion_tokens": 500}, "max_completion_tokens", ("500", "512")),
    ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", ("9", "3")),
    ({"max_token": 5}, "max_token", ("did you mean max_tokens",)),
    ({"logit_bias": {"300": 1}}, "logit_bias", ("300", "257")),
    ({"logit_bias": {"5": 200}}, "logit_bias.5", ("200", "100")),
    ({"logit_bias": {"x": 1}}, "logit_bias.x", ("x",)),
    ({"stop_token_ids": [257]}, "stop_token_ids", ("257",)),
    ({"stop": ["a", ""]}, "stop[1]", ("1",)),
    ({"stop": 3}, "stop", ("string",)),
    ({"top_logprobs": 3}, "top_logprobs", ("3", "logprobs")),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", ("21", "20")),
    ({"stream_options": {}}, "stream_options", ("stream",)),
    ({"messages": []}, "messages", ("1",)),
    ({"messages": [{"role": "user"}]}, "messages[0].content", ("required",)),
    ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role", ("robot", "user")),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", ("string", "5")),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages", ("618", "512")),
    ({"messages": [{"role": "user", "content": "x" * 9000}]}, "messages", ("at least", "512")),
    ({"tools": [{"type": "function"}]}, "tools", ("not supported yet",)),
    ({"tool_choice": "auto"}, "tool_choice", ("not supported yet",)),
    ({"response_format": {"type": "json_object"}}, "response_format", ("not supported yet",)),
    ({"modalities": ["audio"]}, "modalities", ("not supported yet",)),
    (
        {"messages": [{"role": "tool", "content": ""}]},
        "messages[0].role",
        ("not supported yet",),
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
        ("not supported yet", "image_url"),
    ),
]


@pytest.mark.parametrize(("change", "param", "words"), CASES)
def test_messages_name_field_value_and_limit(
    core: Any, support: Any, change: dict[str, Any], param: str, words: tuple[str, ...]
) -> None:
    """Someone who reads the message can mend the request."""
    error = refused(support.post(core, "/v1/chat/completions", {**CHAT, **change}))
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["code"]
    for word in (*words, param.split("[")[0].split(".")[0]):
        assert word in error["message"], error["message"]
    assert not core.requests


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[1], []]}, "prompt[1]"),
        ({"prompt": [1, 257]}, "prompt"),
        ({"prompt": [[1], [900]]}, "prompt[1]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [1] * 512}, "prompt"),
        ({"prompt": ["a"] * 1000, "n": 128}, "prompt"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"messages": []}, "messages"),
    ],
)
def test_completions_refuse_by_name(
    core: Any, support: Any, change: dict[str, Any], param: str
) -> None:
    """The same for what completions alone have."""
    error = refused(support.post(core, "/v1/completions", {"model": "m", "prompt": "Hi", **change}))
    assert error["param"] == param
    assert not core.requests


RAW = [
    b"",
    b"null",
    b"[]",
    b"{",
    b'{"model": "m",}',
    b"\xff\xfe",
    b'{"model": "m", "messages": [{"role": "user", "content": "\xff"}]}',
    b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"model": "m", "prompt": "x", "messages": [], "temperature": NaN}',
    b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
    b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": -1e999}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"9" * 10_000,
    b"{" + b",".join(b'"k%d":1' % i for i in range(5000)) + b"}",
]


@pytest.mark.parametrize("body", RAW, ids=range(len(RAW)))
@pytest.mark.parametrize("path", VALID)
def test_what_is_no_json_is_400(core: Any, support: Any, path: str, body: bytes) -> None:
    """Broken UTF-8, NaN, lone surrogates, depth, thousands of unknown keys."""
    refused(support.post(core, path, body))


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("/v1/chat/completions", {"n": 2.0, "seed": 1e3, "stop_token_ids": [7.0]}),
        ("/v1/completions", {"prompt": [72.0, 105]}),
        ("/v1/completions", {"prompt": [[72], [105.0]]}),
        ("/detokenize", {"tokens": [72.0]}),
    ],
)
def test_integers_may_be_written_as_numbers(
    core: Any, support: Any, path: str, change: dict[str, Any]
) -> None:
    """JSON does not tell 2.0 from 2, nor do JavaScript clients."""
    assert support.post(core, path, {**VALID[path], **change}).status == 200


def mutations(value: Any) -> Iterator[Any]:
    """Copies of a document with one place replaced by something else."""
    if isinstance(value, dict):
        for key in value:
            for changed in mutations(value[key]):
                yield {**value, key: changed}
            yield {k: v for k, v in value.items() if k != key}
    elif isinstance(value, list):
        for place in range(len(value)):
            for changed in mutations(value[place]):
                yield [*value[:place], changed, *value[place + 1 :]]
    yield from copy.deepcopy(WRONG)


def test_no_mutation_of_a_full_body_is_a_server_s_fault(core: Any, support: Any) -> None:
    """A body with every kind of value, each place replaced in turn."""
    body = {
        **CHAT,
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "a"}]},
            {"role": "user", "content": "b", "name": "c"},
        ],
        "stream_options": {"include_usage": True},
        "stream": True,
        "logit_bias": {"1": 2},
        "stop": ["x"],
        "logprobs": True,
        "top_logprobs": 1,
        "n": 2,
    }
    statuses = [
        support.post(core, "/v1/chat/completions", changed).status for changed in mutations(body)
    ]
    assert len(statuses) > 200
    assert set(statuses) <= {200, 400, 404}
    assert statuses.count(400) > 150


def test_an_unknown_model_is_404(core: Any, support: Any) -> None:
    """And the message names those that are served."""
    error = refused(support.post(core, "/v1/chat/completions", {**CHAT, "model": "gpt"}), 404)
    assert error["code"] == "model_not_found"
    assert "gpt" in error["message"]
    assert "m, alias" in error["message"]


def test_other_content_types_are_415(core: Any, support: Any) -> None:
    """A form or nothing at all is not JSON."""
    for headers in ([], [("content-type", "application/x-www-form-urlencoded")]):
        answer = support.post(core, "/v1/chat/completions", CHAT, headers=headers)
        assert "application/json" in refused(answer, 415)["message"]


def test_long_bodies_are_413(core: Any, support: Any) -> None:
    """By their declared length before they are read, by their real one while they are."""
    small = support.HttpSettings(max_body_bytes=100)
    app = support.create_app(core, small)
    json_type = ("content-type", "application/json")
    path = "/v1/chat/completions"
    declared = support.call(
        app, "POST", path, b"", headers=[json_type, ("content-length", "101")], pieces=[]
    )
    assert "101" in refused(declared, 413)["message"]
    chunked = support.call(app, "POST", path, pieces=[b"x" * 60, b"x" * 60, b"x" * 60])
    assert "100" in refused(chunked, 413)["message"]
    assert chunked.headers["connection"] == "close"
    refused(support.call(app, "POST", path, b"x" * 101), 413)


def test_a_prompt_that_cannot_fit_is_not_tokenized(
    core: Any, support: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its length alone says so."""

    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(support.TextModel, "encode", fail)
    body = {"model": "m", "prompt": "x" * 100_000}
    error = refused(support.post(core, "/v1/completions", body))
    assert error["code"] == "context_length_exceeded"


def test_a_bug_is_a_500_in_shape(core: Any, support: Any) -> None:
    """And does not tell the client what broke."""

    def broken(request: object, index: int) -> Any:
        raise RuntimeError("secret")

    core.reply = broken
    answer = support.post(core, "/v1/chat/completions", CHAT)
    assert refused(answer, 500)["type"] == "server_error"
    assert b"secret" not in answer.body


@pytest.mark.parametrize("status", [404, 429, 503])
def test_the_core_s_refusals_keep_status_and_code(core: Any, support: Any, status: int) -> None:
    """With Retry-After where the core knows it."""
    core.refuse = support.GenerationError(status, "why", "because", retry_after=0.2)
    answer = support.post(core, "/v1/completions", {"model": "m", "prompt": "x"})
    assert refused(answer, status)["code"] == "why"
    assert answer.headers["retry-after"] == "1"


def test_errors_survive_json(core: Any, support: Any) -> None:
    """A field name that is itself hostile is quoted properly."""
    name = '"};<script>\u2028'
    error = refused(support.post(core, "/v1/completions", {"model": "m", "prompt": "", name: 1}))
    assert name in json.loads(json.dumps(error))["message"]


@pytest.mark.parametrize(("value", "words"), [("NaN", "not a number (NaN)"), ("1e400", "Infinity")])
def test_what_is_no_number_is_shown_as_given(
    core: Any, support: Any, value: str, words: str
) -> None:
    """The message repeats NaN and infinities, which JSON would write as null."""
    raw = f'{{"model": "m", "prompt": "x", "n": {value}}}'.encode()
    error = refused(support.post(core, "/v1/completions", raw))
    assert words in error["message"]
