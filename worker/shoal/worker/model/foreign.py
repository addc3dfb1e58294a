"""Decoders that are not of the registry, computed by transformers' own modules over our cache.

transformers lets attention be computed by whoever registers for it: every attention module hands
its queries, keys and values over, and they go to the paged cache and through paged attention as a
known family's do. All sequences of a step lie in one row, which only models whose other parts
look at one token at a time can bear; a comparison with transformers' own attention, made when the
model is loaded, tells.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shoal.kernels.attention import paged_attention, store_kv_
from shoal.kernels.flat import FlatBatch, Ints
from shoal.kernels.paged import CacheShape, PagedBatch, plan_batch
from shoal.worker.model.families import FULL, SLIDING
from shoal.worker.model.precision import Precision
from shoal.worker.model.reader import Checkpoint
from shoal.worker.model.spec import DecoderSpec, LayerSpec
from shoal.worker.model.weights import UnsupportedModel, WeightError

ATTENTION = "shoal_paged"
_STATE = "shoal_step"  # the attribute of attention modules that holds their model's step
_CHECKED = (11, 7)  # tokens of the prompts of the comparison
# How far its logits may be apart, in the units of their spread.
_TOLERANCES = {torch.float32: 0.01, torch.bfloat16: 0.3}
# What attention modules may hand over besides: masks are ours, and the rest says nothing new.
_KNOWN = {"attention_mask", "position_ids", "cache_position", "position_embeddings"}


@dataclass(slots=True)
class PagedStep:
    """The step that attention modules work on; one a model, set before each forward pass."""

    shape: CacheShape
    caches: list[Tensor]
    dtype: torch.dtype
    batch: FlatBatch | None = None
    plans: dict[int | None, PagedBatch] = field(default_factory=dict)  # by window

    def begin(self, batch: FlatBatch) -> None:
        self.batch, self.plans = batch, {}

    def plan(self, window: int | None) -> PagedBatch:
        batch = self.batch
        assert batch is not None, "a step has begun"
        if window not in self.plans:
            self.plans[window] = plan_batch(
                batch.start, batch.count, batch.tables, self.shape, self.dtype, window
            )
        return self.plans[window]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, tokens, head_dim], key and value
    [1, kv_heads, tokens, head_dim] -> [1, tokens, heads, value's head_dim], and no weights."""
    step: PagedStep = getattr(module, _STATE)
    for name, given in others.items():
        if isinstance(given, Tensor) and name not in _KNOWN:
            raise UnsupportedModel(f"{type(module).__name__} attends with {name}, which is unknown")
    plan, shape = step.plan(sliding_window or None), step.shape
    queries, keys, values = (part[0].transpose(0, 1) for part in (query, key, value))
    size, value_size = queries.shape[-1], values.shape[-1]
    if (keys.shape[1], size) != (shape.kv_heads, shape.head_dim) or value_size > size:
        raise UnsupportedModel(
            f"{type(module).__name__} has {keys.shape[1]} key heads of {size}, expected "
            f"{shape.kv_heads} of {shape.head_dim} in every layer"
        )
    if value_size < size:
        values = nn.functional.pad(values, (0, size - value_size))
    cache = step.caches[int(module.layer_idx)]  # type: ignore[arg-type]  # a module's plain attribute
    store_kv_(cache, torch.cat((keys, values), dim=1), plan, shape)
    scale = size**-0.5 if scaling is None else scaling
    out = paged_attention(queries.contiguous(), cache, plan, shape, scale, softcap)
    return out.view(1, len(out), -1, size)[..., :value_size], None


