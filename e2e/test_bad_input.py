"""Bad input by the hundred: always a 4xx in OpenAI's shape, and the engine serves on."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from e2e.conftest import wait_until

CHAT = {"model": "chat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
COMPLETION = {"model": "chat", "prompt": "hi", "max_tokens": 1}
JUNK: list[Any] = [None, True, -1, 10**9, 1.5, "x", "", [], [None], {}, {"a": 1}, [[]], -(2**70)]
# What OpenAI's own servers take for these fields is not junk.
HARMLESS = {
    (field, json.dumps(value))
    for field, values in {
        "prompt": ["x", ""],
        "stop": ["x", []],
        "stream": [True],
        "echo": [True],
        "user": ["x", ""],
        "seed": [-1, 10**9],
        "logit_bias": [{}],
        "ignore_eos": [True],
        "priority": [-1, 10**9],
    }.items()
    for value in values
}


def _assert_refused(response: httpx.Response, field: str | None = None) -> None:
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["message"]
    if field is not None:
        assert field in error["message"] or field in str(error["param"]), error


def _assert_serves(http: httpx.Client) -> None:
    assert http.post("/v1/completions", json=COMPLETION).status_code == 200


@pytest.fixture(autouse=True)
def _still_serving(http: httpx.Client) -> Iterator[None]:
    """Whatever a test sent, the engine answers afterwards."""
    yield
    _assert_serves(http)


def test_wrong_types_in_every_field_name_the_field(http: httpx.Client) -> None:
    """Each field of both requests with each kind of junk: refused by name, or plainly harmless."""
    schema = http.get("/openapi.json").json()
    sent = 0
    for path, base in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
        body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        name = body["schema"]["$ref"].rsplit("/", 1)[1]
        for field in schema["components"]["schemas"][name]["properties"]:
            for value in JUNK:
                changed = base | {field: value}
                if path == "/v1/chat/completions" and changed["max_tokens"] is None:
                    # Without a limit a chat goes on to the end of the context.
                    changed["max_completion_tokens"] = 1
                response = http.post(path, json=changed)
                sent += 1
                assert response.status_code < 500, (field, value, response.text)
                if response.status_code >= 400:
                    _assert_refused(response, None if field == "model" else field)
                elif not (value is None or (field, json.dumps(value)) in HARMLESS):
                    kind = schema["components"]["schemas"][name]["properties"][field]
                    assert _allows(kind, value), (field, value, kind)
    assert sent > 300


def _allows(schema: dict[str, Any], value: object) -> bool:
    """Whether the published schema itself says that the value is fine, types only."""
    if "$ref" in schema or "enum" in schema or "const" in schema:
        return True
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return any(_allows(option, value) for option in options)
    kinds = {
        "boolean": bool,
        "integer": int,
        "number": (int, float),
        "string": str,
        "array": list,
        "object": dict,
        "null": type(None),
    }
    expected = kinds.get(schema.get("type", ""), object)
    if isinstance(value, bool) and expected is not bool and expected is not object:
        return False
    return isinstance(value, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b'{"model": "chat", "prompt": NaN}', "prompt"),
        (b'{"model": "chat", "prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"model": "chat", "prompt": "x", "top_p": -Infinity}', "top_p"),
        (b'{"model": "chat", "prompt": "\xff\xfe"}', "JSON"),
        (b"[" * 100_000, "JSON"),
        (b"[]", "object"),
        (b'{"model": "chat", "prompt": "\\ud800"}', ""),
    ],
)
def test_broken_bodies(http: httpx.Client, body: bytes, says: str) -> None:
    """What is not JSON, or not an object, or not UTF-8, is refused with a sentence."""
    response = http.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    _assert_refused(response)
    assert says in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"temperature": -1}, ["temperature", "-1"]),
        ({"top_p": 0}, ["top_p", "0"]),
        ({"top_p": 1.5}, ["top_p", "1.5"]),
        ({"n": 100_000}, ["n", "100000", "128"]),
        ({"max_tokens": -1}, ["max_tokens", "-1"]),
        ({"max_tokens": 100_000}, ["max_tokens", "100000", "1024"]),
        ({"prompt": "word " * 5_000}, ["1024"]),
        ({"prompt": "x" * 5_000_000}, ["1024"]),
        ({"prompt": [1] * 5_000}, ["5000", "1024"]),
        ({"prompt": [10**6]}, ["1000000", "49152"]),
        ({"prompt": [-1]}, ["-1"]),
        ({"prompt": []}, ["prompt"]),
        ({"logit_bias": {"99999999": 1}}, ["logit_bias", "99999999"]),
        ({"logit_bias": {"5": 1000}}, ["logit_bias", "1000", "100"]),
        ({"presence_penalty": 3}, ["presence_penalty", "3", "2"]),
        ({"logprobs": 1000}, ["logprobs", "1000"]),
        ({"stop": ["a"] * 100}, ["stop"]),
        ({"temperatur": 1}, ["temperatur", "temperature"]),
        ({"min_tokens": 9, "max_tokens": 3}, ["min_tokens", "9", "3"]),
        ({"suffix": "x"}, ["suffix"]),
    ],
)
def test_limits_are_named(http: httpx.Client, change: dict[str, Any], says: list[str]) -> None:
    """Field, value and limit stand in the message."""
    response = http.post("/v1/completions", json=COMPLETION | change)
    _assert_refused(response)
    message = response.json()["error"]["message"]
    assert all(word in message for word in says), message


def test_features_not_built_are_refused_by_name(http: httpx.Client) -> None:
    """Tools and response formats are named, never ignored."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for field, value in (
        ("tools", [tool]),
        ("response_format", {"type": "json_object"}),
        ("functions", [{"name": "f"}]),
    ):
        response = http.post("/v1/chat/completions", json=CHAT | {field: value})
        _assert_refused(response, field)


