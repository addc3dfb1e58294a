"""Routes, methods, health, metrics, tokenizing, the API document; then real sockets."""

import asyncio
import json
import socket
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shoal.router.http import server
from shoal.router.http.app import ROUTES
from shoal.router.http.openapi import build
from shoal.router.http.responses import Error, Model, ModelList, Tokenized

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def test_models_are_listed_and_named(core: Any, support: Any) -> None:
    """Aliases too; another name is a 404."""
    app = support.create_app(core)
    listed = support.call(app, "GET", "/v1/models").json()
    ModelList.model_validate(listed)
    assert [model["id"] for model in listed["data"]] == ["m", "alias"]
    Model.model_validate(support.call(app, "GET", "/v1/models/alias").json())
    missing = support.call(app, "GET", "/v1/models/org/other")
    assert missing.status == 404
    assert "org/other" in missing.json()["error"]["message"]


def test_tokenize_and_detokenize(core: Any, support: Any) -> None:
    """vLLM's shapes, for text and for chats."""
    app = support.create_app(core)
    answer = support.call(
        app, "POST", "/tokenize", {"model": "m", "prompt": "é", "return_token_strs": True}
    ).json()
    Tokenized.model_validate(answer)
    assert answer == {
        "count": 2,
        "max_model_len": 512,
        "tokens": [0xC3, 0xA9],
        "token_strs": ["bytes:\\xc3", "bytes:\\xa9"],
    }
    chat = support.call(app, "POST", "/tokenize", CHAT).json()
    back = support.call(app, "POST", "/detokenize", {"model": "m", "tokens": chat["tokens"]})
    assert back.json() == {"prompt": "user: Hi\nassistant: "}
    assert support.call(app, "POST", "/tokenize", {"model": "m", "prompt": ""}).json()["count"] == 0
    assert support.call(app, "POST", "/tokenize", {"model": "m"}).status == 400
    both = {"prompt": "x", **CHAT}
    assert support.call(app, "POST", "/tokenize", both).status == 400
    beyond = {"model": "m", "tokens": [257]}
    assert support.call(app, "POST", "/detokenize", beyond).status == 400


def test_health_and_readiness_differ(core: Any, support: Any) -> None:
    """A router that knows no route yet is alive and not ready."""
    core.is_ready = False
    app = support.create_app(core)
    assert support.call(app, "GET", "/health").status == 200
    assert support.call(app, "GET", "/ready").status == 503
    core.is_ready = True
    assert support.call(app, "GET", "/ready").status == 200


