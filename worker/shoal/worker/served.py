"""What routers are told of the models whose weights are in memory."""

from shoal.api.v1 import engine_pb2


class Served:
    """The active revision's model, and the previous one's while its weights are there. On the
    server's event loop; `shoal.worker.weight_sets` is the engine's own account."""

    def __init__(self, model: engine_pb2.Model) -> None:
        self.active = model
        self._previous: engine_pb2.Model | None = None

    def find(self, revision: str) -> engine_pb2.Model:
        """The model of a revision; of the active one where that is not there."""
        previous = self._previous
        if revision and previous is not None and previous.revision == revision:
            return previous
        return self.active

    def activate(self, model: engine_pb2.Model) -> None:
        """The active model becomes the previous one."""
        self._previous, self.active = self.active, model

    def retire(self) -> None:
        """The previous model's weights are about to go."""
        self._previous = None
