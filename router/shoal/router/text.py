"""Text of one model: tokenizer and chat template, from the files that its engine sends.

Encoding uses fastokens where it agrees with Hugging Face's tokenizers on a fixed set of strings
at load, else Hugging Face's. What takes about a millisecond or more runs in a thread, so that
the event loop never waits for a long prompt.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence

from tokenizers import Tokenizer

from shoal.api.v1 import engine_pb2
from shoal.router.chat_template import ChatTemplate, ChatTemplateError
from shoal.router.detokenize import Detokenizer, Vocabulary

log = logging.getLogger(__name__)

Encode = Callable[[str, bool], list[int]]  # text, add_special_tokens

# Characters that encode within about half a millisecond.
_INLINE_FAST = 8_192
_INLINE_SLOW = 1_024
# Turns of a chat that came before need not be encoded again: the twentieth of a talk of 11 KB takes
# 0.06 ms, not 0.5. To remember a short text costs more than it saves.
_SEGMENT_CACHE_BYTES = 8 * 1024 * 1024
_REMEMBERED_CHARACTERS = 2_000
_NORMALIZER_SLACK = 4  # a normalizer may shrink text, by no more than this

# Fields of Sampling that a model's generation_config may set.
_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")

# Where tokenizers go wrong: scripts, joiners, runs of whitespace, digits, contractions, code.
_PROBES = (
    "",
    " ",
    "a",
    "Hello world",
    " leading and trailing ",
    "\n\n\t  \r\n x",
    "   many     spaces\t\ttabs",
    "can't won't I'll you'RE THEY'D",
    "1 12 123 1234 12345678 3.14159 1,000,000 2024-01-31T12:34:56Z",
    "def f(x: int) -> str:\n    return f'{x!r}'  # comment\n",
    "<html><body>&amp;</body></html> <|im_start|>user\n<|im_end|> <s> </s> [INST]",
    "Größe naïve façade Ångström œuvre İstanbul \u017f",
    "Привет мир, как дела? Καλημέρα κόσμε",
    "漢字とかなカナ混じり文。한국어 텍스트 中文字符\uff0c标点",
    "العربية עברית हिन्दी বাংলা ไทย",
    "🎉👩‍👩‍👧‍👦🇩🇪👍🏽 ❤️ e\u0301 \u200b\u200d\ufeff \u00a0\u3000\u2028",
    "²³½Ⅷ①㊀ ٣٤٥ १२३",
    "\x00\x01\x7f\x85 \U0001f9ff\U00020000",
    "https://example.com/a?b=c&d=%20#frag user@example.org C:\\dir\\file.txt",
    "x" * 300,
    "ab " * 100,
    "!!!???...---___***///\\\\\\((()))",
)


class TextModel:
    """Turns text into a model's token ids and back. Immutable; shared by all requests."""

    def __init__(
        self,
        model: engine_pb2.Model,
        vocabulary: Vocabulary,
        encoders: tuple[Encode, Encode | None],
    ) -> None:
        """`encoders`: the reference, and a fast one that agrees with it or None."""
        self.model = model
        self.vocabulary = vocabulary
        self._reference, self._fast = encoders
        self._inline = _INLINE_FAST if self._fast else _INLINE_SLOW
        tokenizer = model.tokenizer
        self._bos_id = model.bos_token_id if model.HasField("bos_token_id") else None
        self.eos_ids = frozenset(model.eos_token_ids)
        # What the model's makers recommend, for requests that do not say.
        self.default_sampling: Mapping[str, float | int] = {
            descriptor.name: value
            for descriptor, value in model.default_sampling.ListFields()
            if descriptor.name in _DEFAULTED
        }
        self._template: ChatTemplate | None = None
        if tokenizer.chat_template:
            self._template = ChatTemplate(
                tokenizer.chat_template,
                {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token},
            )
        slack = 1 if vocabulary.byte_level and vocabulary.lossless else _NORMALIZER_SLACK
        # No text beyond this many bytes fits into the model.
        self.max_prompt_bytes = model.max_model_len * vocabulary.longest_token_bytes * slack

    @classmethod
    def load(cls, model: engine_pb2.Model) -> "TextModel":
        """Takes 0.1 to 1 s: call it in a thread. Raises ValueError if the tokenizer or the
        template cannot be read."""
        description = model.tokenizer.tokenizer_json.decode()
        try:
            reference = Tokenizer.from_str(description)
        except Exception as error:  # tokenizers raises Exception itself
            raise ValueError(f"{model.name}: tokenizer.json cannot be read: {error}") from error
        reference.no_truncation()
        reference.no_padding()
        vocabulary = Vocabulary(reference, json.loads(description), model.vocab_size)

        def encode(text: str, add_special_tokens: bool) -> list[int]:
            # The batch form releases the interpreter's lock, the single form does not.
            batch = reference.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return batch[0].ids

        return cls(
            model, vocabulary, (encode, _fast_encoder(description, vocabulary.added_tokens, encode))
        )

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def uses_fast_encoder(self) -> bool:
        return self._fast is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; blocks for about a millisecond per 20 KB."""
        ids = (self._fast or self._reference)(text, add_special_tokens)
        if (
            add_special_tokens
            and self.model.tokenizer.add_bos_token
            and self._bos_id is not None
            and ids[:1] != [self._bos_id]
        ):
            ids.insert(0, self._bos_id)
        return ids

    async def encode_async(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Like `encode`, in a thread where the text is long."""
        if len(text) <= self._inline:
            return self.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.encode, text, add_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        **variables: object,
    ) -> str:
        """The prompt, to be encoded without special tokens. Raises ChatTemplateError."""
        if self._template is None:
            raise ChatTemplateError("this model has no chat template: use /v1/completions")
        return self._template.render(messages, add_generation_prompt, **variables)

    def detokenizer(
        self, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> Detokenizer:
        """For the tokens that follow `prompt_ids`."""
        return self.vocabulary.detokenizer(prompt_ids, skip_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence. Ids beyond the vocabulary raise IndexError."""
        detokenizer = self.vocabulary.detokenizer((), skip_special_tokens)
        return detokenizer.feed(token_ids) + detokenizer.flush()


def _fast_encoder(
    description: str, added_tokens: Sequence[str], reference: Encode
) -> Encode | None:
    """fastokens, if it is installed and gives the reference's ids for every probe."""
    try:
        from fastokens import Tokenizer as FastTokenizer
    except ImportError:
        return None
    try:
        plain = FastTokenizer.from_json_str(description)
        remembering = FastTokenizer.from_json_str(description)
        remembering.enable_segment_cache(_SEGMENT_CACHE_BYTES)

        def encode(text: str, add_special_tokens: bool) -> list[int]:
            tokenizer = plain if len(text) < _REMEMBERED_CHARACTERS else remembering
            ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
            return ids

        around = tuple(f"a {token}b{token} c" for token in added_tokens[:64])
        for probe in (*_PROBES, *around, "".join(added_tokens[:64])):
            for special in (True, False):
                expected = reference(probe, special)
                for tokenizer in (plain, remembering, remembering):  # new to it, then known
                    if tokenizer.encode(probe, add_special_tokens=special).ids != expected:
                        log.warning(
                            "fastokens disagrees with tokenizers on %r: not used", probe[:40]
                        )
                        return None
    except Exception as error:  # whatever a young library raises: the reference serves on
        log.warning("fastokens cannot read this tokenizer (%s): not used", error)
        return None
    return encode
