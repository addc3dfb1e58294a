"""What routers are told of the models whose weights are in memory."""

from collections.abc import Callable

from shoal.api.v1 import engine_pb2


class Served:
    """Models by revision, on the server's event loop. Which of them is active, and which is there
    at all, the engine alone knows."""

    def __init__(
        self, model: engine_pb2.Model, revisions: Callable[[], tuple[str, ...]] | None = None
    ) -> None:
        """`revisions`: those in memory, the active one first; None: that of `model`, for good."""
        self._models = {model.revision: model}
        self._revisions = revisions or (lambda: (model.revision,))

    @property
    def active(self) -> engine_pb2.Model:
        return self._models[self._revisions()[0]]

    def find(self, revision: str) -> engine_pb2.Model:
        """The model of a revision; of the active one where that is not there."""
        active, *others = self._revisions()
        return self._models[revision if revision in others else active]

    def expect(self, model: engine_pb2.Model) -> None:
        """A revision whose weights may become active; what is no longer there is forgotten."""
        there = self._revisions()
        self._models = {name: known for name, known in self._models.items() if name in there}
        self._models[model.revision] = model
