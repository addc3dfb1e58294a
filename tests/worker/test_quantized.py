"""Quantized checkpoints, packed here by each format's own definition, against transformers with
the values that they stand for."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.worker.model.loader import open_checkpoint
from shoal.worker.model.quantized import unpack
from shoal.worker.model.weights import UnsupportedModel, WeightError

Packed = tuple[dict[str, Tensor], Tensor]  # tensors by the ends of their names; their values
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
GROUP = 16


def pack(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Unsigned codes into int32 words along a dimension, the first lowest."""
    per = 32 // bits
    words = codes.long().unflatten(dim, (-1, per)).movedim(dim + 1, -1)
    joined = (words << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(joined >= 1 << 31, joined - (1 << 32), joined).int()


def codes_of(weight: Tensor, bits: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """weight [outputs, inputs] -> codes [inputs, outputs], zeros and scales [groups, outputs]."""
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = weight.shape[1], weight.shape[0]
    codes = torch.randint(0, 1 << bits, (inputs, outputs), generator=generator)
    zeros = torch.randint(1, 1 << bits, (inputs // GROUP, outputs), generator=generator)
    scales = (torch.rand(zeros.shape, generator=generator) * 0.3 / (1 << bits)).half()
    return codes, zeros, scales


def gptq(weight: Tensor, bits: int, shift: int, *, act_order: bool) -> Packed:
    codes, zeros, scales = codes_of(weight, bits, len(weight))
    group = torch.arange(weight.shape[1]) // GROUP
    if act_order:
        group = group[torch.randperm(len(group), generator=torch.Generator().manual_seed(5))]
    values = (codes - zeros[group]) * scales[group].float()
    tensors = {
        "qweight": pack(codes, bits, 0),
        "qzeros": pack((zeros - shift) % (1 << bits), bits, 1),
        "scales": scales,
        "g_idx": group.int(),
    }
    return tensors, values.t()


def awq(weight: Tensor) -> Packed:
    codes, zeros, scales = codes_of(weight, 4, len(weight))
    values = (codes - zeros.repeat_interleave(GROUP, 0)) * scales.repeat_interleave(
        GROUP, 0
    ).float()

    def columns(part: Tensor) -> Tensor:
        return pack(part.unflatten(1, (-1, 8))[:, :, list(AWQ_COLUMNS)].flatten(1), 4, 1)

    return {"qweight": columns(codes), "qzeros": columns(zeros), "scales": scales}, values.t()


def fp8_blocks(weight: Tensor) -> Packed:
    """Blocks of 32 by 32, the last of a row or column cut off."""
    rows, columns = -(-weight.shape[0] // 32), -(-weight.shape[1] // 32)
    scales = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) + 0.5
    codes = weight.to(torch.float8_e4m3fn)
    spread = scales.repeat_interleave(32, 0)[: len(weight)].repeat_interleave(32, 1)
    values = codes.float() * spread[:, : weight.shape[1]]
    return {"weight": codes, "weight_scale_inv": scales}, values


def fp8_channels(weight: Tensor) -> Packed:
    scales = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scales).to(torch.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale": scales, "input_scale": torch.ones(1)}
    return tensors, codes.float() * scales


def int8_channels(weight: Tensor) -> Packed:
    scales = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scales).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scales.bfloat16()}, codes * scales.bfloat16().float()


def w4a16(weight: Tensor, *, zeros: bool) -> Packed:
    codes, offsets, scales = codes_of(weight, 4, len(weight))
    tensors = {
        "weight_packed": pack(codes.t(), 4, 1),
        "weight_scale": scales.t().contiguous(),
        "weight_shape": torch.tensor(weight.shape),
    }
    middle: Tensor | int = 8
    if zeros:
        tensors["weight_zero_point"] = pack(offsets.t(), 4, 0)
        middle = offsets.repeat_interleave(GROUP, 0)
    return tensors, ((codes - middle) * scales.repeat_interleave(GROUP, 0).float()).t()


def compressed(kind: str, bits: int, strategy: str, numbers: str = "int") -> dict[str, Any]:
    weights = {"num_bits": bits, "type": numbers, "strategy": strategy, "group_size": GROUP}
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"g": group}}


