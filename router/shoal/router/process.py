"""One router process, HTTP and gRPC, until SIGTERM.

SIGTERM or Ctrl-C: /ready says no; for `--shutdown-delay-seconds` all is served as before, while
whoever sends us clients takes notice; then no new connections, and requests in flight may finish
within `--drain-seconds`. The process exits with 0. A second signal ends it at once.
"""

import argparse
import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import uvicorn

from shoal.api import names
from shoal.api.lifeline import watch_lifeline
from shoal.router import logs
from shoal.router.core import RouterCore
from shoal.router.grpc_front import start_grpc
from shoal.router.http.app import create_app
from shoal.router.http.server import HttpProtocol
from shoal.router.kube_access import MOUNT, NoServiceAccount, ServiceAccount
from shoal.router.routes_watch import RoutesWatch
from shoal.router.tls import BadCertificate, Certificate

log = logging.getLogger("shoal.router")

BACKLOG = 2048
LAST_SECONDS = 1.0  # for answers that were cut off to be sent
INTERRUPTED = 130
KUBERNETES: Final = "kubernetes"  # --routes of a cluster; a folder of that name is ./kubernetes


class PortTaken(Exception):
    """Somebody else listens where we should; the message says what to do."""


class Routes(Protocol):
    """Where route tables come from."""

    async def run(self) -> None:
        """Hands on tables for ever."""
        ...


