"""What `shoal up` shows: a live table on a terminal, one line per event elsewhere.

Both follow the store, which any reader may; events come from the supervisor besides.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from shoal.cli.startup import Startup, StartupLogs
from shoal.cli.view import condition_of, pod_status, service_cells, service_document

if TYPE_CHECKING:
    from shoal.operator.local.records import PodRecord
    from shoal.operator.local.settings import Update
    from shoal.operator.local.store import Store

_LEVEL_STYLES = {"info": "", "warning": "yellow", "error": "red"}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that is shown at one moment."""

    services: Sequence[Mapping[str, Any]]
    pods: Sequence["PodRecord"]
    startup: Mapping[str, Startup]  # by pod: the latest of those that start
    news: Sequence[tuple[str, Startup]] = ()  # (pod, what it logged) since the last snapshot


class Display(Protocol):
    """Entered while the supervisor runs."""

    def update(self, update: "Update") -> None: ...

    def note(self, text: str) -> None: ...

    def refresh(self) -> None:
        """Looks at the store and shows what is new."""
        ...

    def __enter__(self) -> "Display": ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def make_display(
    store: "Store",
    *,
    tty: bool,
    console: Console | None = None,
    clock: Callable[[], float] = time.time,
) -> Display:
    """A live table where somebody watches, lines where a log is written."""
    watch = Watcher(store)
    if tty:
        return LiveDisplay(watch, console or Console(highlight=False), clock)
    return LineDisplay(watch, console or Console(highlight=False, soft_wrap=True))


class Watcher:
    """Reads the store; remembers which services have been ready."""

    def __init__(self, store: "Store") -> None:
        self._store = store
        self._logs = StartupLogs()
        self._startup: dict[str, Startup] = {}
        self._announced: set[str] = set()

    def look(self) -> Snapshot:
        pods = self._store.pods()
        news = [
            (pod.name, startup)
            for pod in pods
            if pod.service and not pod.ready
            for startup in self._logs.read(pod.name, self._store.log_path(pod.name))
        ]
        self._startup |= dict(news)
        startup = {
            pod.name: self._startup[pod.name]
            for pod in pods
            if pod.name in self._startup and not pod.ready and pod.phase == "Running"
        }
        # Of a document that does not parse the supervisor tells; the others are shown.
        good, _ = self._store.read_services()
        documents = [service_document(self._store, service) for service in good.values()]
        return Snapshot(documents, pods, startup, news)

    def newly_ready(self, snapshot: Snapshot) -> Iterator[Mapping[str, Any]]:
        """Services that are ready for the first time."""
        for document in snapshot.services:
            name = document["metadata"]["name"]
            ready = condition_of(document.get("status") or {}, "Ready") or {}
            if ready.get("status") == "True" and name not in self._announced:
                self._announced.add(name)
                yield document


def ready_lines(document: Mapping[str, Any]) -> list[str]:
    """How to talk to a service that has become ready."""
    url = (document.get("status") or {}).get("url") or ""
    base = url.rstrip("/").removesuffix("/v1")
    model = document["spec"]["model"].get("name") or document["metadata"]["name"]
    return [f"{document['metadata']['name']} is ready at {base}/v1", *curl_lines(base, model)]


def curl_lines(base: str, model: str) -> list[str]:
    """A chat request to paste into a shell."""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    return [
        f"  curl {base}/v1/chat/completions -H 'content-type: application/json' \\",
        f"    -d '{body}'",
    ]


class _Base:
    def __init__(self, watcher: Watcher, console: Console) -> None:
        self._watcher = watcher
        self._console = console

    def update(self, update: "Update") -> None:
        text = Text(f"{update.name}: {update.message}", style=_LEVEL_STYLES[update.level])
        self._console.print(text)

    def note(self, text: str) -> None:
        self._console.print(Text(text))

    def _announce(self, snapshot: Snapshot) -> None:
        for document in self._watcher.newly_ready(snapshot):
            for line in ready_lines(document):
                self._console.print(Text(line), soft_wrap=True)


class LineDisplay(_Base):
    """One line per event: for logs and pipes. Of a phase that runs, the first line is enough."""

    def __init__(self, watcher: Watcher, console: Console) -> None:
        super().__init__(watcher, console)
        self._running: dict[str, str] = {}  # phase by pod

    def refresh(self) -> None:
        snapshot = self._watcher.look()
        for pod, startup in snapshot.news:
            if startup.seconds is not None or self._running.get(pod) != startup.phase:
                self._running[pod] = startup.phase
                self._console.print(Text(f"{pod}: {startup}"))
        self._announce(snapshot)

    def __enter__(self) -> "LineDisplay":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


class LiveDisplay(_Base):
    """A table that follows the state, below the events."""

    def __init__(self, watcher: Watcher, console: Console, clock: Callable[[], float]) -> None:
        super().__init__(watcher, console)
        self._clock = clock
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def refresh(self) -> None:
        snapshot = self._watcher.look()
        self._announce(snapshot)
        self._live.update(render(snapshot, self._clock()), refresh=True)

    def __enter__(self) -> "LiveDisplay":
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()


def render(snapshot: Snapshot, now: float) -> RenderableType:
    """Services, then pods with what each is doing."""
    services = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("SERVICE", "READY", "REPLICAS", "REASON", "AGE"):
        services.add_column(column, no_wrap=True)
    for document in snapshot.services:
        name, _, ready, replicas, desired, _, reason, age = service_cells(document, now)
        style = "green" if ready == "True" else "red" if reason == "Failed" else "yellow"
        services.add_row(
            name, Text(ready or "Unknown", style=style), f"{replicas}/{desired}", reason, age
        )
    pods = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("POD", "STATUS", "RESTARTS", "AGE", ""):
        pods.add_column(column, no_wrap=column != "")
    for pod in snapshot.pods:
        pods.add_row(
            pod.name,
            Text(
                "Ready" if pod.ready else pod_status(pod), style="green" if pod.ready else "yellow"
            ),
            str(pod.restarts),
            f"{max(0.0, now - pod.created):.0f}s",
            doing(pod, snapshot.startup.get(pod.name), now),
        )
    parts: list[RenderableType] = []
    if snapshot.services:
        parts += ["", services]
    if snapshot.pods:
        parts += ["", pods]
    return Group(*parts, Text("\nCtrl-C stops everything.", style="dim"))


def doing(pod: "PodRecord", startup: Startup | None, now: float) -> str:
    """What a pod is busy with, in a few words."""
    if pod.message:
        return pod.message
    if startup is None:
        return ""
    since = "" if pod.started is None else f" ({now - pod.started:.0f} s since its start)"
    return f"{startup}{since}"