FORMATS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Packed]]] = {
    "gptq-4": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP},
        lambda weight: gptq(weight, 4, 1, act_order=False),
    ),
    "gptq-4-act-order": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True},
        lambda weight: gptq(weight, 4, 1, act_order=True),
    ),
    "gptq-8-v2": (
        {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"},
        lambda weight: gptq(weight, 8, 0, act_order=True),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": GROUP}, awq),
    "fp8-blocks": ({"quant_method": "fp8", "weight_block_size": [32, 32]}, fp8_blocks),
    "fp8-channels": ({"quant_method": "fp8"}, fp8_channels),
    "compressed-fp8": (compressed("float-quantized", 8, "channel", "float"), fp8_channels),
    "compressed-int8": (compressed("int-quantized", 8, "channel"), int8_channels),
    "compressed-w4a16": (
        compressed("pack-quantized", 4, "group"),
        lambda weight: w4a16(weight, zeros=False),
    ),
    "compressed-w4a16-zeros": (
        compressed("pack-quantized", 4, "group"),
        lambda weight: w4a16(weight, zeros=True),
    ),
}


def quantized(model: Any, folder: Path, name: str, models: ModuleType) -> Any:
    """Saves a checkpoint of the format; returns the model with the values that it stands for."""
    config, packing = FORMATS[name]
    path = models.save(model, folder) / "model.safetensors"
    tensors, exact = load_file(path), deepcopy(model)
    parameters = dict(exact.named_parameters())
    for key in [key for key in tensors if "_proj." in key and key.endswith(".weight")]:
        parts, values = packing(tensors.pop(key).float())
        prefix = key.removesuffix("weight")
        tensors |= {f"{prefix}{end}": part.contiguous() for end, part in parts.items()}
        with torch.no_grad():
            parameters[key].copy_(values)
    save_file(tensors, path)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": config}))
    return exact


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_the_values(name: str, models: ModuleType, tmp_path: Path) -> None:
    """A whole model of the format in float32, biases and an unquantized head beside it."""
    exact = quantized(models.tiny("biased"), tmp_path, name, models)
    decoder = models.load(tmp_path)
    tokens = torch.randint(199, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    ours = models.decoder_logits(decoder, [tokens], (30, 1))[0]
    torch.testing.assert_close(ours, models.oracle_logits(exact, tokens), rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_slices_are_those_of_the_whole(name: str, models: ModuleType, tmp_path: Path) -> None:
    """Runs of rows and of columns, as ranks read them."""
    quantized(models.tiny("llama"), tmp_path, name, models)
    source = open_checkpoint(tmp_path).source
    key = "model.layers.1.mlp.down_proj.weight"
    whole = source.read(key)
    rows = source.read_runs(key, 0, [(3, 7), (20, 21)])
    assert torch.equal(rows, torch.cat((whole[3:7], whole[20:21])))
    assert torch.equal(source.read_runs(key, 1, [(5, 30)]), whole[:, 5:30])


def test_words_hold_their_codes_lowest_first() -> None:
    """Codes of 2, 4 and 8 bits along either dimension, those with the highest bit set too."""
    for bits in (2, 4, 8):
        codes = torch.arange(64 * 32).view(64, 32) * 7 % (1 << bits)
        for dim in (0, 1):
            assert torch.equal(unpack(pack(codes, bits, dim), bits, dim), codes.int())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "bitsandbytes is not supported.*awq, compressed-tensors",
        ),
        ({"quant_method": "gptq", "bits": 3}, "bits is 3, expected one of 2, 4, 8"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version gemv of awq"),
        ({"quant_method": "compressed-tensors"}, "config_groups has several kinds"),
        (compressed("nvfp4-pack-quantized", 4, "group"), "nvfp4-pack-quantized is not supported"),
    ],
)
def test_what_is_not_known_is_named(
    changes: dict[str, Any], message: str, models: ModuleType, tmp_path: Path
) -> None:
    """Method, option and what there is."""
    quantized(models.tiny("llama"), tmp_path, "gptq-4", models)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": changes}))
    with pytest.raises(UnsupportedModel, match=message):
        open_checkpoint(tmp_path)


def test_zero_biases_that_the_model_has_not_are_left_out(
    models: ModuleType, tmp_path: Path
) -> None:
    """Some writers give every quantized layer a bias; one that is not zero is refused."""
    exact = quantized(models.tiny("llama"), tmp_path, "gptq-4", models)
    path = tmp_path / "model.safetensors"
    key = "model.layers.1.mlp.up_proj.bias"
    save_file({**load_file(path), key: torch.zeros(80)}, path)
    ours = models.decoder_logits(models.load(tmp_path), [[5, 6, 7]], (3,))[0]
    torch.testing.assert_close(ours, models.oracle_logits(exact, [5, 6, 7]), rtol=1e-4, atol=3e-4)
    save_file({**load_file(path), key: torch.ones(80)}, path)
    with pytest.raises(WeightError, match=f"tensor {key} .* is not known to LlamaForCausalLM"):
        models.load(tmp_path)


def test_broken_parts_are_named(models: ModuleType, tmp_path: Path) -> None:
    """Scales of too few groups, and codes of another matrix."""
    quantized(models.tiny("llama"), tmp_path, "gptq-4", models)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    key = "model.layers.0.self_attn.o_proj"
    save_file({**whole, f"{key}.scales": whole[f"{key}.scales"][:, :9].contiguous()}, path)
    with pytest.raises(WeightError, match=rf"{key}.scales \[3, 9\].* do not fit each other"):
        models.load(tmp_path)
    save_file({**whole, f"{key}.qweight": whole[f"{key}.qweight"][:3].contiguous()}, path)
    with pytest.raises(WeightError, match=rf"{key}.weight is \[48, 24\], expected \[48, 48\]"):
        models.load(tmp_path)
