"""Tokenizers, incremental detokenizing, stop strings and templates."""

import json
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from shoal.router.chat_template import ChatTemplate, ChatTemplateError
from shoal.router.detokenize import Detokenizer, Vocabulary
from shoal.router.stop import StopChecker
from shoal.router.text import TextModel
from shoal.router.text_stream import TextStream

CORPUS = ["The quick brown fox, naïve 漢字 🎉.", "Zwölf Boxkämpfer jagen 12345 мир"] * 3
IDS = st.lists(st.integers(0, 299), max_size=30)


def bpe() -> Tokenizer:
    """A byte-level tokenizer with merges across characters' bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=300,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<s>", "</s>"],
            show_progress=False,
        ),
    )
    tokenizer.add_tokens(["spécial wörd"])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Words carry their space, unknown characters fall back to bytes, as Llama 2 does it."""
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)]]
    pieces += ["▁", "▁Hello", "▁world", "He", "llo", "▁a", "b", "漢", "!", "o", "w", "r"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer, json.loads(tokenizer.to_str()), 310)


BPE, SPM = bpe(), sentencepiece()
BPE_WORDS, SPM_WORDS = vocabulary(BPE), vocabulary(SPM)


def pieces(detokenizer: Detokenizer, ids: Sequence[int], cuts: set[int]) -> str:
    """The text when ids arrive in chunks that end at `cuts`."""
    text, chunk = "", []
    for place, token_id in enumerate(ids):
        chunk.append(token_id)
        if place in cuts:
            text += detokenizer.feed(chunk)
            chunk = []
    return text + (detokenizer.feed(chunk) if chunk else "") + detokenizer.flush()


@given(IDS, st.sets(st.integers(0, 30)), st.booleans())
def test_byte_level_text_equals_the_tokenizer_s(ids: list[int], cuts: set[int], skip: bool) -> None:
    """Any ids, any chunks, broken characters included: the text that decode gives for all."""
    assert BPE_WORDS.byte_level
    text = pieces(BPE_WORDS.detokenizer((), skip), ids, cuts)
    assert text == BPE.decode(ids, skip_special_tokens=skip)


@given(st.text(max_size=20), st.sets(st.integers(0, 60)))
def test_window_text_equals_the_tokenizer_s(text: str, cuts: set[int]) -> None:
    """For words with spaces and byte fallback: encode, then detokenize in any chunks."""
    assert not SPM_WORDS.byte_level
    ids = SPM.encode(text).ids
    assert pieces(SPM_WORDS.detokenizer(), ids, cuts) == SPM.decode(ids)


def test_a_continued_prompt_keeps_its_space() -> None:
    """The first token of an answer is written as one inside a text, not at its beginning."""
    prompt = SPM.encode("Hello").ids
    world = SPM.token_to_id("▁world")
    assert SPM_WORDS.detokenizer(prompt).feed([world]) == " world"
    assert SPM_WORDS.detokenizer().feed([world]) == "world"


@given(st.text(max_size=30))
def test_no_character_is_shown_in_parts(text: str) -> None:
    """Byte by byte, what is shown is always a beginning of the text."""
    detokenizer = BPE_WORDS.detokenizer()
    shown = ""
    for byte in text.encode():
        shown += detokenizer.feed([BPE.token_to_id(_name(byte))])
        assert text.startswith(shown)
    assert shown + detokenizer.flush() == text


def _name(byte: int) -> str:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return chr(byte) if byte in printable else chr(0x100 + others.index(byte))


class _Counting:
    """A tokenizer that counts the ids it decodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.decoded = 0
        self._tokenizer = tokenizer

    def decode(self, ids: list[int], **options: Any) -> str:
        self.decoded += len(ids)
        return self._tokenizer.decode(ids, **options)  # type: ignore[no-any-return]  # no stubs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize("endless", ["</s>", "<0x80>", None])
def test_a_token_costs_the_same_however_many_came(endless: str | None) -> None:
    """Tokens that show nothing (special, half characters, unknown) do not pile up, and the text
    around them is that of decode."""
    counting = _Counting(SPM)
    words = Vocabulary(counting, json.loads(SPM.to_str()), 310)  # type: ignore[arg-type]  # a proxy
    ids = [SPM.token_to_id(endless) if endless else 309] * 1000
    ids = [SPM.token_to_id("▁Hello"), *ids, SPM.token_to_id("▁world")]
    detokenizer = words.detokenizer()
    assert "".join(detokenizer.feed([i]) for i in ids) + detokenizer.flush() == SPM.decode(ids)
    assert counting.decoded < 60 * len(ids)


def test_ids_beyond_the_tokenizer_are_silent() -> None:
    """A model's vocabulary may be padded: such an id has no text."""
    assert BPE_WORDS.detokenizer().feed([309]) == ""
    assert BPE_WORDS.token_text(309) == ""


STOPS = st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: character by character, the first stop string that is complete."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            stop = max(done, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(st.text("ab.", max_size=20), STOPS, st.sets(st.integers(1, 20)), st.booleans())
def test_stop_strings_do_not_depend_on_chunks(
    text: str, stops: list[str], cuts: set[int], include: bool
) -> None:
    """Shown text and stop string are those of the definition for every way to cut the text."""
    checker = StopChecker(stops, include)
    borders = sorted({0, len(text), *[cut for cut in cuts if cut < len(text)]})
    shown = ""
    for start, end in pairwise(borders):
        shown += checker.feed(text[start:end])
    if checker.hit is None:
        shown += checker.flush()
    expected, hit = first_stop(text, stops)
    assert checker.hit == hit
    assert shown == expected + (hit if include and hit else "")


