"""The spec of a Hugging Face `config.json`."""

from collections.abc import Mapping
from typing import Any

from shoal.worker.model.families import FAMILIES, FULL, SLIDING, Family, activation
from shoal.worker.model.rope import RopeSpec, read_rope, trained_positions
from shoal.worker.model.spec import DecoderSpec, LayerSpec
from shoal.worker.model.weights import UnknownArchitecture, UnsupportedModel, need

Config = Mapping[str, Any]

# Older names of keys.
_ALIASES = {
    "hidden_size": ("n_embd",),
    "num_attention_heads": ("n_head",),
    "num_hidden_layers": ("n_layer",),
    "max_position_embeddings": ("n_positions",),
    "hidden_act": ("activation_function", "hidden_activation"),
    "rms_norm_eps": ("layer_norm_eps",),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "rope_theta": ("rotary_emb_base",),
    "partial_rotary_factor": ("rotary_pct",),
}


def architecture_of(config: Config) -> str:
    """The first of `architectures` that is known. Raises UnknownArchitecture where none is."""
    found = config.get("architectures") or ["(none named)"]
    for name in found:
        if name in FAMILIES:
            return str(name)
    known = ", ".join(sorted(FAMILIES))
    raise UnknownArchitecture(
        f"architecture {', '.join(found)} is not supported; known are {known}"
    )


def spec_from_hugging_face(config: Config, generation: Config | None = None) -> DecoderSpec:
    """The spec of a `config.json`, with the end tokens of a `generation_config.json` added.

    Raises UnsupportedModel for an architecture, activation or rope scaling that is not known,
    WeightError where a key is missing.
    """
    name = architecture_of(config)
    family = FAMILIES[name]
    config = _canonical(config, family)
    heads = int(need(config, "num_attention_heads"))
    hidden = int(need(config, "hidden_size"))
    ends = [*_ids(config.get("eos_token_id")), *_ids((generation or {}).get("eos_token_id"))]
    fields: dict[str, Any] = {
        "num_kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or hidden // heads),
        "intermediate_size": int(config.get("intermediate_size") or 4 * hidden),
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "activation": activation(config.get("hidden_act") or "silu"),
        **family.fields(config),
    }
    latent = fields.get("latent")
    layers = _layers(config, family, fields["head_dim"] if latent is None else latent.rotary_dim)
    first = next((layer.rope for layer in layers if layer.rope is not None), None)
    return DecoderSpec(
        architecture=name,
        vocab_size=int(need(config, "vocab_size")),
        hidden_size=hidden,
        layers=layers,
        num_heads=heads,
        max_positions=trained_positions(config, first),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        eos_token_ids=tuple(dict.fromkeys(ends)),
        bos_token_id=next(iter(_ids(config.get("bos_token_id"))), None),
        **fields,
    )


def _canonical(config: Config, family: Family) -> Config:
    """The configuration under the names that transformers uses now, defaults filled in. A key
    that is null stays so: it says that there is none."""
    merged = dict(config)
    for name, older in _ALIASES.items():
        found = [config[key] for key in older if config.get(key) is not None]
        if merged.get(name) is None and found:
            merged[name] = found[0]
    return {**family.defaults, **merged}


def _layers(config: Config, family: Family, rotary_dim: int) -> tuple[LayerSpec, ...]:
    count = int(need(config, "num_hidden_layers"))
    window = config.get("sliding_window") or None
    stated = config.get("layer_types")
    found = []
    for index in range(count):
        if stated:
            kind = stated[index]
        else:
            kind = SLIDING if window is not None and family.slides(config, index) else FULL
        if kind not in (SLIDING, FULL):
            raise UnsupportedModel(f"layer_types[{index}] is {kind}, expected {FULL} or {SLIDING}")
        rope = None
        if family.rotates(config, index, kind):
            rope = _rope(config, family, kind, rotary_dim)
        found.append(
            LayerSpec(rope, window if kind == SLIDING else None, family.mixes(config, index))
        )
    return tuple(found)


def _rope(config: Config, family: Family, kind: str, rotary_dim: int) -> RopeSpec:
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if kind in parameters:  # one entry for each type of layer
        parameters = parameters[kind]
    elif kind == SLIDING and config.get("rope_local_base_freq"):
        parameters = {"rope_theta": config["rope_local_base_freq"]}
    elif kind == SLIDING and family.unscaled_windows:
        parameters = {}
    return read_rope(config, parameters, rotary_dim, interleaved=family.interleaved)


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
