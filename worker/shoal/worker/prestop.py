"""`python -m shoal.worker.prestop`: drains the engine of this pod, before the kubelet ends it.

The container's preStop hook. New requests are refused at once (routers send them elsewhere),
those in flight may finish within the deadline; what is left then continues on other replicas.
It always ends with 0 in bounded time: the kubelet's next step is SIGTERM either way.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Final

import grpc

from shoal.api import names
from shoal.api.v1 import engine_pb2, engine_pb2_grpc

MARGIN_SECONDS: Final = 2.0  # for the answer, beyond the drain itself


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """Returns the exit code: 0, or 2 for wrong usage."""
    args = _parser(environ).parse_args(argv)
    print(drain(f"{args.host}:{args.port}", args.drain_seconds), flush=True)
    return 0


def drain(address: str, seconds: float) -> str:
    """Drains the engine at `address`; what came of it, in words."""
    started = time.monotonic()
    with grpc.insecure_channel(address) as channel:
        stub = engine_pb2_grpc.EngineStub(channel)
        try:
            request = engine_pb2.DrainRequest(deadline_seconds=seconds)
            answer = stub.Drain(request, timeout=seconds + MARGIN_SECONDS)
        except grpc.RpcError as error:
            return f"nothing is drained: the engine at {address} says {_reason(error)}"
    took = time.monotonic() - started
    if answer.unfinished:
        return f"{answer.unfinished} sequences are left after {took:.1f} s"
    return f"drained in {took:.1f} s"


def _reason(error: grpc.RpcError) -> str:
    if isinstance(error, grpc.Call):
        return f"{error.code().name}: {error.details()}"
    return str(error)


def _parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m shoal.worker.prestop",
        description="Drain the engine that serves here.",
    )
    port = environ.get(names.ENV_PORT) or str(names.PORT_ENGINE_GRPC)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="where the engine listens; default: 127.0.0.1")
    add("--port", type=int, default=port, help=f"its port; default: ${names.ENV_PORT} or 9000")
    add(
        "--drain-seconds",
        type=_seconds,
        default=60.0,
        help="how long requests in flight may go on; default: 60",
    )
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a time: it must be 0 seconds or more")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
