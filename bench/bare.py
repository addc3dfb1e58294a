"""The least that a Python process can do for a streamed answer: the router's own limit here.

A raw ASGI app on the router's HTTP server (uvicorn, uvloop, httptools) that reads the body and
streams a fixed answer: no parsing, tokenizer, policy, engine or metrics.

    python -m bench.bare --port 8080
"""

import argparse

import uvicorn

EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"%s"}}]}\n\n' % (b"token " * 16)
HEADERS = [(b"content-type", b"text/event-stream")]


async def app(scope, receive, send):  # type: ignore[no-untyped-def]
    """Answers any request."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": EVENT, "more_body": True})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args().port
    uvicorn.run(app, port=port, log_level="error", access_log=False, loop="uvloop", lifespan="off")


if __name__ == "__main__":
    main()
