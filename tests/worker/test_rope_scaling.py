"""Scaled rotary embeddings against transformers', up to and beyond the trained length."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from shoal.worker.model.rope import read_rope, trained_positions
from shoal.worker.model.weights import UnsupportedModel, WeightError

SHORT, LONG = [1.0, 1.05, 1.2, 1.6], [1.0, 2.5, 6.0, 11.0]
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn-tuned": {
        "rope_type": "yarn",
        "factor": 40.0,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "original_max_position_embeddings": 128,
    },
    "yarn-whole": {
        "rope_type": "yarn",
        "factor": 4.0,
        "truncate": False,
        "original_max_position_embeddings": 128,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "original_max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("length", [100, 128, 500])
@pytest.mark.parametrize("kind", SCALINGS)
def test_frequencies_equal_transformers(kind: str, length: int) -> None:
    """Inverse frequencies and the factor of cosine and sine, for a model that is served up to a
    length below, at and beyond the trained one, four times over."""
    parameters = {"rope_theta": 5000.0, **SCALINGS[kind]}
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=8,
        max_position_embeddings=512 if kind == "longrope" else 128,
        rope_parameters=parameters,
    )
    wanted, magnitude = ROPE_INIT_FUNCTIONS[SCALINGS[kind]["rope_type"]](
        config, "cpu", seq_len=length
    )
    rope = read_rope(config.to_dict(), parameters, 8)
    found = rope.inverse_frequencies(length)
    torch.testing.assert_close(found.float(), wanted, rtol=2e-6, atol=0)
    assert rope.magnitude == pytest.approx(magnitude)
    table = rope.table(length)
    angle = torch.tensor(float(length - 1)) * wanted.double()
    turned = torch.polar(torch.full_like(angle, magnitude), angle)
    torch.testing.assert_close(table[length - 1].to(turned.dtype), turned, rtol=0, atol=5e-4)


def test_older_keys_of_a_long_rope() -> None:
    """Phi-3 as it was published: `su`, the trained length beside it, factors of half a head."""
    config = {
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "su", "short_factor": SHORT, "long_factor": LONG},
    }
    rope = read_rope(config, config["rope_scaling"], 8)
    modern = Phi3Config(
        hidden_size=64,
        num_attention_heads=8,
        pad_token_id=0,
        max_position_embeddings=512,
        original_max_position_embeddings=128,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": SHORT,
            "long_factor": LONG,
        },
    )
    for length in (128, 129):
        wanted, magnitude = ROPE_INIT_FUNCTIONS["longrope"](modern, "cpu", seq_len=length)
        torch.testing.assert_close(
            rope.inverse_frequencies(length).float(), wanted, rtol=2e-6, atol=0
        )
        assert rope.magnitude == pytest.approx(magnitude)


@pytest.mark.parametrize(
    ("kind", "stated", "limit"),
    [("yarn", 128, 512), ("yarn", 512, 512), ("dynamic", 128, 320), ("llama3", 128, 128)],
)
def test_a_scaling_stretches_the_longest_sequence(kind: str, stated: int, limit: int) -> None:
    """Where the configuration still states the trained length, the factor says how far it goes."""
    config = {"max_position_embeddings": stated}
    assert trained_positions(config, read_rope(config, SCALINGS[kind], 8)) == limit


def test_unknown_and_incomplete_scalings_are_named() -> None:
    """The message says what is known, or which key is missing."""
    config = {"max_position_embeddings": 128}
    with pytest.raises(UnsupportedModel, match=r"rope scaling xpos.*yarn, longrope"):
        read_rope(config, {"rope_type": "xpos"}, 8)
    with pytest.raises(WeightError, match="no long_factor"):
        read_rope(config, {"rope_type": "longrope", "short_factor": SHORT}, 8)
