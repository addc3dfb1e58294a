"""What the HTTP front needs of the router's core; tests bring a scripted one."""

from collections.abc import Callable
from typing import Protocol

from prometheus_client import CollectorRegistry

from shoal.router.generation import Generation, GenerationRequest
from shoal.router.text import TextModel


class Core(Protocol):
    """The part of `shoal.router.core.RouterCore` that HTTP handlers call, on its event loop."""

    @property
    def ready(self) -> bool:
        """Whether requests can be routed: the route tables have been read."""
        ...

    @property
    def registry(self) -> CollectorRegistry:
        """The metrics of /metrics."""
        ...

    def models(self) -> list[tuple[str, str]]:
        """(model id, service) of everything served."""
        ...

    def find(self, model_id: str) -> str | None:
        """The service that serves a model id."""
        ...

    def session_header(self, service: str) -> str:
        """Name of the header whose requests prefer one replica, in lower case."""
        ...

    def pinned(self, service: str, header: Callable[[bytes], bytes | None]) -> str | None:
        """The revision that is meant for requests with such headers, where it can be had."""
        ...

    def known_text(self, service: str) -> TextModel | None:
        """What `text` gives where it need not wait. Raises GenerationError."""
        ...

    async def text(
        self,
        service: str,
        timeout: float | None = None,  # noqa: ASYNC109 (bounds a wait in a queue, not the call)
    ) -> TextModel:
        """Waits for a replica where there is none yet. Raises GenerationError."""
        ...

    def submit(self, request: GenerationRequest) -> Generation:
        """Queues a request. Raises GenerationError where it is refused at once."""
        ...
