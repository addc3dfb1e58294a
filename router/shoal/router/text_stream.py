"""One sample's token ids turned into the text that a client sees."""

from collections.abc import Sequence

from shoal.api.v1 import engine_pb2
from shoal.router.stop import StopChecker
from shoal.router.text import TextModel

_STOP = engine_pb2.FINISH_REASON_STOP


class TextStream:
    """Detokenizes, finds stop strings and hides what ended the sample.

    After each `feed`: `finish` is "stop" or "length" once the sample is over, `stop_reason` the
    stop string or id that ended it (None for an end-of-sequence token), `num_tokens` counts the
    tokens up to the one that ended it. Where `finish` is set but the engine has not finished,
    a stop string was hit and the caller cancels the sample.
    """

    __slots__ = (
        "_checker",
        "_detokenizer",
        "_eos",
        "_include_stop",
        "_length",
        "_min_tokens",
        "_track",
        "finish",
        "num_tokens",
        "offsets",
        "shown_ids",
        "stop_reason",
    )

    def __init__(
        self,
        text: TextModel,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        prompt_ids: Sequence[int] = (),
        track_offsets: bool = False,
    ) -> None:
        """`min_tokens`: stop strings count only in text after so many tokens.
        `prompt_ids`: what the sample continues. `track_offsets`: keep `offsets`."""
        self._detokenizer = text.detokenizer(prompt_ids, skip_special_tokens)
        self._checker = StopChecker(stop, include_stop) if stop else None
        self._eos = text.eos_ids
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._track = track_offsets
        self._length = 0  # characters so far, whether shown or held back
        self.finish: str | None = None
        self.stop_reason: str | int | None = None
        self.num_tokens = 0
        self.shown_ids: Sequence[int] = ()  # of the last feed: those that are part of the text
        self.offsets: list[int] = []  # of the last feed: where each of them begins in the text

    def feed(self, token_ids: Sequence[int], finish: int) -> str:
        """Takes what a sample brought (`finish`: FinishReason or 0) and returns what may be
        shown now."""
        if self.finish is not None:
            self.shown_ids, self.offsets = (), []
            return ""
        hidden = 0
        if finish == _STOP and token_ids:
            last = token_ids[-1]
            hidden = 0 if self._include_stop else 1
            self.stop_reason = None if last in self._eos else last
        self.shown_ids = token_ids[: len(token_ids) - hidden] if hidden else token_ids
        if self._checker is None and not self._track:
            self.num_tokens += len(token_ids)
            shown = self._detokenizer.feed(self.shown_ids)
        else:
            shown = self._feed_each(hidden)
        if finish and self.finish is None:
            shown += self._end(self._detokenizer.flush())
            self.finish = self.finish or ("stop" if finish == _STOP else "length")
        return shown

    def _feed_each(self, hidden: int) -> str:
        """Token by token, so that the outcome does not depend on how they arrive."""
        parts = []
        self.offsets = []
        for count, token_id in enumerate(self.shown_ids, 1):
            self.offsets.append(self._length)
            piece = self._detokenizer.feed((token_id,))
            self._length += len(piece)
            self.num_tokens += 1
            if self._checker is None or self.num_tokens <= self._min_tokens:
                parts.append(piece)
                continue
            parts.append(self._checker.feed(piece))
            if self._checker.hit is not None:
                self.shown_ids = self.shown_ids[:count]
                self._stopped(self._checker.hit)
                return "".join(parts)
        self.num_tokens += hidden
        return "".join(parts)

    def _end(self, rest: str) -> str:
        """The last characters: what the detokenizer and the stop checker held back."""
        if self._checker is None:
            return rest
        shown = self._checker.feed(rest)
        if self._checker.hit is not None:
            self._stopped(self._checker.hit)
        return shown + self._checker.flush()

    def _stopped(self, stop: str) -> None:
        self.finish, self.stop_reason = "stop", stop
