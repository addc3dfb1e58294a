"""kopf: the process, the login, and the watches of services and nodes. Nothing is decided here.

Each event is handed to a sink that only takes note of it. Handlers of single edges, finalizers,
annotations and peering are not used: the operator is driven by levels (see `kube.reconcile`).
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any, Final, Protocol

import kopf

from shoal.operator.kube.access import Access
from shoal.operator.kube.kinds import INFERENCE_SERVICES, NODES, Kind

log: Final = logging.getLogger(__name__)

_WATCH_SECONDS: Final = 300  # the API server ends a watch after that, and it goes on
_DEAF_SECONDS: Final = 90  # without even a bookmark, the connection counts as dead
_CALL_SECONDS: Final = 30
_CONNECT_SECONDS: Final = 5
_IDLE_SECONDS: Final = 0.1
_PAGE: Final = 100
# Read by peers only, and there are none. Unset, kopf looks up the name of its user, and the user
# of a container has none. (Its type is private to kopf.)
_IDENTITY: Final[Any] = "shoal-operator"


class Sink(Protocol):
    """Who takes note of events."""

    def saw(self, kind: Kind, live: dict[str, Any]) -> None: ...

    def lost(self, kind: Kind, gone: dict[str, Any]) -> None: ...

    def saw_node(self, node: dict[str, Any]) -> None: ...

    def lost_node(self, name: str) -> None: ...


async def watch(
    access: Access,
    sink: Sink,
    namespaces: Sequence[str],
    *,
    listed: Callable[[], None],
    stop: asyncio.Event,
    ready: asyncio.Event,
) -> None:
    """Feeds `sink` from the API server until `stop`; () as namespaces is the whole cluster.

    `listed()` hears of each object that comes from a list, not from a stream: after the start
    that means that a stream was interrupted, and that deletions may have been missed. Tasks that
    are created after this has begun are cancelled with it: create yours before.
    """
    registry = kopf.OperatorRegistry()
    _login(registry, access)
    for kind in (INFERENCE_SERVICES, *(() if namespaces else (NODES,))):
        _subscribe(registry, kind, sink, listed)
    await kopf.operator(
        registry=registry,
        settings=_settings(),
        clusterwide=not namespaces,
        namespaces=list(namespaces),
        standalone=True,
        identity=_IDENTITY,
        stop_flag=stop,
        ready_flag=ready,
    )


def _subscribe(
    registry: kopf.OperatorRegistry, kind: Kind, sink: Sink, listed: Callable[[], None]
) -> None:
    async def take_note(event: Any, **_: Any) -> None:
        live = event["object"]
        if event["type"] is None:
            listed()
        if kind is NODES:
            if event["type"] == "DELETED":
                sink.lost_node(live["metadata"]["name"])
            else:
                sink.saw_node(live)
        elif event["type"] == "DELETED":
            sink.lost(kind, live)
        else:
            sink.saw(kind, live)

    kopf.on.event(
        kind.group, kind.version, kind.plural, id=f"note-{kind.plural}", registry=registry
    )(take_note)


def _login(registry: kopf.OperatorRegistry, access: Access) -> None:
    async def log_in(**_: Any) -> kopf.ConnectionInfo:
        """Asked again when a token is refused: it is read from its file anew."""
        return kopf.ConnectionInfo(
            server=access.server,
            ca_data=access.ca,
            insecure=access.insecure,
            token=access.token.value(fresh=True) or None,
            certificate_data=access.certificate,
            private_key_data=access.key,
            default_namespace=access.namespace,
        )

    kopf.on.login(registry=registry, id="log-in")(log_in)


def _settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False  # events are the operator's own business
    settings.scanning.disabled = True  # the kinds are known
    # A task an object lives for as long as it has news, and lists come in pages: what waits to
    # be taken note of is never all that there is.
    settings.queueing.idle_timeout = _IDLE_SECONDS
    settings.watching.chunk_size = _PAGE
    settings.watching.server_timeout = _WATCH_SECONDS
    settings.watching.inactivity_timeout = _DEAF_SECONDS
    settings.watching.connect_timeout = _CONNECT_SECONDS
    settings.watching.reconnect_backoff = 0.1
    settings.networking.request_timeout = _CALL_SECONDS
    settings.networking.connect_timeout = _CONNECT_SECONDS
    settings.networking.error_backoffs = _Endless()
    # Nothing of kopf's is kept in objects, so nothing need be read or compared.
    settings.persistence.diffbase_storage = _NoDiffs()
    settings.persistence.progress_storage = kopf.StatusProgressStorage(name="unused")
    return settings


class _Endless(Iterable[float]):
    """Pauses between attempts that never give up: an API server may be away for long."""

    def __iter__(self) -> Iterator[float]:
        return chain((0.2, 0.5), repeat(1.0))


class _NoDiffs(kopf.DiffBaseStorage):
    """Spares a deep copy of every object with every event."""

    def build(self, *, body: Any, extra_fields: Any = None) -> Any:
        return {}

    def fetch(self, *, body: Any) -> None:
        return None

    def store(self, *, body: Any, patch: Any, essence: Any) -> None:
        """Nothing is stored."""
