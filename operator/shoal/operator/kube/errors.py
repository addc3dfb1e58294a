"""What the API server says when it does not do what it was asked."""

from typing import Final

_REFUSALS: Final = frozenset({400, 403, 405, 413, 415, 422})
# An internal error in name only: it is the manifest that is wrong.
_UNKNOWN_FIELD: Final = "field not declared in schema"


class ApiError(Exception):
    """A call that failed. `status` is the HTTP code, 0 where no answer came in time."""

    def __init__(
        self, status: int, reason: str, message: str, retry_after: float | None = None
    ) -> None:
        super().__init__(f"{reason or status}: {message}")
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after = retry_after  # seconds, where the server asked for a pause

    @property
    def not_found(self) -> bool:
        return self.status == 404

    @property
    def exists(self) -> bool:
        """An object of that name is there already."""
        return self.status == 409 and self.reason == "AlreadyExists"

    @property
    def conflict(self) -> bool:
        """Somebody else wrote first: look again."""
        return self.status == 409 and not self.exists

    @property
    def refused(self) -> bool:
        """The request is wrong, or not allowed: asking again changes nothing."""
        return self.status in _REFUSALS or (self.status == 500 and _UNKNOWN_FIELD in self.message)


class NotLeading(Exception):
    """A write was about to be sent by an operator that does not lead (any more)."""
