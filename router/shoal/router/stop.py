"""Stop strings, found across the borders of the chunks in which text arrives.

The outcome depends on the text alone, never on how it was cut: the stop string that is complete
first wins (of two that end together, the longer one), as if the text came character by character.
"""

from collections.abc import Sequence

MAX_STOP_STRINGS = 64  # of a request
MAX_STOP_LENGTH = 1024  # characters of one


class StopChecker:
    """Holds back text that may be the beginning of a stop string.

    `feed` returns what may be shown. Once `hit` names a stop string the text is over.
    """

    __slots__ = ("_chars", "_held", "_include", "_longest", "_prefixes", "_stop", "hit")

    def __init__(self, stop: Sequence[str], include: bool = False) -> None:
        """`stop`: strings that are not empty. `include`: show the stop string itself."""
        self._stop = tuple(stop)
        self._include = include
        self._prefixes = frozenset(s[:end] for s in self._stop for end in range(1, len(s)))
        self._chars = frozenset(prefix[-1] for prefix in self._prefixes)
        self._longest = max((len(s) for s in self._stop), default=1) - 1
        self._held = ""
        self.hit: str | None = None

    def feed(self, text: str) -> str:
        """Takes the next text and returns what may be shown of all text so far."""
        if self.hit is not None or not text:
            return ""
        text = self._held + text
        found: tuple[int, int, str] | None = None  # end, start, stop string
        for stop in self._stop:
            start = text.find(stop)
            if start >= 0 and (found is None or (start + len(stop), start) < found[:2]):
                found = (start + len(stop), start, stop)
        if found is not None:
            end, start, self.hit = found
            self._held = ""
            return text[: end if self._include else start]
        keep = self._ambiguous(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when no more text will come."""
        held, self._held = self._held, ""
        return held

    def _ambiguous(self, text: str) -> int:
        """Length of the longest suffix that begins a stop string."""
        if text[-1] not in self._chars:
            return 0
        for length in range(min(self._longest, len(text)), 0, -1):
            if text[-length:] in self._prefixes:
                return length
        return 0
