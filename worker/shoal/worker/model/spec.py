"""What a decoder looks like: everything that tells one family from another, as data."""

import enum
from dataclasses import dataclass

from shoal.worker.model.names import LLAMA, Names
from shoal.worker.model.rope import RopeSpec
from shoal.worker.model.weights import UnsupportedModel


class NormKind(enum.Enum):
    """What is computed of each row before it is scaled by the norm's weights."""

    RMS = enum.auto()
    RMS_PLUS_ONE = enum.auto()  # weights are stored around zero (Gemma)
    LAYER = enum.auto()  # centred, with a bias
    LAYER_NO_BIAS = enum.auto()  # centred (Cohere)
    BARE = enum.auto()  # centred, without weights (OLMo)


class QkNorm(enum.Enum):
    """What queries and keys are normed over before they are rotated."""

    HEAD = enum.auto()  # each head by itself
    ALL_HEADS = enum.auto()  # all heads of a token together


class Residual(enum.Enum):
    """What the MLP of a layer reads."""

    SEQUENTIAL = enum.auto()  # the residual with attention added
    PARALLEL = enum.auto()  # the residual that attention read, through a norm of its own
    PARALLEL_SHARED = enum.auto()  # what attention read, normed once for both


class Activation(enum.Enum):
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"
    RELU_SQUARED = "relu_squared"


class Scoring(enum.Enum):
    """How a router's logits become scores."""

    SOFTMAX = enum.auto()
    SIGMOID = enum.auto()


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """A mixture of experts: each token goes through the `per_token` experts of highest score."""

    count: int
    per_token: int
    inner: int
    renormalize: bool  # the chosen scores sum to one
    scoring: Scoring = Scoring.SOFTMAX
    scale: float = 1.0  # of the chosen scores
    # Only experts of the `groups_kept` best of `groups` groups are chosen from. A group's score is
    # the sum of its `group_best` best.
    groups: int = 1
    groups_kept: int = 1
    group_best: int = 1
    correction: bool = False  # a bias that is added for choosing, not for weighing
    shared_inner: int | None = None  # of an expert that every token goes through
    shared_gate: bool = False  # its output is weighed by the sigmoid of a row of its own


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek-V2): keys and values are projections of one small
    vector a token, beside one rotated key that all heads share."""

    query_rank: int | None  # None: queries are projected from the hidden state at once
    kv_rank: int
    plain_dim: int  # of a head's query and key, not rotated
    rotary_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """In what layers of one model may differ."""

    rope: RopeSpec | None  # None: positions are not seen in this layer
    window: int | None = None  # a token sees itself and the `window - 1` before it
    experts: bool = False


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder-only transformer."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[LayerSpec, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    tied_embeddings: bool = False
    norm: NormKind = NormKind.RMS
    pre_norm: bool = True  # attention and MLP read a normed residual
    post_norm: bool = False  # what they return is normed before it is added
    residual: Residual = Residual.SEQUENTIAL
    qk_norm: QkNorm | None = None
    clip_qkv: float | None = None  # bound on the magnitude of queries, keys and values
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    activation: Activation = Activation.SILU
    gated: bool = True  # act(gate(x)) * up(x), not act(up(x))
    attention_scale: float | None = None  # of the scores; None: head_dim ** -0.5
    attention_softcap: float | None = None  # scores are cap * tanh(score / cap)
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what a layer adds to the residual
    learned_positions: int | None = None  # rows of a table that is added to the embeddings
    experts: ExpertsSpec | None = None
    latent: LatentSpec | None = None
    spare_layers: int = 0  # stored behind the last, to predict further tokens; not computed
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    names: Names = LLAMA

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        for name in (*sizes, "num_kv_heads", "head_dim", "max_positions"):
            if getattr(self, name) < 1:
                raise UnsupportedModel(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModel(
                f"num_heads is {self.num_heads}, not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        for rope in self.ropes:
            if rope.rotary_dim % 2 or not 0 < rope.rotary_dim <= self.head_dim:
                raise UnsupportedModel(
                    f"rotary_dim is {rope.rotary_dim}, expected an even number up to head_dim "
                    f"{self.head_dim}"
                )

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The distinct rotary embeddings of all layers."""
        return tuple(dict.fromkeys(layer.rope for layer in self.layers if layer.rope is not None))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct windows of all layers."""
        return tuple(dict.fromkeys(layer.window for layer in self.layers))

    @property
    def score_scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def value_dim(self) -> int:
        """Elements of a head's value; the cache keeps `head_dim` for it."""
        return self.head_dim if self.latent is None else self.latent.value_dim

    @property
    def input_widths(self) -> tuple[int, ...]:
        """How many inputs the matrices have that quantization rounds."""
        widths = [self.hidden_size, self.num_heads * self.value_dim, self.intermediate_size]
        if self.experts is not None:
            widths += [self.experts.inner, self.experts.shared_inner or self.experts.inner]
        if self.latent is not None:
            widths += [self.latent.kv_rank, self.latent.query_rank or self.latent.kv_rank]
        return tuple(dict.fromkeys(widths))
