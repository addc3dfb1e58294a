"""Rotary embeddings: how fast each pair of a head's elements turns, and what stretches it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.kernels.rope import rope_table
from shoal.worker.model.weights import UnsupportedModel, need

# What each kind of scaling is called in `rope_parameters.rope_type`.
KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """All positions divided by `factor`."""

    factor: float

    def apply(self, frequencies: Tensor) -> Tensor:
        return frequencies / self.factor


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Low frequencies divided by `factor`, high ones kept, a ramp between them (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int

    def apply(self, frequencies: Tensor) -> Tensor:
        turns = self.original_positions * frequencies / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = ((turns - self.low_freq_factor) / span).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True, slots=True)
class FactorScaling:
    """Each inverse frequency divided by its own factor, as GGUF files store it."""

    factors: tuple[float, ...]

    def apply(self, frequencies: Tensor) -> Tensor:
        return frequencies / torch.tensor(self.factors, dtype=frequencies.dtype)


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Frequencies that turn fewer than `beta_slow` times over the trained length divided by
    `factor`, those that turn more than `beta_fast` times kept, a ramp over the dimensions
    between (Peng et al., "YaRN", 2023)."""

    factor: float
    original_positions: int
    theta: float
    beta_fast: float
    beta_slow: float
    whole_dimensions: bool  # the ramp begins and ends at whole dimensions

    def apply(self, frequencies: Tensor) -> Tensor:
        pairs = len(frequencies)
        low, high = self._dimension(self.beta_fast, pairs), self._dimension(self.beta_slow, pairs)
        if self.whole_dimensions:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        width = high - low if high != low else 0.001
        ramp = torch.arange(pairs, dtype=frequencies.dtype).sub_(low).div_(width).clamp_(0, 1)
        return frequencies * (1 - ramp) + frequencies / self.factor * ramp

    def _dimension(self, rotations: float, pairs: int) -> float:
        """The dimension that turns `rotations` times over the trained length."""
        length = self.original_positions / (rotations * 2 * math.pi)
        return 2 * pairs * math.log(length) / (2 * math.log(self.theta))


@dataclass(frozen=True, slots=True)
class LongScaling:
    """A factor for each frequency, one list up to the trained length and one beyond it
    (Ding et al., "LongRoPE", 2024). A model served beyond it uses the long list throughout."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_positions: int


@dataclass(frozen=True, slots=True)
class DynamicScaling:
    """A base that grows with the length beyond the trained one (NTK-aware scaling). A model
    served beyond it uses the base of the longest sequence throughout."""

    factor: float
    original_positions: int


RopeScaling = (
    LinearScaling | Llama3Scaling | FactorScaling | YarnScaling | LongScaling | DynamicScaling
)


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of the first `rotary_dim` elements of every head."""

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None = None
    magnitude: float = 1.0  # what cosine and sine are multiplied by
    # Whether the checkpoint's rows pair elements 2i and 2i + 1, not i and i + rotary_dim / 2.
    interleaved: bool = False

    def inverse_frequencies(self, positions: int) -> Tensor:
        """[rotary_dim / 2] float64, of a model that serves up to `positions` tokens."""
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64) / self.rotary_dim
        scaling = self.scaling
        if isinstance(scaling, DynamicScaling):
            length = max(positions, scaling.original_positions) / scaling.original_positions
            grown = scaling.factor * length - (scaling.factor - 1)
            theta = self.theta * grown ** (self.rotary_dim / (self.rotary_dim - 2))
            return torch.as_tensor(theta**-exponents)
        frequencies = torch.as_tensor(self.theta**-exponents)
        if isinstance(scaling, LongScaling):
            beyond = positions > scaling.original_positions
            return frequencies / torch.tensor(
                scaling.long if beyond else scaling.short, dtype=torch.float64
            )
        return frequencies if scaling is None else scaling.apply(frequencies)

    def table(self, positions: int) -> Tensor:
        """complex64 [positions, rotary_dim / 2]: see `shoal.kernels.rope.rope_table`."""
        table = rope_table(self.inverse_frequencies(positions), positions)
        return table if self.magnitude == 1.0 else table.mul_(self.magnitude)


def read_rope(
    config: Mapping[str, Any],
    parameters: Mapping[str, Any],
    head_dim: int,
    *,
    interleaved: bool = False,
) -> RopeSpec:
    """Rope from `parameters`, which are `rope_parameters` (transformers 5) or `rope_scaling`
    (before), and from the keys that older configurations keep beside them.

    Raises UnsupportedModel for a kind of scaling that is not known.
    """
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    share = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    rotary = int(head_dim * float(share))
    if kind == "su":  # Phi-3's first name for it
        kind = "longrope"
    scaling: RopeScaling | None = None
    magnitude = 1.0
    if kind == "linear":
        scaling = LinearScaling(float(need(parameters, "factor")))
    elif kind == "dynamic":
        positions = int(need(config, "max_position_embeddings"))
        scaling = DynamicScaling(float(need(parameters, "factor")), positions)
    elif kind == "llama3":
        scaling = Llama3Scaling(
            float(need(parameters, "factor")),
            float(need(parameters, "low_freq_factor")),
            float(need(parameters, "high_freq_factor")),
            int(need(parameters, "original_max_position_embeddings")),
        )
    elif kind == "yarn":
        scaling, magnitude = _yarn(config, parameters, theta)
    elif kind == "longrope":
        scaling, magnitude = _long(config, parameters)
    elif kind != "default":
        known = ", ".join(KINDS)
        raise UnsupportedModel(f"rope scaling {kind} is not supported; known are {known}")
    return RopeSpec(theta, rotary, scaling, magnitude, interleaved)


def trained_positions(config: Mapping[str, Any], rope: RopeSpec | None) -> int:
    """The longest sequence that a model is made for: what its scaling stretches the trained
    length to, where `max_position_embeddings` is still the trained length."""
    stated = int(need(config, "max_position_embeddings"))
    scaling = None if rope is None else rope.scaling
    if isinstance(scaling, YarnScaling | DynamicScaling):
        return max(stated, int(scaling.original_positions * scaling.factor))
    return stated


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn(
    config: Mapping[str, Any], parameters: Mapping[str, Any], theta: float
) -> tuple[YarnScaling, float]:
    stated = int(need(config, "max_position_embeddings"))
    original = int(parameters.get("original_max_position_embeddings") or stated)
    factor = float(parameters.get("factor") or stated / original)
    magnitude = parameters.get("attention_factor")
    if magnitude is None:
        numerator, denominator = parameters.get("mscale"), parameters.get("mscale_all_dim")
        magnitude = yarn_magnitude(factor)
        if numerator and denominator:
            magnitude = yarn_magnitude(factor, numerator) / yarn_magnitude(factor, denominator)
    scaling = YarnScaling(
        factor,
        original,
        theta,
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        whole_dimensions=bool(parameters.get("truncate", True)),
    )
    return scaling, float(magnitude)


def _long(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> tuple[LongScaling, float]:
    stated = int(need(config, "max_position_embeddings"))
    original = int(
        parameters.get("original_max_position_embeddings")
        or config.get("original_max_position_embeddings")
        or stated
    )
    factor = float(parameters.get("factor") or stated / original)
    magnitude = parameters.get("attention_factor")
    if magnitude is None:
        magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = (
        tuple(map(float, need(parameters, f"{which}_factor"))) for which in ("short", "long")
    )
    return LongScaling(short, long, original), float(magnitude)
