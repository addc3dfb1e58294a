"""Fields whose feature this release does not have: named, never ignored.

The types hold every field of the API, so that a manifest written for a later release is
understood; what would have no effect here is refused with its path and value.
"""

import json
from collections.abc import Iterator

from shoal.api.types import ApiModel, InferenceServiceSpec, RolloutStrategy

MODEL_SCHEMES = ("py", "file", "hf")
# Paths that must keep their default: attribute names of the spec.
_NOT_YET = (
    ("model", "adapters"),
    ("engine", "kv_cache_dtype"),
    ("engine", "speculative"),
    ("engine", "deterministic"),
    ("parallelism", "tensor"),
    ("parallelism", "pipeline"),
    ("resources", "gpus_per_node"),
    ("resources", "gpu_resource"),
    ("resources", "shm"),
    ("autoscaling",),
    ("rollout", "in_flight"),
    ("rollout", "canary"),
    ("cost",),
    ("cache",),
    ("pod_overlay",),
)
_QUANTIZATION = ("auto", "none")
_EXECUTORS = ("auto",)


def unsupported(spec: InferenceServiceSpec) -> list[str]:
    """One sentence a field of `spec` that asks for something not built yet; [] where none does."""
    return [f"not supported yet: {field}" for field in _fields(spec)]


def _fields(spec: InferenceServiceSpec) -> Iterator[str]:
    scheme, separator, _ = spec.model.uri.partition("://")
    if separator and scheme not in MODEL_SCHEMES:
        yield f"spec.model.uri={spec.model.uri} (schemes: {', '.join(MODEL_SCHEMES)})"
    if spec.model.revision is not None and (not separator or scheme == "file"):
        yield f"spec.model.revision={spec.model.revision} (only py:// and hf:// have revisions)"
    if spec.engine.quantization not in _QUANTIZATION:
        yield f"spec.engine.quantization={spec.engine.quantization}"
    if spec.parallelism.executor not in _EXECUTORS:
        yield f"spec.parallelism.executor={spec.parallelism.executor}"
    if spec.rollout.strategy is not RolloutStrategy.ROLLING_UPDATE:
        yield f"spec.rollout.strategy={spec.rollout.strategy}"
    for path in _NOT_YET:
        yield from _differs(spec, path)


def _differs(spec: InferenceServiceSpec, path: tuple[str, ...]) -> Iterator[str]:
    """The field at `path` with its value, if that is not the default."""
    owner: ApiModel = spec
    for name in path[:-1]:
        owner = getattr(owner, name)
    value = getattr(owner, path[-1])
    field = type(owner).model_fields[path[-1]]
    if value == field.get_default(call_default_factory=False):
        return
    dotted = ".".join(_alias(spec, path))
    # A whole section is named alone: its keys are many.
    match value:
        case str():
            yield f"spec.{dotted}={value}"
        case bool() | int() | float():
            yield f"spec.{dotted}={json.dumps(value)}"
        case _:
            yield f"spec.{dotted}"


def _alias(spec: InferenceServiceSpec, path: tuple[str, ...]) -> Iterator[str]:
    owner: ApiModel = spec
    for name in path:
        yield type(owner).model_fields[name].alias or name
        owner = getattr(owner, name)