def test_metrics_are_prometheus_text(core: Any, support: Any) -> None:
    """A parser of the format reads them."""
    support.post(core, "/v1/chat/completions", CHAT)
    answer = support.call(support.create_app(core), "GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    families = {f.name: f for f in text_string_to_metric_families(answer.body.decode())}
    assert families["shoal_requests"].samples[0].value == 1


def test_methods_and_paths(core: Any, support: Any) -> None:
    """HEAD has GET's headers, OPTIONS and 405 tell what is allowed, the rest is 404 in shape."""
    app = support.create_app(core)
    got = support.call(app, "GET", "/v1/models")
    head = support.call(app, "HEAD", "/v1/models")
    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-length"] == got.headers["content-length"]
    options = support.call(app, "OPTIONS", "/v1/chat/completions")
    assert (options.status, options.headers["allow"]) == (204, "POST, OPTIONS")
    for method, path in [("GET", "/v1/completions"), ("HEAD", "/tokenize"), ("PUT", "/health")]:
        answer = support.call(app, method, path)
        assert answer.status == 405
        assert "OPTIONS" in answer.headers["allow"]
    for path in ["/v1", "/v1/models/", "/nope", "/v1/chat/completions/"]:
        answer = support.call(app, "GET", path)
        assert answer.status == 404
        Error.model_validate(answer.json())


def test_request_ids_come_back(core: Any, support: Any) -> None:
    """The client's own where it is fit for a header, else a new one."""
    app = support.create_app(core, new_id=lambda: "fresh")
    for given, expected in [("abc", "abc"), ("", "fresh"), ("x" * 200, "fresh"), ("a\tb", "fresh")]:
        answer = support.call(app, "GET", "/health", headers=[("x-request-id", given)])
        assert answer.headers["x-request-id"] == expected


def test_the_document_names_every_route(core: Any, support: Any) -> None:
    """/openapi.json is valid JSON with all endpoints, strict bodies and bounds."""
    app = support.create_app(core)
    document = support.call(app, "GET", "/openapi.json").json()
    assert document == json.loads(json.dumps(build()))
    undocumented = {"/", "/docs", "/openapi.json"}
    assert set(document["paths"]) == {*ROUTES, "/v1/models/{model}"} - undocumented
    schemas = document["components"]["schemas"]
    for name, schema in schemas.items():
        assert schema["additionalProperties"] is False, name
    references = set(json.dumps(document).split('"#/components/schemas/')[1:])
    assert {reference.split('"')[0] for reference in references} <= set(schemas)
    n = schemas["ChatBody"]["properties"]["n"]["anyOf"][0]
    assert (n["minimum"], n["maximum"]) == (1, 128)


def test_the_pages_stand_alone(core: Any, support: Any) -> None:
    """/docs loads nothing from elsewhere; / lists the endpoints."""
    app = support.create_app(core)
    page = support.call(app, "GET", "/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert b"http://" not in page.body.replace(b"http://www.w3.org", b"")
    assert b"https://" not in page.body
    assert b"src=" not in page.body
    index = support.call(app, "GET", "/").json()
    assert {path for path in ROUTES if path != "/"} == set(index["endpoints"])


async def _raw(port: int, *data: bytes, half_close: bool = False) -> bytes:
    """Everything that the server answers to these bytes until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in data:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.02)
        if half_close:
            writer.write_eof()
        async with asyncio.timeout(20):
            return await reader.read()
    finally:
        writer.close()


def _post(body: bytes, *headers: bytes) -> bytes:
    lines = [b"POST /v1/chat/completions HTTP/1.1", b"host: x", b"content-type: application/json"]
    return b"\r\n".join([*lines, b"content-length: %d" % len(body), *headers, b"", body])


def _error(raw: bytes, status: int) -> dict[str, Any]:
    head, _, body = raw.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), raw
    document: dict[str, Any] = json.loads(body)
    Error.model_validate(document)
    return document


def test_a_client_that_hangs_up_cancels(core: Any, support: Any) -> None:
    """Streaming or not, the core hears of it, and the server serves on."""
    core.reply, core.hang = support.says(b"x"), True

    async def main() -> None:
        async with support.served(core) as port:
            for stream in (True, False):
                core.cancelled.clear()
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(_post(json.dumps({**CHAT, "stream": stream}).encode()))
                if stream:
                    await reader.readuntil(b'"content":"x"')
                else:
                    while len(core.requests) < 2:  # noqa: ASYNC110 (the core's list)
                        await asyncio.sleep(0.01)
                writer.close()
                async with asyncio.timeout(20):
                    while core.cancelled != [None]:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
            assert b"200 OK" in await _raw(port, b"GET /health HTTP/1.0\r\n\r\n")

    asyncio.run(main())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_a_client_that_hangs_up_before_there_is_a_model(
    core: Any, support: Any, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its wait for a first replica ends, so that its place is free, and nothing is logged."""
    waiting: list[str] = []

    class Starting(support.FakeCore):  # type: ignore[misc, name-defined]
        async def text(self, service: str, timeout: float | None = None) -> Any:  # noqa: ASYNC109
            waiting.append(service)
            try:
                await asyncio.Event().wait()
            finally:
                waiting.remove(service)

    async def main() -> None:
        async with support.served(Starting(core.text_model)) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            body = CHAT if "chat" in path else {"model": "m", "prompt": "x"}
            writer.write(
                _post(json.dumps(body).encode()).replace(b"/v1/chat/completions", path.encode())
            )
            async with asyncio.timeout(20):
                while not waiting:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                writer.close()
                while waiting:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert b"200 OK" in await _raw(port, b"GET /health HTTP/1.0\r\n\r\n")

    asyncio.run(main())
    assert not caplog.records


def test_slow_and_broken_clients(core: Any, support: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ends after a bound with an answer in shape, and the server serves on."""
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.2)
    settings = support.HttpSettings(body_timeout_seconds=0.2)

    async def main() -> None:
        async with support.served(core, settings) as port:
            slow_body = await _raw(port, _post(b"{}").replace(b"length: 2", b"length: 9"))
            assert "0.2" in _error(slow_body, 408)["error"]["message"]
            chunked = _post(b"", b"transfer-encoding: chunked").replace(
                b"content-length: 0\r\n", b""
            )
            _error(await _raw(port, chunked + b"5\r\nhello\r\n"), 408)
            _error(await _raw(port, b"POST /v1/completions HTTP/1.1\r\nhost:"), 408)
            assert await _raw(port, b"") == b""
            _error(await _raw(port, b"what is this\r\n\r\n"), 400)
            _error(await _raw(port, b"GET / HTTP/1.1\r\nx: ", b"y" * 65_000, b"y" * 2000), 431)
            await _raw(port, _post(b"{}").replace(b"length: 2", b"length: 9"), half_close=True)
            assert b"200 OK" in await _raw(port, b"GET /health HTTP/1.0\r\n\r\n")

    asyncio.run(main())


def test_a_client_that_does_not_read_is_dropped(
    core: Any, support: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot hold its answer in memory for ever."""
    monkeypatch.setattr(server, "STALL_SECONDS", 0.2)
    text = support.TextModel.load(
        support.model(core.text_model.model.tokenizer.tokenizer_json, max_model_len=1 << 24)
    )
    big = support.FakeCore(text, reply=support.says(*[b"x" * 100_000] * 100), hang=True)

    async def main() -> None:
        async with support.served(big) as port:
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, ("127.0.0.1", port))
            await loop.sock_sendall(client, _post(json.dumps({**CHAT, "stream": True}).encode()))
            async with asyncio.timeout(20):
                while big.cancelled != [None]:  # noqa: ASYNC110 (the core's list)
                    await asyncio.sleep(0.01)
            client.close()

    asyncio.run(main())


def test_keep_alive_serves_one_request_after_another(core: Any, support: Any) -> None:
    """An error does not end the connection; an answer of known length keeps it."""

    async def main() -> None:
        async with support.served(core) as port:
            bad, good = _post(b"{}"), _post(json.dumps(CHAT).encode(), b"connection: close")
            raw = await _raw(port, bad + bad + good)
            assert raw.count(b"HTTP/1.1 400") == 2
            assert raw.count(b"HTTP/1.1 200") == 1

    asyncio.run(main())


def test_streams_follow_one_another_on_a_connection(core: Any, support: Any) -> None:
    """Requests that come at once are streamed one after the other, each whole, and the connection
    ends where a request asked for that."""

    async def main() -> None:
        async with support.served(core) as port:
            body = json.dumps({**CHAT, "stream": True}).encode()
            raw = await _raw(port, _post(body) + _post(body) + _post(body, b"connection: close"))
            answers = raw.split(b"HTTP/1.1 200 OK\r\n")[1:]
            assert len(answers) == 3
            for answer in answers:
                head, _, chunks = answer.partition(b"\r\n\r\n")
                names = [line.partition(b":")[0] for line in head.lower().split(b"\r\n")]
                assert names.count(b"x-request-id") == names.count(b"transfer-encoding") == 1
                assert (b"connection: close" in head) == (answer is answers[-1])
                assert chunks.count(b"data: [DONE]") == 1
                assert chunks.endswith(b"\r\n0\r\n\r\n")

    asyncio.run(main())