def test_ten_megabytes_are_too_many(http: httpx.Client) -> None:
    """A body over the limit is a 413 that names the limit."""
    response = http.post(
        "/v1/completions",
        content=b'{"model": "chat", "prompt": "' + b"x" * 11_000_000 + b'"}',
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 413, response.text
    _assert_refused(response)
    assert "10" in response.json()["error"]["message"]


def test_wrong_paths_and_methods(http: httpx.Client) -> None:
    """404 and 405 come in OpenAI's shape too."""
    assert http.get("/v1/nothing").status_code == 404
    _assert_refused(http.get("/v1/nothing"))
    assert http.get("/v1/completions").status_code == 405
    _assert_refused(http.get("/v1/completions"))


def test_half_open_and_slow_sockets_disturb_nobody(two_replicas: Any, http: httpx.Client) -> None:
    """Fifty clients that stop in the middle of a request leave the router answering at once."""
    sockets = []
    for index in range(50):
        sock = socket.create_connection(("127.0.0.1", two_replicas.http_port))
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
            b"content-type: application/json\r\ncontent-length: 1000\r\n\r\n" + b"{" * index
        )
        sockets.append(sock)
    _assert_serves(http)
    for sock in sockets:
        sock.close()


def _running(platform: Any) -> float:
    """Sequences that run on all workers, as their metrics tell."""
    running = 0.0
    for worker in platform.get("pods"):
        if worker["service"] == "chat":
            text = httpx.get(f"http://127.0.0.1:{worker['ports']['metrics']}/metrics").text
            running += sum(
                float(line.rsplit(" ", 1)[1])
                for line in text.splitlines()
                if line.startswith("shoal_requests_running")
            )
    return running


def _begin_stream(port: int) -> socket.socket:
    """A raw client whose long answer has begun."""
    fields = {"max_tokens": 900, "stream": True, "ignore_eos": True, "temperature": 0}
    body = json.dumps(COMPLETION | fields).encode()
    sock = socket.create_connection(("127.0.0.1", port))
    head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + head + body)
    assert sock.recv(100)
    return sock


def test_clients_that_hang_up_free_their_blocks(two_replicas: Any) -> None:
    """Clients that close their socket in the middle of a stream leave nothing running."""
    for sock in [_begin_stream(two_replicas.http_port) for _ in range(8)]:
        sock.close()
    wait_until(lambda: _running(two_replicas) == 0, 5, "nothing runs for clients that are gone")


def test_clients_that_stop_reading_delay_nobody(two_replicas: Any, http: httpx.Client) -> None:
    """Readers that stall hold up neither the engine nor other clients' answers."""
    sockets = [_begin_stream(two_replicas.http_port) for _ in range(4)]
    for _ in range(3):
        _assert_serves(http)
    for sock in sockets:
        sock.close()
    wait_until(lambda: _running(two_replicas) == 0, 5, "nothing runs for clients that are gone")


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_schemathesis_finds_no_server_error(
    two_replicas: Any, mode: schemathesis.GenerationMode
) -> None:
    """Requests generated from /openapi.json, valid ones and broken ones, never meet a 5xx."""
    schema = schemathesis.openapi.from_url(f"{two_replicas.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 8
    if mode is schemathesis.GenerationMode.NEGATIVE:  # a request without a part has none to break
        operations = [operation for operation in operations if len(operation.body)]
    seen = 0
    for operation in operations:

        @settings(
            max_examples=40,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def call(case: schemathesis.Case) -> None:
            nonlocal seen
            if isinstance(case.body, dict) and case.path.startswith("/v1/"):
                case.body["max_tokens"] = 1  # how much is generated is not the point here
            response = case.call(base_url=two_replicas.url, timeout=60)
            seen += 1
            assert response.status_code < 500, (case.path, case.body, response.text)
            if response.status_code >= 400:
                assert response.json()["error"]["message"]

        call()
    assert seen > 100
