"""What the machine refuses for a while, such as a write to a full disk.

The supervisor's word is what it holds in memory; files tell others of it. So a file that cannot
be written ends nothing: it is told once, and tried again until it goes well.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shoal.operator.local.settings import Update


class Mishaps:
    """The things that went wrong and have not gone well since."""

    def __init__(self, on_update: Callable[[Update], None]) -> None:
        self._on_update = on_update
        self._known: dict[str, str] = {}  # what failed -> why

    def __bool__(self) -> bool:
        return bool(self._known)

    @contextmanager
    def around(self, what: str) -> Iterator[None]:
        """Takes an OSError of its body, and tells it unless the last try failed alike."""
        try:
            yield
        except OSError as error:
            # Without the file name: that of a temporary file differs each time.
            why = error.strerror or str(error)
            if self._known.get(what) != why:
                self._known[what] = why
                message = f"{what}: {why}; tried again until it goes well"
                self._on_update(Update("supervisor", "supervisor", message, "error"))
        else:
            self._known.pop(what, None)

    def forget(self, what: str) -> None:
        """Nobody tries this any more."""
        self._known.pop(what, None)