@given(st.text("ab", max_size=10), STOPS)
def test_only_a_possible_beginning_is_held_back(text: str, stops: list[str]) -> None:
    """What is held back is the longest end of the text that begins a stop string."""
    checker = StopChecker(stops)
    shown = checker.feed(text)
    if checker.hit is None:
        held = text[len(shown) :]
        prefixes = {stop[:end] for stop in stops for end in range(1, len(stop))}
        assert held == next((text[i:] for i in range(len(text)) if text[i:] in prefixes), "")


@given(
    st.text("aé日🎉.", max_size=12),
    st.sets(st.integers(0, 60)),
    st.sampled_from([(), (".",), ("é日",), ("a", "🎉.")]),
    st.booleans(),
    st.booleans(),
)
def test_a_sample_does_not_depend_on_how_tokens_arrive(
    text_model: TextModel,
    text: str,
    cuts: set[int],
    stop: tuple[str, ...],
    include: bool,
    track: bool,
) -> None:
    """Text, finish, token count: the same for one token at a time and for any chunks."""
    ids = [*text.encode(), 256]

    def run(chunks: list[list[int]]) -> tuple[str, str | None, object, int]:
        stream = TextStream(text_model, stop=stop, include_stop=include, track_offsets=track)
        shown = ""
        for place, chunk in enumerate(chunks):
            shown += stream.feed(chunk, 1 if place == len(chunks) - 1 else 0)
            if stream.finish:
                break
        return shown, stream.finish, stream.stop_reason, stream.num_tokens

    borders = sorted({0, len(ids), *[cut for cut in cuts if cut < len(ids)]})
    chunked = [ids[start:end] for start, end in pairwise(borders)]
    assert run(chunked) == run([[token_id] for token_id in ids])


def test_templates_follow_hugging_face_s_conventions() -> None:
    """Trimmed blocks, tojson, strftime_now, loop controls, generation marks, special tokens."""
    source = """{%- for m in messages %}
    {%- if loop.index > 2 %}{% break %}{% endif %}
    {{- bos_token + m['role'] }}
    {%- generation %}{{ m | tojson }}{% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}{{ strftime_now('%Y') }}{% endif %}"""
    template = ChatTemplate(source, {"bos_token": "<s>"}, lambda: datetime(2031, 1, 1))
    messages = [{"role": "a", "content": "é<"}, {"role": "b"}, {"role": "c"}]
    assert template.render(messages) == '<s>a{"role": "a", "content": "é<"}<s>b{"role": "b"}2031'
    assert template.render([], add_generation_prompt=False) == ""


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system here') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].__class__.__mro__ }}",
        "{{ messages[0]['missing'] + 'x' }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10000000) %}{% endfor %}",
    ],
)
def test_a_template_cannot_do_harm(source: str) -> None:
    """What it refuses or may not do is one typed error."""
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, {}).render([{"role": "user"}])


def test_a_broken_template_is_told_at_load() -> None:
    """Not at the first request."""
    with pytest.raises(ChatTemplateError, match="broken"):
        ChatTemplate("{% if %}", {})


def test_the_fast_encoder_agrees(text_model: TextModel) -> None:
    """fastokens serves where it passes the probes, and gives the reference's ids."""
    pytest.importorskip("fastokens")
    assert text_model.uses_fast_encoder
    for text in CORPUS:
        assert text_model.encode(text) == list(text.encode())


def test_a_disagreeing_fast_encoder_is_not_used(
    support: Any, byte_tokenizer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wrong id in the probes and the reference does all the work."""
    fastokens = pytest.importorskip("fastokens")

    class Wrong:
        @staticmethod
        def from_json_str(description: str) -> "Wrong":
            return Wrong()

        def encode(self, text: str, add_special_tokens: bool) -> Any:
            raw = list(text.encode())
            return type("Encoding", (), {"ids": [0] if "\u017f" in text else raw})

    monkeypatch.setattr(fastokens, "Tokenizer", Wrong)
    text = TextModel.load(support.model(byte_tokenizer))
    assert not text.uses_fast_encoder
    assert text.encode("\u017f") == list("\u017f".encode())


def test_bos_is_added_where_the_model_wants_it(support: Any, byte_tokenizer: bytes) -> None:
    """Once, and never to a rendered chat."""
    model = support.model(byte_tokenizer, bos_token_id=256)
    model.tokenizer.add_bos_token = True
    text = TextModel.load(model)
    assert text.encode("a") == [256, 97]
    assert text.encode("<|end|>a") == [256, 97]
    assert text.encode("a", add_special_tokens=False) == [97]


def test_a_broken_tokenizer_is_a_clear_error(support: Any) -> None:
    """Names the model, and what is wrong."""
    with pytest.raises(ValueError, match=r"bytes: tokenizer.json cannot be read"):
        TextModel.load(support.model(b"{}"))


def test_a_model_without_a_template_says_so(support: Any, byte_tokenizer: bytes) -> None:
    """And names the way out."""
    model = support.model(byte_tokenizer)
    model.tokenizer.chat_template = ""
    with pytest.raises(ChatTemplateError, match="/v1/completions"):
        TextModel.load(model).apply_chat_template([])
