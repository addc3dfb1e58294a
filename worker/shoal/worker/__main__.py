"""`python -m shoal.worker`: one engine behind a gRPC port.

    listen -> load -> serve -> (SIGTERM) drain -> exit

The port answers health checks from the first moment, NOT_SERVING until the model is loaded.
SIGTERM or SIGINT drains, a second one ends the process at once.
"""

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Never

import psutil

from shoal.api import names
from shoal.api.lifeline import watch_lifeline
from shoal.worker import last_words, logs
from shoal.worker.config import EngineConfig, ParallelConfig
from shoal.worker.executor import DeviceLost
from shoal.worker.faults import Faults
from shoal.worker.flags import (
    add_engine_flags,
    add_parallel_flags,
    engine_config,
    parallel_config,
)
from shoal.worker.host import share_cores
from shoal.worker.logs import event
from shoal.worker.metrics import WorkerMetrics
from shoal.worker.server import EngineServer, ListenError, ServerSettings
from shoal.worker.sources import SourceError
from shoal.worker.startup import Loaded, ModelChoice, Phases, load

log = logging.getLogger("shoal.worker")


@dataclass(frozen=True, slots=True)
class Options:
    choice: ModelChoice
    config: EngineConfig
    parallel: ParallelConfig
    log_format: str
    server: ServerSettings
    metrics_port: int
    pod_name: str
    drain_seconds: float
    faults: Faults


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until a signal; returns the exit code: 0 drained, 1 failed, 2 wrong usage."""
    parser = _parser(os.environ)
    args = parser.parse_args(argv)
    try:
        parallel = parallel_config(args)
    except ValueError as error:
        parser.error(str(error))
    logs.configure(args.log_format, sys.stdout, args.log_level)
    watch_lifeline()
    share_cores()
    options = Options(
        choice=ModelChoice(
            args.model, args.model_revision, args.revision, args.cache_dir, args.packed_cache
        ),
        config=engine_config(args),
        parallel=parallel,
        log_format=args.log_format,
        server=ServerSettings(args.host, args.port, stall_seconds=args.stall_seconds),
        metrics_port=args.metrics_port,
        pod_name=args.pod_name,
        drain_seconds=args.drain_seconds,
        faults=Faults(args.inject_step_delay_ms / 1e3, args.inject_failure_rate),
    )
    return asyncio.run(run(options))


async def run(options: Options) -> int:
    """The worker's life."""
    started = time.monotonic()
    stop = _stop_on_signals()
    metrics = WorkerMetrics()
    phases = Phases(metrics.phase)
    phases.over("boot", max(0.0, time.time() - psutil.Process().create_time()))
    server = EngineServer(options.server)
    try:
        with phases.phase("listen"):
            await server.start()
            web, metrics_port = metrics.listen(options.server.host, options.metrics_port)
    except OSError as error:
        _fatal(_listen_problem(error, options))
        await server.stop()
        return 1
    event(log, "listening", grpc=server.address, metrics=f"{options.server.host}:{metrics_port}")
    try:
        loading = asyncio.create_task(
            asyncio.to_thread(
                load,
                options.choice,
                options.config,
                phases,
                metrics.swapped,
                options.parallel,
                options.log_format,
                options.faults,
            )
        )
        await asyncio.wait((loading, stop), return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            _exit(0, "stopped while loading")  # a thread that loads cannot be called back
        loaded = _result(loading)
        if loaded is None:
            return 1
        server.serve(loaded.engine, loaded.model, metrics.observe, loaded.swapper)
        # What start-up made stays for good: the collector need not walk it again.
        gc.collect()
        gc.freeze()
        event(log, "ready", seconds=round(time.monotonic() - started, 3), **_pod(options))
        return await _serve_until(stop, server, options.drain_seconds)
    finally:
        await server.stop()
        await asyncio.to_thread(web.shutdown)
        web.server_close()


async def _serve_until(
    stop: asyncio.Future[int], server: EngineServer, drain_seconds: float
) -> int:
    failed = asyncio.create_task(server.failed.wait())
    await asyncio.wait((stop, failed), return_when=asyncio.FIRST_COMPLETED)
    if failed.done():
        _fatal(server.failure)
        return 1
    failed.cancel()
    event(log, "draining", deadline=drain_seconds)
    unfinished = await server.drain(drain_seconds)
    event(log, "stopped", unfinished=unfinished)
    return 0


def _pod(options: Options) -> dict[str, str]:
    return {"pod": options.pod_name} if options.pod_name else {}


def _result(loading: asyncio.Task[Loaded]) -> Loaded | None:
    """What was loaded, or None once the log says why nothing was."""
    try:
        return loading.result()
    except (SourceError, ValueError, OSError, MemoryError, DeviceLost) as error:
        _fatal(f"cannot serve: {str(error) or type(error).__name__}")
        log.debug("the traceback", exc_info=error)
    except Exception as error:
        log.exception("cannot serve")
        last_words.say(f"cannot serve: {type(error).__name__}: {error}")
    return None


def _fatal(words: str) -> None:
    """Why this process ends: for the log, and for the pod's status."""
    log.error("%s", words)
    last_words.say(words)


def _stop_on_signals() -> asyncio.Future[int]:
    """Resolved by the first SIGTERM or SIGINT; the second ends the process."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[int] = loop.create_future()

    def on_signal(number: int) -> None:
        if stop.done():
            _exit(128 + number, "stopped at once")
        stop.set_result(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stop


def _exit(code: int, words: str) -> Never:
    event(log, words)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


def _listen_problem(error: OSError, options: Options) -> str:
    if isinstance(error, ListenError):
        return str(error)
    return (
        f"cannot serve metrics on {options.server.host}:{options.metrics_port}: {error.strerror};"
        f" choose another with --metrics-port or {names.ENV_METRICS_PORT} (0 is any free port)"
    )


def _parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m shoal.worker",
        description="Serve one model on this machine's device over gRPC.",
    )

    def from_env(name: str, default: str) -> str:
        return environ.get(name) or default

    add = parser.add_argument
    add("--model", required=True, help="py://, hf:// or file:// URI, or a path")
    add("--model-revision", help="package version, or branch, tag or commit of a Hub model")
    add(
        "--host",
        default=from_env(names.ENV_HOST, "127.0.0.1"),
        help=f"address to listen on; default: ${names.ENV_HOST} or 127.0.0.1",
    )
    add(
        "--port",
        type=_port,
        default=from_env(names.ENV_PORT, str(names.PORT_ENGINE_GRPC)),
        help=f"of gRPC, 0 for a free one; default: ${names.ENV_PORT} or {names.PORT_ENGINE_GRPC}",
    )
    add(
        "--metrics-port",
        type=_port,
        default=from_env(names.ENV_METRICS_PORT, str(names.PORT_ENGINE_METRICS)),
        help=f"0 for a free one; default: ${names.ENV_METRICS_PORT} or {names.PORT_ENGINE_METRICS}",
    )
    add(
        "--revision",
        default=from_env(names.ENV_REVISION, ""),
        help=f"of the service, keeps prefix caches apart; default: ${names.ENV_REVISION}",
    )
    add("--pod-name", default=from_env(names.ENV_POD_NAME, ""), help="for logs")
    add("--cache-dir", type=Path, help="of downloaded models; default: $SHOAL_CACHE_DIR")
    add(
        "--packed-cache",
        action="store_true",
        help="keep packed weights there, as large as the weights in memory: the next start of the"
        " native backend maps them",
    )
    add(
        "--drain-seconds",
        type=float,
        default=60.0,
        help="how long requests in flight may go on after SIGTERM; default: 60",
    )
    add(
        "--stall-seconds",
        type=float,
        default=30.0,
        help="an engine is unhealthy once a step takes longer than this and than ten times what"
        " a step of its size takes; default: 30",
    )
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    add(
        "--log-format",
        choices=logs.FORMATS,
        default=from_env(names.ENV_LOG_FORMAT, "text"),
        help=f"default: ${names.ENV_LOG_FORMAT} or text",
    )
    _add_fault_flags(parser, from_env)
    add_engine_flags(parser)
    add_parallel_flags(parser)
    return parser


def _add_fault_flags(parser: argparse.ArgumentParser, from_env: Callable[[str, str], str]) -> None:
    group = parser.add_argument_group("faults on purpose, for tests of canaries and alerts alone")
    group.add_argument(
        "--inject-step-delay-ms",
        type=_within(0.0, 60_000.0),
        default=from_env(names.ENV_INJECT_STEP_DELAY_MS, "0"),
        metavar="MS",
        help=f"added to every step; default: ${names.ENV_INJECT_STEP_DELAY_MS} or 0, none",
    )
    group.add_argument(
        "--inject-failure-rate",
        type=_within(0.0, 1.0),
        default=from_env(names.ENV_INJECT_FAILURE_RATE, "0"),
        metavar="SHARE",
        help="of the samples, which fail at their first token; default:"
        f" ${names.ENV_INJECT_FAILURE_RATE} or 0, none",
    )


def _within(low: float, high: float) -> Callable[[str], float]:
    """Reads a number between two others."""

    def number(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} must be from {low:g} to {high:g}")
        return value

    return number


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is not a port: it must be from 0 to 65535")
    return port


if __name__ == "__main__":
    sys.exit(main())
