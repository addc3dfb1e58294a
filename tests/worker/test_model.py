"""The decoder against transformers: every family, file format and way to batch."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from shoal.worker.model.loader import open_checkpoint

FAMILIES = (
    "llama",
    "tied",
    "biased",
    "wide-heads",
    "one-kv-head",
    "llama3-rope",
    "linear-rope",
    "mistral",
    "mistral-window",
    "groups-of-64",
)


def prompts(seed: int, lengths: tuple[int, ...], vocab: int = 199) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


def test_every_family_of_the_zoo_is_tested(models: ModuleType) -> None:
    """The list above is the zoo's."""
    assert set(FAMILIES) == set(models.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, models: ModuleType, tmp_path: Path) -> None:
    """Whole, in uneven chunks, token by token and beside other sequences, in float32."""
    model = models.tiny(family)
    decoder = models.load(models.save(model, tmp_path))
    sequences = prompts(1, (150, 1, 67, 23))
    wanted = [models.oracle_logits(model, tokens) for tokens in sequences]
    for chunks in ((150,), (1,), (64, 5, 1, 1, 30)):
        for ours, reference in zip(
            models.decoder_logits(decoder, sequences, chunks), wanted, strict=True
        ):
            torch.testing.assert_close(ours, reference, rtol=0, atol=2e-4)
    alone = models.decoder_logits(decoder, sequences[:1], (40, 1))
    torch.testing.assert_close(alone[0], wanted[0], rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family: str, models: ModuleType, tmp_path: Path) -> None:
    """64 tokens, each the argmax of transformers' logits on the same text."""
    model = models.tiny(family)
    decoder = models.load(models.save(model, tmp_path))
    tokens = prompts(2, (40,))[0]
    for _ in range(64):
        tokens.append(int(models.decoder_logits(decoder, [tokens], (len(tokens),))[0][-1].argmax()))
    predicted = models.oracle_logits(model, tokens).argmax(-1)
    assert predicted[39:-1].tolist() == tokens[40:]


@pytest.mark.parametrize(
    "family", ["llama", "tied", "biased", "wide-heads", "llama3-rope", "linear-rope"]
)
def test_gguf_twin_gives_the_same_logits(family: str, models: ModuleType, tmp_path: Path) -> None:
    """The same model in llama.cpp's layout, rows of query and key permuted, biases too."""
    model = models.tiny(family)
    decoder = models.load(models.save_gguf(model, tmp_path / "model.gguf"))
    sequences = prompts(3, (90, 12))
    for ours, tokens in zip(
        models.decoder_logits(decoder, sequences, (60, 1)), sequences, strict=True
    ):
        wanted = models.oracle_logits(model, tokens)
        torch.testing.assert_close(ours, wanted, rtol=0, atol=3e-4)


def test_gguf_twin_has_the_same_spec(models: ModuleType, tmp_path: Path) -> None:
    """Sizes, rope, end and begin tokens read from metadata are those of config.json."""
    model = models.tiny("llama")
    from_gguf = open_checkpoint(models.save_gguf(model, tmp_path / "model.gguf")).spec
    from_folder = open_checkpoint(models.save(model, tmp_path / "folder")).spec
    assert from_gguf.norm_eps == pytest.approx(from_folder.norm_eps)
    rows = [
        replace(layer, rope=replace(layer.rope, interleaved=True)) for layer in from_folder.layers
    ]
    same = replace(from_folder, norm_eps=from_gguf.norm_eps, layers=tuple(rows))
    assert from_gguf == same


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_near(dtype: str, models: ModuleType, tmp_path: Path) -> None:
    """bfloat16 and float16 stay as near to float32 as transformers in bfloat16, or nearer."""
    model = models.tiny("llama")
    decoder = models.load(models.save(model, tmp_path), dtype)
    tokens = prompts(4, (120,))[0]
    exact = models.oracle_logits(model, tokens).log_softmax(-1)
    ours = models.decoder_logits(decoder, [tokens], (90, 1))[0].log_softmax(-1)
    low = deepcopy(model).to(torch.bfloat16)
    theirs = models.oracle_logits(low, tokens).log_softmax(-1)
    share = 1.25 if dtype == "bfloat16" else 0.2
    assert (ours - exact).abs().mean() < share * (theirs - exact).abs().mean()


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.5)])
def test_the_real_model_equals_transformers(
    dtype: str, tolerance: float, models: ModuleType
) -> None:
    """SmolLM2-135M from its GGUF, 200 tokens in chunks, against transformers in float32."""
    decoder = models.load(models.smollm2_path(), dtype)
    tokens = prompts(5, (200,), 49152)[0]
    wanted = models.oracle_logits(models.smollm2(), tokens).log_softmax(-1)
    ours = models.decoder_logits(decoder, [tokens], (150, 1, 49), 16)[0].log_softmax(-1)
    assert (ours - wanted).abs().mean() < tolerance / 3
    kl = (wanted.exp() * (wanted - ours)).sum(-1)
    assert kl.mean() < tolerance / 20
