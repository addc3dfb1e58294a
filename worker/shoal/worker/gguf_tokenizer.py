"""A `tokenizers` tokenizer from the metadata of a GGUF file.

GGUF keeps vocabulary and merges, and names the rest: `tokenizer.ggml.model` the algorithm,
`tokenizer.ggml.pre` the rule that cuts text into words before merging. The rules are those of
the models' own tokenizer.json; the names are llama.cpp's (src/llama-vocab.cpp).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from shoal.worker.gguf_header import Value

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece writes a space so


class UnsupportedTokenizer(ValueError):
    """The file describes a tokenizer this module does not know, or lacks a part of one."""


@dataclass(frozen=True, slots=True)
class _Words:
    """How text is cut before merging. `splits` are applied one after another."""

    splits: tuple[str, ...]
    whole_words_first: bool = False  # a word in the vocabulary is taken without merging
    nfc: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MODERN_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MODERN_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_GPT2_WORDS = _Words((_GPT2,))
_DIGIT_WORDS = _Words((r"\p{N}", _GPT2))
_LLAMA3_WORDS = _Words((_MODERN_HEAD + r"|\p{N}{1,3}" + _MODERN_TAIL,), whole_words_first=True)
_QWEN2_WORDS = _Words((_MODERN_HEAD + r"|\p{N}" + _MODERN_TAIL,), nfc=True)

WORDS: Final[Mapping[str, _Words]] = MappingProxyType(
    {
        "gpt-2": _GPT2_WORDS,
        "gpt2": _GPT2_WORDS,
        "olmo": _GPT2_WORDS,
        "smollm": _DIGIT_WORDS,
        "starcoder": _DIGIT_WORDS,
        "refact": _DIGIT_WORDS,
        "command-r": _DIGIT_WORDS,
        "llama3": _LLAMA3_WORDS,
        "llama-v3": _LLAMA3_WORDS,
        "llama-bpe": _LLAMA3_WORDS,
        "qwen2": _QWEN2_WORDS,
        "deepseek-r1-qwen": _QWEN2_WORDS,
        "tekken": _Words((_TEKKEN,), whole_words_first=True),
        # Of files older than the key `tokenizer.ggml.pre`.
        "default": _Words((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    }
)


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    tokenizer: Tokenizer
    bos_token: str  # "": none
    eos_token: str
    add_bos_token: bool
    chat_template: str


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    merges: list[str] | None

    @property
    def ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}


def from_metadata(metadata: Mapping[str, Value]) -> GgufTokenizer:
    """Builds the tokenizer. Raises UnsupportedTokenizer, which names the key and its value."""
    model = metadata.get("tokenizer.ggml.model")
    vocabulary = _vocabulary(metadata)
    if model == "gpt2":
        tokenizer = _byte_level(vocabulary, _words(metadata))
        add_bos_default = False
    elif model == "llama":
        tokenizer = _sentencepiece(
            vocabulary, bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        )
        add_bos_default = True
    else:
        raise UnsupportedTokenizer(
            f"tokenizer.ggml.model is {model!r}; supported are 'gpt2' and 'llama'"
        )
    _add_special(tokenizer, vocabulary)
    bos = _token(metadata, "bos", vocabulary)
    eos = _token(metadata, "eos", vocabulary)
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos_default)) and bool(bos)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B:1",
            special_tokens=[(bos, vocabulary.ids[bos])],
        )
    template = metadata.get("tokenizer.chat_template", "")
    return GgufTokenizer(
        tokenizer, bos, eos, add_bos, template if isinstance(template, str) else ""
    )


def _vocabulary(metadata: Mapping[str, Value]) -> _Vocabulary:
    def array(name: str) -> list[str | int | float | bool] | None:
        value = metadata.get(f"tokenizer.ggml.{name}")
        return value if isinstance(value, list) else None

    tokens = array("tokens")
    if not tokens:
        raise UnsupportedTokenizer("tokenizer.ggml.tokens is missing: the file has no vocabulary")
    kinds, scores, merges = array("token_type"), array("scores"), array("merges")
    for name, values in (("token_type", kinds), ("scores", scores)):
        if values is not None and len(values) != len(tokens):
            raise UnsupportedTokenizer(
                f"tokenizer.ggml.{name} has {len(values)} entries for {len(tokens)} tokens"
            )
    return _Vocabulary(
        tokens=[str(token) for token in tokens],
        kinds=[int(kind) for kind in kinds] if kinds else [1] * len(tokens),
        scores=[float(score) for score in scores] if scores else [],
        merges=None if merges is None else [str(merge) for merge in merges],
    )


def _words(metadata: Mapping[str, Value]) -> _Words:
    name = str(metadata.get("tokenizer.ggml.pre", "default"))
    if name not in WORDS:
        raise UnsupportedTokenizer(
            f"tokenizer.ggml.pre is {name!r}; supported are {', '.join(sorted(WORDS))}"
        )
    return WORDS[name]


def _byte_level(vocabulary: _Vocabulary, words: _Words) -> Tokenizer:
    """BPE over bytes, spelled in GPT-2's alphabet of printable characters."""
    if vocabulary.merges is None:
        raise UnsupportedTokenizer("tokenizer.ggml.merges is missing")
    merges = []
    for merge in vocabulary.merges:
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, merges, ignore_merges=words.whole_words_first))
    if words.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in words.splits]
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, spelling])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary, space_prefix: bool) -> Tokenizer:
    """BPE over characters where a missing one falls back to byte tokens, as Llama 2 has it."""
    unknown = next(
        (
            t
            for t, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
            if kind == _UNKNOWN
        ),
        None,
    )
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary.ids,
            _sentencepiece_merges(vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=_BYTE in vocabulary.kinds,
        )
    )
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    letters: list[decoders.Decoder] = [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if space_prefix:
        spaces.insert(0, normalizers.Prepend(_SPACE))
        letters.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(letters)
    return tokenizer


def _sentencepiece_merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """The file's merges, or those its scores imply: every cut of a token into two tokens, best
    score first, since sentencepiece always joins the pair whose result scores highest."""
    if vocabulary.merges is not None:
        return [(left, right) for left, _, right in (m.partition(" ") for m in vocabulary.merges)]
    if not vocabulary.scores:
        raise UnsupportedTokenizer("tokenizer.ggml.scores and tokenizer.ggml.merges are missing")
    skipped = (_UNKNOWN, _CONTROL, _UNUSED, _BYTE)
    pieces = {
        token: score
        for token, score, kind in zip(
            vocabulary.tokens, vocabulary.scores, vocabulary.kinds, strict=True
        )
        if kind not in skipped
    }
    ranked = [
        (-score, -len(token[:cut]), token[:cut], token[cut:])
        for token, score in pieces.items()
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]
    ranked.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in ranked]


def _add_special(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Control and user-defined tokens are found whole in a text; only the former are special."""
    control, plain = [], []
    for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True):
        if kind == _CONTROL:
            control.append(AddedToken(token, special=True, normalized=False))
        elif kind == _USER_DEFINED:
            plain.append(AddedToken(token, special=False, normalized=False))
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(plain)


def _token(metadata: Mapping[str, Value], name: str, vocabulary: _Vocabulary) -> str:
    key = f"tokenizer.ggml.{name}_token_id"
    index = metadata.get(key)
    if index is None:
        return ""
    if not isinstance(index, int) or not 0 <= index < len(vocabulary.tokens):
        raise UnsupportedTokenizer(f"{key} is {index}, the vocabulary has {len(vocabulary.tokens)}")
    return vocabulary.tokens[index]
