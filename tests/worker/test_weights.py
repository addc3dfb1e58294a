"""Checkpoints: formats read right, and every defect named."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.worker.model.gguf import GgufSource
from shoal.worker.model.gguf_spec import spec_from_gguf
from shoal.worker.model.hugging_face import spec_from_hugging_face
from shoal.worker.model.loader import load_decoder, open_checkpoint
from shoal.worker.model.precision import choose_precision
from shoal.worker.model.safetensors import SafetensorsSource
from shoal.worker.model.weights import UnsupportedModel, WeightError


@pytest.fixture
def folder(models: ModuleType, tmp_path: Path) -> Path:
    return models.save(models.tiny("llama"), tmp_path / "model")


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def load(folder: Path) -> None:
    load_decoder(open_checkpoint(folder), choose_precision("float32"))


def write_gguf(path: Path, tensors: dict[str, tuple[np.ndarray, int | None]]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, (values, kind) in tensors.items():
        raw_dtype = None if kind is None else gguf.GGMLQuantizationType(kind)
        writer.add_tensor(name, values, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q5_0", "Q5_1", "F16", "BF16", "F32"])
def test_gguf_types_dequantize_as_the_gguf_package_does(kind: str, tmp_path: Path) -> None:
    """Bit for bit, for the types read here and for one left to the package."""
    number = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).normal(size=(6, 96)).astype(np.float32)
    raw = gguf.quants.quantize(values, number)
    path = write_gguf(tmp_path / "t.gguf", {"output.weight": (raw, int(number))})
    source = GgufSource(path)
    assert source.shapes == {"lm_head.weight": (6, 96)}
    wanted = gguf.quants.dequantize(raw, number)
    assert source.read("lm_head.weight").float().numpy().tolist() == wanted.tolist()


def test_k_quants_are_read(tmp_path: Path) -> None:
    """A type with blocks of 256 elements goes through the gguf package."""
    kind = gguf.GGMLQuantizationType.Q6_K
    raw = np.random.default_rng(0).integers(0, 60, (3, 210 * 2), dtype=np.uint8)
    path = write_gguf(tmp_path / "t.gguf", {"output.weight": (raw, int(kind))})
    values = GgufSource(path).read("lm_head.weight")
    assert values.shape == (3, 512)
    assert values.tolist() == gguf.quants.dequantize(raw, kind).tolist()


@pytest.mark.slow
def test_the_real_gguf_equals_the_gguf_package(models: ModuleType) -> None:
    """Tensors of SmolLM2 as gguf's own reader and dequantizer give them."""
    source = GgufSource(models.smollm2_path())
    checked = {"blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight"}
    checked["blk.29.ffn_down.weight"] = "model.layers.29.mlp.down_proj.weight"
    checked["output_norm.weight"] = "model.norm.weight"
    reader = gguf.GGUFReader(models.smollm2_path())
    for tensor in reader.tensors:
        if tensor.name in checked:
            wanted = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
            assert torch.equal(source.read(checked.pop(tensor.name)), wanted)
    assert not checked


