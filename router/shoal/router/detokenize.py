"""Token ids to text, as they come: bytes that are not yet a whole character are held back.

A byte-level vocabulary (GPT-2 and its descendants) is a table of bytes, so its text is the
concatenation of table rows through an incremental UTF-8 decoder. Any other vocabulary goes
through the tokenizer's own decoder over a sliding window.
"""

from codecs import utf_8_decode
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer

_CONTEXT = 6  # prompt tokens that decide how the first generated token is written
_REPLACEMENT = "\ufffd"
_PATIENCE = 16  # tokens that may wait for the rest of a character; a character has 4 bytes


class Detokenizer(Protocol):
    """Text of one sequence."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; may be empty."""
        ...

    def flush(self) -> str:
        """What is held back at the end of the sequence, broken characters replaced."""
        ...


class Vocabulary:
    """How the ids of one tokenizer are written."""

    def __init__(self, tokenizer: Tokenizer, description: Mapping[str, Any], size: int) -> None:
        """`description`: the parsed tokenizer.json. `size`: of the model's vocabulary, which may
        be padded beyond the tokenizer's."""
        self._tokenizer = tokenizer
        added = description.get("added_tokens") or []
        self.added_tokens = tuple(str(token["content"]) for token in added)
        self.special_ids = frozenset(int(token["id"]) for token in added if token["special"])
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        self.size = max(size, max(vocab.values(), default=-1) + 1)
        self.lossless = not description.get("normalizer")
        self._table = _byte_table(vocab, self.size) if _is_byte_level(description) else None
        self._shown = self._table and [
            b"" if i in self.special_ids else piece for i, piece in enumerate(self._table)
        ]
        self.longest_token_bytes = max((len(token.encode()) for token in vocab), default=1)

    @property
    def byte_level(self) -> bool:
        return self._table is not None

    def detokenizer(
        self, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> Detokenizer:
        """For tokens that follow `prompt_ids`, which decide about a leading space."""
        if self._table is not None and self._shown is not None:
            return _ByteDetokenizer(self._shown if skip_special_tokens else self._table)
        skipped = self.special_ids if skip_special_tokens else frozenset[int]()
        context = [i for i in prompt_ids[-_CONTEXT:] if i not in skipped]
        return _WindowDetokenizer(self._tokenizer, context, skipped)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for; empty for an id that the tokenizer does not know."""
        if self._table is not None:
            return self._table[token_id] if 0 <= token_id < self.size else b""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    def token_text(self, token_id: int) -> str:
        """One token alone; part of a character is written `bytes:\\xe2\\x80`, as OpenAI does."""
        piece = self.token_bytes(token_id)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


class _ByteDetokenizer:
    __slots__ = ("_pending", "_table")

    def __init__(self, table: list[bytes]) -> None:
        self._table = table  # [vocabulary size]
        self._pending = b""  # the beginning of a character

    def feed(self, token_ids: Sequence[int]) -> str:
        table = self._table
        if len(token_ids) == 1:
            data = self._pending + table[token_ids[0]]
        else:
            data = self._pending + b"".join([table[i] for i in token_ids])
        text, used = utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def flush(self) -> str:
        text, _ = utf_8_decode(self._pending, "replace", True)
        self._pending = b""
        return text


class _WindowDetokenizer:
    """Decodes a window of the last tokens with and without the new ones; the difference is new.

    The window starts where text was last shown, so the decoder sees the token before. It is
    bounded: tokens without text never enter it, and what is no character after `_PATIENCE` tokens
    is shown as broken.
    """

    __slots__ = ("_ids", "_shown", "_skipped", "_tokenizer")

    def __init__(
        self, tokenizer: Tokenizer, context: Sequence[int], skipped: frozenset[int]
    ) -> None:
        """`skipped`: ids that have no text."""
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._ids = list(context)
        self._shown = len(self._ids)  # tokens of the window whose text was shown

    def feed(self, token_ids: Sequence[int]) -> str:
        parts = []
        for token_id in token_ids:
            if token_id in self._skipped or self._tokenizer.id_to_token(token_id) is None:
                continue
            self._ids.append(token_id)
            waited = len(self._ids) - self._shown
            parts.append(self._take(final=waited >= _PATIENCE))
        return "".join(parts)

    def flush(self) -> str:
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        before = self._decode(self._ids[: self._shown])
        now = self._decode(self._ids)
        if len(now) <= len(before) or (now.endswith(_REPLACEMENT) and not final):
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _is_byte_level(description: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json decodes by the byte table alone."""
    decoder = description.get("decoder")
    model = description.get("model")
    if not isinstance(decoder, dict) or not isinstance(model, dict):
        return False
    decoders = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return [d["type"] for d in decoders] == ["ByteLevel"]


def _byte_table(vocab: dict[str, int], size: int) -> list[bytes]:
    """Bytes of every id. A token with a character outside the alphabet is literal text."""
    alphabet = _alphabet()
    table = [b""] * size
    for token, token_id in vocab.items():
        try:
            table[token_id] = bytes([alphabet[char] for char in token])
        except KeyError:
            table[token_id] = token.encode()
    return table


def _alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable ones stand for themselves, the others
    follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }
