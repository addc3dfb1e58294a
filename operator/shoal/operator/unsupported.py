"""Fields whose feature this release does not have: named, never ignored.

The types hold every field of the API, so that a manifest written for a later release is
understood; what would have no effect here is refused with its path and value. A process of one
machine has less than a pod: what only a cluster can give is refused there.
"""

import json
from collections.abc import Iterator

from shoal.api.service import PodOverlay
from shoal.api.types import (
    ApiModel,
    CacheType,
    InferenceServiceSpec,
    ScalingDriver,
)
from shoal.operator.metadata import group_size
from shoal.operator.platform import LOCAL, Platform

MODEL_SCHEMES = ("py", "file", "hf")
# Paths that must keep their default: attribute names of the spec.
_NOT_YET = (
    ("model", "adapters"),
    ("engine", "kv_cache_dtype"),
    ("engine", "speculative"),
    ("engine", "deterministic"),
    ("cost",),
)
_PARALLEL = (("parallelism", "tensor"), ("parallelism", "pipeline"), ("parallelism", "executor"))
_GPUS = (("resources", "gpus_per_node"), ("resources", "gpu_resource"))
_PODS_ONLY = (("resources", "shm"),)
_DRIVER_SWITCHES = {
    ScalingDriver.HPA: "the operator serves no external metrics; set the chart's "
    "externalMetrics.enabled",
    ScalingDriver.KEDA: "the operator serves no scaler; set the chart's keda.enabled",
}
_QUANTIZATION = ("auto", "none", "int8")


def unsupported(spec: InferenceServiceSpec, platform: Platform = LOCAL) -> list[str]:
    """One sentence a field of `spec` that asks for what is not there; [] where none does."""
    return [
        *(f"not supported yet: {field}" for field in _not_yet(spec, platform)),
        *(f"only on Kubernetes: {field}" for field in _pods_only(spec, platform)),
        *(f"switched off: {field}" for field in _switched_off(spec, platform)),
    ]


def _not_yet(spec: InferenceServiceSpec, platform: Platform) -> Iterator[str]:
    scheme, separator, _ = spec.model.uri.partition("://")
    if separator and scheme not in MODEL_SCHEMES:
        yield f"spec.model.uri={spec.model.uri} (schemes: {', '.join(MODEL_SCHEMES)})"
    if spec.model.revision is not None and (not separator or scheme == "file"):
        yield f"spec.model.revision={spec.model.revision} (only py:// and hf:// have revisions)"
    if spec.engine.quantization not in _QUANTIZATION:
        yield f"spec.engine.quantization={spec.engine.quantization}"
    for path in _NOT_YET:
        yield from _differs(spec, path)
    if group_size(spec, platform.pods) > 1 and not platform.multi_node:
        for path in _PARALLEL:
            yield from (f"{field}{_gate('MultiNode', 'beta')}" for field in _differs(spec, path))
    if not (platform.gpus and spec.resources.gpus_per_node):
        gate = "" if platform.processes else _gate("GPU", "alpha")
        for path in _GPUS:
            yield from (f"{field}{gate}" for field in _differs(spec, path))


def _gate(name: str, stage: str) -> str:
    return f" (the operator's feature gate {name}, {stage}, is off)"


def _switched_off(spec: InferenceServiceSpec, platform: Platform) -> Iterator[str]:
    if platform.processes or spec.autoscaling is None:
        return
    driver = spec.autoscaling.driver
    if driver not in platform.drivers:
        yield f"spec.autoscaling.driver={driver} ({_DRIVER_SWITCHES[driver]})"


def _pods_only(spec: InferenceServiceSpec, platform: Platform) -> Iterator[str]:
    if not platform.processes:
        return
    if spec.autoscaling is not None and spec.autoscaling.driver not in platform.drivers:
        yield f"spec.autoscaling.driver={spec.autoscaling.driver} (here: internal)"
    if spec.cache.type is CacheType.PVC:
        yield f"spec.cache.type={spec.cache.type} (here: None or HostPath)"
    for path in _PODS_ONLY:
        yield from _differs(spec, path)
    if not _only_environment(spec.pod_overlay):
        here = "SHOAL_ variables in spec.containers[worker].env alone"
        yield f"spec.podOverlay (here: {here})"


def _only_environment(overlay: PodOverlay) -> bool:
    """Whether an overlay says no more than what a process can be given."""
    match overlay:
        case {"spec": {"containers": [{"name": "worker", "env": list(env), **rest}], **other}}:
            ours = all(
                isinstance(entry, dict)
                and entry.keys() == {"name", "value"}
                and str(entry["name"]).startswith("SHOAL_")
                for entry in env
            )
            return ours and not rest and not other and overlay.keys() == {"spec"}
    return not overlay


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