def test_shards_equal_the_whole(models: ModuleType, tmp_path: Path) -> None:
    """A checkpoint in many files with an index holds the same tensors as in one."""
    whole = SafetensorsSource(models.save(models.tiny("biased"), tmp_path / "whole"))
    folder = models.save(models.tiny("biased"), tmp_path / "shards", shard="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    shards = SafetensorsSource(folder)
    assert shards.shapes == whole.shapes
    for name in whole.shapes:
        assert torch.equal(shards.read(name), whole.read(name))


def test_a_missing_shard_is_named(models: ModuleType, tmp_path: Path) -> None:
    """The index names a file that is not there."""
    folder = models.save(models.tiny("biased"), tmp_path / "shards", shard="40KB")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(WeightError, match=gone.name):
        load(folder)


def test_missing_extra_and_misshapen_tensors_are_named(folder: Path) -> None:
    """Tensor, expected and found stand in one sentence."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"

    save_file({key: value for key, value in tensors.items() if key != name}, path)
    with pytest.raises(WeightError, match=rf"{name} \[80, 48\] is missing"):
        load(folder)
    save_file({**tensors, name: torch.zeros(80, 47)}, path)
    with pytest.raises(WeightError, match=rf"{name} is \[80, 47\], expected \[80, 48\]"):
        load(folder)
    save_file({**tensors, "model.layers.9.extra.weight": torch.zeros(3)}, path)
    with pytest.raises(WeightError, match=r"model.layers.9.extra.weight \[3\] is not known"):
        load(folder)
    save_file({**tensors, name: torch.zeros(80, 48, dtype=torch.int8)}, path)
    with pytest.raises(WeightError, match=f"{name} holds int8, expected one of float32"):
        load(folder)


def test_derived_tensors_are_passed_over(folder: Path) -> None:
    """Rotary frequencies that old checkpoints store do no harm."""
    path = folder / "model.safetensors"
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file({**load_file(path), **extra}, path)
    load(folder)


def test_truncated_files_are_named(folder: Path, models: ModuleType, tmp_path: Path) -> None:
    """A cut safetensors file and a cut GGUF file, in the header and in the data."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightError, match=r"model\.safetensors.*truncated"):
        load(folder)
    whole = models.save_gguf(models.tiny("llama"), tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for keep, message in ((len(whole) - 5000, "tensor .* ends at byte"), (200, "ends at byte 200")):
        cut.write_bytes(whole[:keep])
        with pytest.raises(WeightError, match=message):
            load(cut)
    cut.write_bytes(b"PK" + whole[2:])
    with pytest.raises(WeightError, match="not a GGUF"):
        load(cut)


def test_paths_that_hold_no_model_are_named(tmp_path: Path) -> None:
    """Nothing there, no config.json, a config that is no JSON, no weights."""
    with pytest.raises(WeightError, match=r"neither a \.gguf file nor a folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(WeightError, match=r"no config.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightError, match="not JSON"):
        open_checkpoint(tmp_path)


def test_no_weights_beside_the_config(folder: Path) -> None:
    """A pickle is no weights: only safetensors count."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(WeightError, match=r"no \*.safetensors"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.*LlamaForCausalLM, Mistral"),
        ({"hidden_act": "mish"}, "hidden_act mish.*gelu, gelu_fast"),
        ({"rope_parameters": {"rope_type": "xpos"}}, "xpos.*default, linear, dynamic, llama3"),
        ({"layer_types": ["linear_attention"] * 3}, r"layer_types\[0\] is linear_attention"),
        ({"quantization_config": {"quant_method": "hqq"}}, "hqq is not supported; known are awq"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_key_value_heads": 4}, "num_heads is 6"),
        ({"head_dim": 7}, "rotary_dim is 7"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
    ],
)
def test_unsupported_configs_say_what_is_known(
    changes: dict[str, Any], message: str, folder: Path
) -> None:
    """The message names key and value, and what there is."""
    edit(folder, **changes)
    with pytest.raises(WeightError, match=message):
        open_checkpoint(folder)


def test_old_rope_keys_are_understood() -> None:
    """`rope_theta` and `rope_scaling`, as transformers 4 wrote them."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 10,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "rope_theta": 5000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "eos_token_id": [3, 4],
    }
    spec = spec_from_hugging_face(config, {"eos_token_id": [4, 5]})
    rope = spec.ropes[0]
    assert rope.theta == 5000.0
    assert rope.inverse_frequencies(64).tolist() == pytest.approx([0.5, 0.5 * 5000**-0.5])
    assert spec.eos_token_ids == (3, 4, 5)
    assert spec.num_kv_heads == 2


def test_other_gguf_architectures_are_refused() -> None:
    """The family is named, with what is known."""
    with pytest.raises(UnsupportedModel, match=r"mamba.*llama"):
        spec_from_gguf({"general.architecture": "mamba"}, {})
    with pytest.raises(UnsupportedModel, match="mixtures of experts"):
        spec_from_gguf({"general.architecture": "llama", "llama.expert_count": 8}, {})


def test_dtype_setting() -> None:
    """`auto` is one of the others; a wrong value lists them."""
    assert choose_precision("auto").name in ("bfloat16", "float32")
    with pytest.raises(ValueError, match="'int3', expected auto, bfloat16, float16, float32"):
        choose_precision("int3")