class ForeignBackend:
    """Implements `shoal.worker.model.backend.Backend`. What `forward` returns are logits."""

    def __init__(
        self,
        model: "ForeignModel",
        num_blocks: int,
        block_size: int,
    ) -> None:
        """Raises UnsupportedModel where the model cannot be computed so."""
        self.spec = spec = model.spec
        self.dtype = model.precision.name
        self._model = model.module
        self._shape = CacheShape(num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        caches = [self._shape.allocate(model.precision.cache) for _ in spec.layers]
        self._step = PagedStep(self._shape, caches, model.precision.compute)
        for module in self._model.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, _STATE, self._step)

    def forward(self, batch: FlatBatch, rows: Ints) -> Tensor:
        self._step.begin(batch)
        found: Tensor = self._model(
            input_ids=torch.from_numpy(batch.ids)[None],
            position_ids=torch.from_numpy(batch.positions)[None],
            use_cache=False,
            logits_to_keep=torch.from_numpy(rows),
        ).logits[0]
        return found.float()

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct windows of the layers of the last step."""
        return tuple(self._step.plans)

    def clear(self, blocks: Sequence[int]) -> None:
        which = torch.tensor(blocks)
        for cache in self._step.caches:
            by_block = cache.view(2 * self._shape.kv_heads, self._shape.num_blocks, -1)
            by_block.index_fill_(1, which, 0.0)

    def sibling(self, checkpoint: Checkpoint) -> "ForeignBackend":
        raise WeightError(
            f"{self.spec.architecture} is computed by transformers, whose weights are not swapped"
        )

    def weights(self) -> object:
        return dict(self._model.named_parameters())

    def close(self) -> None:
        self._step.caches = []


@dataclass(frozen=True, slots=True)
class ForeignModel:
    """A loaded module of transformers."""

    spec: DecoderSpec
    precision: Precision
    module: nn.Module

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.module.parameters())


def load_foreign(
    folder: Path, precision: Precision, clock: Callable[[], float] = time.perf_counter
) -> tuple[ForeignModel, float]:
    """Loads what transformers knows and the registry does not, and the seconds it took.

    Raises UnsupportedModel where transformers is not installed, does not know the architecture, or
    computes it in a way that the paged cache does not fit; WeightError for a broken checkpoint.
    """
    started = clock()
    try:
        import transformers
        from transformers.modeling_utils import AttentionInterface
    except ImportError as error:
        raise UnsupportedModel(
            "this architecture would run through transformers, which is not installed: "
            "pip install 'shoal[transformers]'"
        ) from error
    AttentionInterface.register(ATTENTION, attend)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # theirs
    try:
        module: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=precision.compute,
            attn_implementation=ATTENTION,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise UnsupportedModel(f"{folder}: transformers cannot load it either: {error}") from error
    spec = _spec(module)
    _check(module, spec, precision)
    return ForeignModel(spec, precision, module), clock() - started


def _spec(module: Any) -> DecoderSpec:
    """Sizes, as far as the cache, the memory plan and the sampler need them."""
    config = module.config.get_text_config(decoder=True)
    name = type(module).__name__
    if getattr(module.config, "quantization_config", None):
        raise UnsupportedModel(f"{name} is quantized, which is read of known architectures only")
    if not module._supports_attention_backend or module._is_stateful:
        raise UnsupportedModel(f"{name} keeps more than keys and values, or attends its own way")
    kinds = set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}
    if kinds:
        raise UnsupportedModel(f"{name} has layers of type {', '.join(sorted(kinds))}")
    heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    ends = config.eos_token_id
    generation = getattr(module.generation_config, "eos_token_id", None)
    return DecoderSpec(
        architecture=name,
        vocab_size=int(config.vocab_size),
        hidden_size=int(config.hidden_size),
        intermediate_size=int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size),
        layers=(LayerSpec(rope=None),) * int(config.num_hidden_layers),
        num_heads=heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(head_dim),
        norm_eps=0.0,
        max_positions=int(config.max_position_embeddings),
        eos_token_ids=tuple(dict.fromkeys((*_ids(ends), *_ids(generation)))),
        bos_token_id=next(iter(_ids(config.bos_token_id)), None),
    )


@torch.inference_mode()
def _check(module: Any, spec: DecoderSpec, precision: Precision) -> None:
    """Compares two sequences of one step, and a decode step of each, with transformers' own
    attention over each by itself. Raises UnsupportedModel where they differ."""
    generator = np.random.default_rng(0)
    texts = [generator.integers(3, spec.vocab_size, n + 1) for n in _CHECKED]
    module.set_attn_implementation("eager")
    wanted = torch.stack(
        [module(torch.from_numpy(text)[None], use_cache=False).logits[0, -1] for text in texts]
    ).float()
    module.set_attn_implementation(ATTENTION)
    backend = ForeignBackend(ForeignModel(spec, precision, module), 3, 16)
    tables, counts = np.array([[1], [2]]), np.array(_CHECKED)
    prompt = np.concatenate([text[:-1] for text in texts])
    backend.forward(FlatBatch.of(prompt, np.zeros(2, np.int64), counts, tables), np.arange(2))
    last = FlatBatch.of(np.array([t[-1] for t in texts]), counts, np.ones(2, np.int64), tables)
    found = backend.forward(last, np.arange(2))
    windows = set(backend.windows)
    backend.close()
    config = module.config.get_text_config(decoder=True)
    if _slides(config) and windows == {None}:
        raise UnsupportedModel(f"{spec.architecture} does not say which layers have a window")
    spread = float(wanted.std())
    most = float((found - wanted).abs().max())
    if not most <= _TOLERANCES[precision.compute] * spread:
        raise UnsupportedModel(
            f"{spec.architecture} does not give the same logits over a paged cache as over "
            f"transformers' own: they differ by {most:.3g} where they spread by {spread:.3g}"
        )


def _slides(config: Any) -> bool:
    """Whether some layer attends within a window."""
    if kinds := getattr(config, "layer_types", None):
        return SLIDING in kinds
    used = getattr(config, "use_sliding_window", True)
    return bool(used and getattr(config, "sliding_window", None))


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
