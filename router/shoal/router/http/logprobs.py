"""Logprobs in the shapes of chat, of completions and of vLLM's `prompt_logprobs`.

On the wire an entry names the token itself first, then the likeliest tokens in falling order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from shoal.api.v1 import engine_pb2
from shoal.router.detokenize import Vocabulary
from shoal.router.text_stream import TextStream

Entries = Sequence[engine_pb2.TokenLogprobs]

_LOWEST = -9999.0  # JSON has no minus infinity


def chat_logprobs(
    vocabulary: Vocabulary, token_ids: Sequence[int], entries: Entries, top: int
) -> list[dict[str, object]]:
    """`choices[].logprobs.content` of these tokens with `top` alternatives each."""
    content = []
    for token_id, entry in zip(token_ids, entries, strict=False):
        pairs = list(zip(entry.token_ids, entry.logprobs, strict=True))
        content.append(
            _chat_token(vocabulary, token_id, pairs[0][1])
            | {"top_logprobs": [_chat_token(vocabulary, *pair) for pair in pairs[1 : top + 1]]}
        )
    return content


def _chat_token(vocabulary: Vocabulary, token_id: int, logprob: float) -> dict[str, object]:
    return {
        "token": vocabulary.token_text(token_id),
        "logprob": max(logprob, _LOWEST),
        "bytes": list(vocabulary.token_bytes(token_id)),
    }


@dataclass(slots=True)
class CompletionLogprobs:
    """`choices[].logprobs` of a completion. `text_offset` counts characters from the beginning
    of the choice's text, the echoed prompt included."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(
        self,
        vocabulary: Vocabulary,
        token_ids: Sequence[int],
        entries: Entries,
        offsets: Sequence[int],
        top: int,
    ) -> None:
        """Appends tokens. An entry without tokens (the first of a prompt) has no logprob."""
        for token_id, entry, offset in zip(token_ids, entries, offsets, strict=False):
            token = vocabulary.token_text(token_id)
            self.tokens.append(token)
            self.text_offset.append(offset)
            if not entry.token_ids:
                self.token_logprobs.append(None)
                self.top_logprobs.append(None)
                continue
            logprobs = [max(value, _LOWEST) for value in entry.logprobs]
            likeliest = zip(entry.token_ids[1 : top + 1], logprobs[1 : top + 1], strict=True)
            self.token_logprobs.append(logprobs[0])
            self.top_logprobs.append(
                {vocabulary.token_text(i): value for i, value in likeliest} | {token: logprobs[0]}
            )

    def extend(self, other: "CompletionLogprobs") -> None:
        self.tokens += other.tokens
        self.token_logprobs += other.token_logprobs
        self.top_logprobs += other.top_logprobs
        self.text_offset += other.text_offset


def prompt_logprobs(
    vocabulary: Vocabulary, entries: Entries
) -> list[dict[str, dict[str, object]] | None]:
    """vLLM's shape: for each prompt token a map from token id, null for the first."""
    return [
        {
            str(token_id): {
                "logprob": max(logprob, _LOWEST),
                "rank": entry.rank if place == 0 else place,
                "decoded_token": vocabulary.token_text(token_id),
            }
            # The token itself comes last, so that its own rank stands.
            for place, (token_id, logprob) in reversed(
                list(enumerate(zip(entry.token_ids, entry.logprobs, strict=True)))
            )
        }
        if entry.token_ids
        else None
        for entry in entries
    ]


def token_offsets(stream: TextStream, token_ids: Sequence[int]) -> list[int]:
    """Where each token begins in the text of all: `stream` is fresh and tracks offsets."""
    stream.feed(token_ids, 0)
    return stream.offsets