def main(arguments: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """Returns the exit status."""
    parser = build_parser(environ)
    options = parser.parse_args(arguments)
    if problem := _contradiction(options):
        parser.error(problem)
    logs.configure(options.log_format, options.log_level)
    watch_lifeline(environ)
    try:
        return _run(serve(options))
    except (PortTaken, NoServiceAccount, BadCertificate) as error:
        print(f"shoal router: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


async def serve(options: argparse.Namespace) -> int:
    """Serves until a signal. Raises PortTaken, NoServiceAccount or BadCertificate."""
    certificate = _certificate(options)
    core = RouterCore()
    routes = _routes(options, core)
    with bind(options.host, options.http_port) as listener:
        try:
            grpc_server, grpc_port = await start_grpc(
                core, f"{_url(options.host)}:{options.grpc_port}"
            )
        except OSError as error:
            raise PortTaken(_taken(options.host, options.grpc_port, "--grpc-port")) from error
        server = _HttpServer(
            uvicorn.Config(
                create_app(core),
                http=HttpProtocol,
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                date_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=75,
                ssl_context_factory=None if certificate is None else lambda *_: certificate.context,
            )
        )
        http = asyncio.create_task(server.serve(sockets=[listener]))
        jobs: list[asyncio.Task[Any]] = [
            asyncio.create_task(core.run()),
            asyncio.create_task(routes.run()),
            asyncio.create_task(_signals().wait()),
            http,
        ]
        if certificate is not None:
            jobs.append(asyncio.create_task(certificate.run()))
        address = f"{_url(options.host)}:{listener.getsockname()[1]}"
        scheme = "http" if certificate is None else "https"
        log.info("serving %s://%s, gRPC on port %d", scheme, address, grpc_port)
        # Everything that lives as long as the process is made; what comes is short-lived.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 50, 100)
        await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
        for job in jobs:
            if job.done():
                job.result()  # whatever ended it, if not the signal
        core.stop_accepting()
        if options.shutdown_delay_seconds:
            log.info("not ready any more, serving for %g s", options.shutdown_delay_seconds)
            await asyncio.sleep(options.shutdown_delay_seconds)
        log.info("stopping; %d requests may finish in %g s", core.unfinished, options.drain_seconds)
        server.should_exit = True
        grpc_ended = asyncio.create_task(grpc_server.stop(options.drain_seconds))
        done, late = await asyncio.wait({http, grpc_ended}, timeout=options.drain_seconds)
        if late:
            log.warning("%d requests were cut off", core.unfinished)
        await core.close()
        await asyncio.wait(late or done, timeout=LAST_SECONDS)
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        log.info("stopped")
    return 0


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers, which end the process by the signal itself."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _routes(options: argparse.Namespace, core: RouterCore) -> Routes:
    """The watch that --routes asks for. Raises NoServiceAccount."""
    if options.routes != KUBERNETES:
        return RoutesWatch(Path(options.routes), core.apply)
    # Not before it is wanted: a router of one machine does without aiohttp.
    from shoal.router.kube_routes import KubeRoutes

    account = ServiceAccount.of_pod(os.environ, options.service_account_dir)

    def busy(service: str) -> bool:
        found = core.services.get(service)
        return found is not None and found.dispatcher.stats.open > 0

    return KubeRoutes(account, core.apply, options.namespaces, busy=busy)


def _certificate(options: argparse.Namespace) -> Certificate | None:
    """Of HTTPS, where it is asked for. Raises BadCertificate."""
    if options.tls_cert_file is None:
        return None
    return Certificate(options.tls_cert_file, options.tls_key_file)


def bind(host: str, port: int) -> socket.socket:
    """The HTTP listener. Raises PortTaken."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except socket.gaierror as error:
        raise PortTaken(f"--host {host!r} is not an address of this machine: {error}") from error
    except OSError as error:
        raise PortTaken(_taken(host, port, "--http-port", error)) from error
    # Accepted sockets inherit it: a streamed chunk never waits for an acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _taken(host: str, port: int, flag: str, error: OSError | None = None) -> str:
    why = os.strerror(error.errno or errno.EADDRINUSE if error else errno.EADDRINUSE).lower()
    return (
        f"cannot listen on {host} port {port} ({why}). "
        f"Stop what listens there, or choose another port with {flag} (0: any free one)"
    )


def _url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _signals() -> asyncio.Event:
    """Set by the first signal; the second ends the process."""
    stop = asyncio.Event()

    def handle() -> None:
        if stop.is_set():
            os._exit(INTERRUPTED)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handle)
    return stop


def _run(coroutine: Coroutine[Any, Any, int]) -> int:
    """On uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(coroutine)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(coroutine)


def build_parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    """Flags, with defaults from the environment."""
    parser = argparse.ArgumentParser(
        prog="python -m shoal.router", description="The front door: OpenAI's API and gRPC."
    )
    add = parser.add_argument
    add(
        "--routes",
        required=True,
        help="directory of <service>.json, watched; or the word kubernetes: the labelled "
        "ConfigMaps of the cluster that this pod runs in",
    )
    add(
        "--namespaces",
        type=_names,
        default=(),
        metavar="A,B",
        help="with --routes kubernetes: only ConfigMaps of these; default: of all namespaces",
    )
    add(
        "--service-account-dir",
        type=Path,
        default=MOUNT,
        help=f"with --routes kubernetes: folder of token and ca.crt; default: {MOUNT}",
    )
    host = environ.get(names.ENV_HOST, "0.0.0.0")
    add("--host", default=host, help=f"to listen on; default: ${names.ENV_HOST} or 0.0.0.0")
    for flag, variable, port in (
        ("--http-port", names.ENV_PORT, names.PORT_ROUTER_HTTP),
        ("--grpc-port", names.ENV_GRPC_PORT, names.PORT_ROUTER_GRPC),
    ):
        add(
            flag,
            type=_port,
            default=environ.get(variable, str(port)),
            help=f"0 for a free one; default: ${variable} or {port}",
        )
    add(
        "--drain-seconds",
        type=_seconds,
        default=30.0,
        help="how long requests in flight may go on once no new ones are taken; default: 30",
    )
    add(
        "--shutdown-delay-seconds",
        type=_seconds,
        default=0.0,
        help="after SIGTERM, how long to serve on while /ready says no; default: 0",
    )
    add("--tls-cert-file", type=Path, help="serve HTTPS with this chain, in PEM; read anew")
    add("--tls-key-file", type=Path, help="its private key, in PEM, without a password")
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    add(
        "--log-format",
        choices=logs.FORMATS,
        default=environ.get(names.ENV_LOG_FORMAT, "text"),
        help=f"default: ${names.ENV_LOG_FORMAT} or text",
    )
    return parser


def _contradiction(options: argparse.Namespace) -> str | None:
    """What is wrong with flags that are right one by one."""
    if (options.tls_cert_file is None) != (options.tls_key_file is None):
        return "--tls-cert-file and --tls-key-file belong together: give both or neither"
    if options.namespaces and options.routes != KUBERNETES:
        given = ",".join(options.namespaces)
        return f"--namespaces {given} means nothing without --routes kubernetes"
    return None


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a time: it must be 0 seconds or more")
    return seconds


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is not a port: it must be from 0 to 65535")
    return port
