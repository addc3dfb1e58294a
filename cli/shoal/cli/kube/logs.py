"""Logs of several pods at once: one thread reads each, lines come out in one stream."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from shoal.cli.backend import LogLine
from shoal.cli.errors import CliError
from shoal.cli.kube.client import KubeClient, Refused
from shoal.cli.kube.pods import containers_to_log

_LOOK_SECONDS: Final = 2.0  # how often new pods are looked for
_SILENCE_SECONDS: Final = 3600.0

Pod = dict[str, Any]


def read(client: KubeClient, pods: list[Pod], tail: int | None) -> Iterator[LogLine]:
    """What there is, pod by pod."""
    for pod in pods:
        for container in containers_to_log(pod):
            for line in _lines(client, pod, container, _query(container, tail)):
                yield LogLine(pod["metadata"]["name"], line, len(pods) > 1)


def follow(
    client: KubeClient, look: Callable[[], list[Pod]], tail: int | None
) -> Iterator[LogLine]:
    """What there is and what comes, until `look` finds no pod any more."""
    lines: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    read_from: dict[tuple[str, str, int], None] = {}
    names: set[str] = set()
    next_look = 0.0
    first = True
    while True:
        if time.monotonic() >= next_look:
            pods = look()
            if not pods and lines.empty():
                return
            for pod in pods:
                names.add(pod["metadata"]["name"])
                for container in containers_to_log(pod):
                    key = (pod["metadata"]["uid"], container, _restarts(pod, container))
                    if key not in read_from:
                        read_from[key] = None
                        query = _query(container, tail if first else None)
                        _start(client, pod, container, [*query, ("follow", "true")], lines)
            first = False
            next_look = time.monotonic() + _LOOK_SECONDS
        try:
            name, line = lines.get(timeout=0.1)
        except queue.Empty:
            continue
        yield LogLine(name, line, len(names) > 1)


def _start(
    client: KubeClient,
    pod: Pod,
    container: str,
    query: list[tuple[str, str]],
    lines: "queue.SimpleQueue[tuple[str, str]]",
) -> None:
    def run() -> None:
        try:
            for line in _lines(client, pod, container, query):
                lines.put((pod["metadata"]["name"], line))
        except CliError as error:
            lines.put((pod["metadata"]["name"], f"(its log cannot be read: {error.message})"))

    threading.Thread(target=run, daemon=True).start()


def _lines(
    client: KubeClient, pod: Pod, container: str, query: list[tuple[str, str]]
) -> Iterator[str]:
    metadata = pod["metadata"]
    path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/log"
    try:
        yield from client.lines(path, query, _SILENCE_SECONDS)
    except Refused as refused:
        if refused.status != 404:  # gone since it was listed
            raise


def _query(container: str, tail: int | None) -> list[tuple[str, str]]:
    query = [("container", container)]
    return query if tail is None else [*query, ("tailLines", str(tail))]


def _restarts(pod: Pod, container: str) -> int:
    status = pod.get("status") or {}
    both = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    return next((each["restartCount"] for each in both if each["name"] == container), 0)
