"""Architectures that are not of the registry, through transformers' own modules."""

import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from shoal.kernels.flat import FlatBatch
from shoal.worker.config import EngineConfig
from shoal.worker.engine import Engine
from shoal.worker.model.families import FAMILIES
from shoal.worker.model.foreign import ForeignBackend, load_foreign
from shoal.worker.model.precision import choose_precision
from shoal.worker.model.weights import UnsupportedModel
from shoal.worker.request import EngineRequest, SamplingParams
from shoal.worker.runner import create_executor

BASE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SERVED = {
    "ArceeForCausalLM": ("ArceeConfig", {}),
    "GlmForCausalLM": ("GlmConfig", {}),
    "Exaone4ForCausalLM": (
        "Exaone4Config",
        {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}


def build(architecture: str, config_class: str, changes: dict[str, Any], folder: Path) -> Any:
    torch.manual_seed(7)
    config = getattr(transformers, config_class)(**{**BASE, **changes})
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    model.save_pretrained(folder)
    return model


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 101, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("architecture", SERVED)
def test_logits_equal_transformers(architecture: str, models: ModuleType, tmp_path: Path) -> None:
    """Two sequences in one step, in chunks and token by token, over one paged cache."""
    assert architecture not in FAMILIES
    model = build(architecture, *SERVED[architecture], tmp_path)
    loaded, _ = load_foreign(tmp_path, choose_precision("float32"))
    backend = ForeignBackend(loaded, 20, 8)
    sequences = prompts(45, 20)
    wanted = [models.oracle_logits(model, tokens) for tokens in sequences]
    tables = np.arange(1, 13).reshape(2, 6)
    done = np.zeros(2, np.int64)
    for counts in ((17, 5), (9, 6), *[(1, 1)] * 5):
        count = np.array(counts)
        flat = [t[s : s + n] for t, s, n in zip(sequences, done, counts, strict=True)]
        batch = FlatBatch.of(np.concatenate(flat), done.copy(), count, tables)
        with torch.inference_mode():
            found = backend.logits(backend.forward(batch, np.cumsum(count) - 1))
        done += count
        for row, (logits, end) in enumerate(zip(wanted, done, strict=True)):
            torch.testing.assert_close(found[row], logits[end - 1], rtol=1e-4, atol=3e-4)


def test_the_engine_serves_it_and_the_log_says_how(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Greedy tokens of two requests side by side are those of transformers' own generation."""
    model = build("ArceeForCausalLM", *SERVED["ArceeForCausalLM"], tmp_path)
    config = EngineConfig(dtype="float32", kv_cache_blocks=40, max_num_seqs=4, threads=1)
    with caplog.at_level(logging.INFO):
        executor = create_executor(tmp_path, config, lambda phase, seconds: None)
    assert "ArceeForCausalLM by transformers' own module" in caplog.text
    engine = Engine(executor, config)
    texts = prompts(21, 9)
    greedy = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    for index, text in enumerate(texts):
        engine.add(EngineRequest(str(index), tuple(text), len(text), greedy))
    found: dict[str, list[int]] = {"0": [], "1": []}
    while engine.has_work:
        for delta in engine.step().deltas:
            found[delta.key.request_id] += delta.token_ids
    executor.close()
    for index, text in enumerate(texts):
        tokens = found[str(index)]
        with torch.inference_mode():
            predicted = model(torch.tensor([text + tokens])).logits[0].argmax(-1)
        assert predicted[len(text) - 1 : -1].tolist() == tokens


@pytest.mark.parametrize(
    ("architecture", "config_class", "changes", "message"),
    [
        ("BloomForCausalLM", "BloomConfig", {}, "attends its own way"),
        (
            "GptOssForCausalLM",
            "GptOssConfig",
            {"num_local_experts": 2, "num_experts_per_tok": 1},
            "s_aux",
        ),
        ("MambaForCausalLM", "MambaConfig", {"state_size": 4}, "keeps more than keys and values"),
    ],
)
def test_what_the_cache_does_not_fit_is_refused(
    architecture: str, config_class: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """The message says why, beside the architectures that are known."""
    build(architecture, config_class, changes, tmp_path)
    config = EngineConfig(dtype="float32", kv_cache_blocks=8)
    with pytest.raises(UnsupportedModel, match=rf"{architecture}.*known are.*Llama.*{message}"):
        create_executor(tmp_path, config, lambda phase, seconds: None)


def test_settings_it_does_not_have_are_refused(tmp_path: Path) -> None:
    """Load-time quantization and step programs are for known architectures."""
    build("ArceeForCausalLM", *SERVED["ArceeForCausalLM"], tmp_path)
    for config, word in (
        (EngineConfig(quantization="int8"), "quantization is int8"),
        (EngineConfig(backend="native"), "backend is native"),
    ):
        with pytest.raises(ValueError, match=f"{word}, but architecture ArceeForCausalLM"):
            create_executor(tmp_path, config, lambda phase, seconds: None)
