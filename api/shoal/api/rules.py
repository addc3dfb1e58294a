"""Rules between fields, each written once: CEL for the API server, Python for everybody else.

A rule looks at the part of the document at `scope` and holds or not. Its message is a template
with one `%s` for each of `values`, which both languages fill in.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic.alias_generators import to_camel

from shoal.api import names
from shoal.api.base import ApiModel
from shoal.api.quantity import to_bytes
from shoal.api.rollout import CanarySpec, InFlight, RolloutSpec, RolloutStrategy
from shoal.api.scaling import (
    AutoscalingSpec,
    MetricSpec,
    MetricType,
    ScalingDriver,
)
from shoal.api.service import InferenceService, InferenceServiceSpec, PodOverlay
from shoal.api.workload import (
    CacheSpec,
    CacheType,
    EngineSpec,
    ModelSpec,
    ResourcesSpec,
    SpeculativeMethod,
    SpeculativeSpec,
)

URI_SCHEMES = ("hf", "s3", "gs", "https", "oci", "pvc", "file", "py")
_URI = f"^({'|'.join(URI_SCHEMES)})://."
_NAME = "^[a-z]([a-z0-9-]*[a-z0-9])?$"
_OWN_LABELS = (
    f"{names.GROUP}/",
    names.LABEL_NAME,
    names.LABEL_MANAGED_BY,
    names.LABEL_COMPONENT,
)
# A cache becomes the worker's own folder: not one that a system needs, and no way out of it.
_SYSTEM_FOLDER = (
    "^/*((bin|boot|dev|etc|home|lib|lib64|opt|proc|root|run|sbin|srv|sys|tmp|usr"
    "|var(/+(lib|log|run|tmp))?)/*)?$"
)
_LEADS_UP = "(^|/)[.][.](/|$)"


@dataclass(frozen=True, slots=True)
class Value:
    """Something that a message shows: as CEL over `self`, and as Python over the same part."""

    cel: str
    get: Callable[[Any], object]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. `holds` and `cel` decide the same; `general` is the message without values,
    which the API server falls back on."""

    scopes: tuple[str, ...]  # dotted camelCase paths; "" is the document, "[]" every element
    field: str  # the culprit within the scope, dotted; "" is the scope itself
    cel: str
    holds: Callable[[Any], bool]
    message: str
    general: str
    values: tuple[Value, ...]

    @property
    def message_cel(self) -> str:
        """The message as a CEL expression."""
        return f"'{self.message}'.format([{', '.join(value.cel for value in self.values)}])"

    def message_for(self, part: Any) -> str:
        """The message about one part that breaks the rule."""
        return self.message % tuple(value.get(part) for value in self.values)


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that a document breaks: the dotted path of the culprit, and the sentence."""

    path: str
    message: str


def _listed(items: Iterable[object]) -> str:
    """A list as CEL's format shows it."""
    return json.dumps(list(items), ensure_ascii=False)


def _layout_holds(spec: InferenceServiceSpec) -> bool:
    gpus, tensor = spec.resources.gpus_per_node, spec.parallelism.tensor
    if gpus == 0:
        return True
    whole_nodes = (tensor * spec.parallelism.pipeline) % gpus == 0
    return whole_nodes and (tensor % gpus == 0 or gpus % tensor == 0)


def _model_ids_differ(model: ModelSpec) -> bool:
    own = set(model.aliases)
    if model.name is not None:
        if model.name in own:
            return False
        own.add(model.name)
    return not any(adapter.name in own for adapter in model.adapters)


def _weights_rise_to_100(canary: CanarySpec) -> bool:
    weights = [step.weight for step in canary.steps]
    return not weights or (weights == sorted(set(weights)) and weights[-1] == 100)


def _cache_is_whole(cache: CacheSpec) -> bool:
    needs_claim, needs_path = cache.type is CacheType.PVC, cache.type is CacheType.HOST_PATH
    return (cache.claim_name is not None) == needs_claim and (cache.path is not None) == needs_path


def _cache_is_own_folder(cache: CacheSpec) -> bool:
    path = cache.path
    return path is None or not (re.search(_SYSTEM_FOLDER, path) or re.search(_LEADS_UP, path))


def _gpu_resource_is_used(resources: ResourcesSpec) -> bool:
    default = ResourcesSpec.model_fields["gpu_resource"].default
    return resources.gpus_per_node > 0 or bool(resources.gpu_resource == default)


def _shm_fits(resources: ResourcesSpec) -> bool:
    if resources.shm is None or resources.memory is None:
        return True
    return to_bytes(resources.shm) < to_bytes(resources.memory)


def _overlay_labels(overlay: PodOverlay) -> dict[str, str]:
    return overlay.get("metadata", {}).get("labels", {})


def _speculative_is_whole(speculative: SpeculativeSpec) -> bool:
    return (speculative.draft_model is not None) == (speculative.method is SpeculativeMethod.DRAFT)


def _kv_target_is_share(metric: MetricSpec) -> bool:
    return metric.type is not MetricType.KV_UTILIZATION or metric.target <= 1


def _prefill_fits(engine: EngineSpec) -> bool:
    return (
        engine.max_prefill_tokens is None or engine.max_prefill_tokens <= engine.max_batched_tokens
    )


def _bounds_hold(autoscaling: AutoscalingSpec) -> bool:
    return autoscaling.min_replicas <= autoscaling.max_replicas


def _zero_has_a_way_back(autoscaling: AutoscalingSpec) -> bool:
    return autoscaling.min_replicas > 0 or autoscaling.scale_to_zero is not None


def _driver_knows_zero(autoscaling: AutoscalingSpec) -> bool:
    return autoscaling.driver is not ScalingDriver.HPA or autoscaling.scale_to_zero is None


def _canary_has_a_stable_side(rollout: RolloutSpec) -> bool:
    return rollout.canary is None or rollout.strategy is not RolloutStrategy.BLUE_GREEN


def _blue_green_counts(rollout: RolloutSpec) -> bool:
    return rollout.blue_green is None or rollout.strategy is RolloutStrategy.BLUE_GREEN


def _in_flight_counts(rollout: RolloutSpec) -> bool:
    return rollout.in_flight is InFlight.FINISH or rollout.strategy is RolloutStrategy.IN_PLACE


def _rollout_can_move(rollout: RolloutSpec) -> bool:
    return rollout.max_surge > 0 or rollout.max_unavailable > 0


_SELF = Value("self", lambda part: part)
_STRATEGY = Value("self.strategy", lambda rollout: rollout.strategy)

RULES: tuple[Rule, ...] = (
    Rule(
        scopes=("",),
        field="metadata.name",
        cel=f"size(self.metadata.name) <= {names.NAME_MAX_LENGTH}",
        holds=lambda service: len(service.metadata.name) <= names.NAME_MAX_LENGTH,
        message=f"the name is %s characters long, at most {names.NAME_MAX_LENGTH} are allowed, "
        "because pods add revision and number to it; choose a shorter one",
        general=f"the name may have at most {names.NAME_MAX_LENGTH} characters, "
        "because pods add revision and number to it",
        values=(Value("size(self.metadata.name)", lambda service: len(service.metadata.name)),),
    ),
    Rule(
        scopes=("",),
        field="metadata.name",
        cel=f"self.metadata.name.matches('{_NAME}')",
        holds=lambda service: re.fullmatch(_NAME, service.metadata.name) is not None,
        message='the name "%s" must be lower-case letters, digits and "-", begin with a letter '
        "and end with a letter or digit, because it names Services",
        general='the name must be lower-case letters, digits and "-", begin with a letter '
        "and end with a letter or digit, because it names Services",
        values=(Value("self.metadata.name", lambda service: service.metadata.name),),
    ),
    Rule(
        scopes=(
            "spec.model.uri",
            "spec.model.adapters[].uri",
            "spec.engine.speculative.draftModel",
        ),
        field="",
        cel=f"self.matches('{_URI}')",
        holds=lambda uri: re.match(_URI, uri) is not None,
        message='"%s" has no scheme that Shoal knows; begin with one of '
        + ", ".join(f"{scheme}://" for scheme in URI_SCHEMES),
        general="the URI must begin with one of "
        + ", ".join(f"{scheme}://" for scheme in URI_SCHEMES),
        values=(_SELF,),
    ),
    Rule(
        scopes=("spec.model",),
        field="",
        cel="(!has(self.name) || !self.aliases.exists(a, a == self.name)) && "
        "!self.adapters.exists(d, self.aliases.exists(a, a == d.name) || "
        "(has(self.name) && d.name == self.name))",
        holds=_model_ids_differ,
        message="a model id is given twice among the name, the aliases %s and the adapters %s; "
        "each may be given once",
        general="the name, the aliases and the adapters' names are all model ids; "
        "each may be given once",
        values=(
            Value("self.aliases", lambda model: _listed(model.aliases)),
            Value(
                "self.adapters.map(d, d.name)",
                lambda model: _listed(a.name for a in model.adapters),
            ),
        ),
    ),
    Rule(
        scopes=("spec.engine",),
        field="maxPrefillTokens",
        cel="!has(self.maxPrefillTokens) || self.maxPrefillTokens <= self.maxBatchedTokens",
        holds=_prefill_fits,
        message="maxPrefillTokens %s is more than maxBatchedTokens %s, the tokens of a whole step; "
        "lower the one or raise the other",
        general="maxPrefillTokens may not be more than maxBatchedTokens",
        values=(
            Value("self.maxPrefillTokens", lambda engine: engine.max_prefill_tokens),
            Value("self.maxBatchedTokens", lambda engine: engine.max_batched_tokens),
        ),
    ),
    Rule(
        scopes=("spec.engine.speculative",),
        field="draftModel",
        cel="has(self.draftModel) == (self.method == 'draft')",
        holds=_speculative_is_whole,
        message="draftModel is needed with method draft and allowed with no other, "
        "but method is %s",
        general="draftModel is needed with method draft and allowed with no other",
        values=(Value("self.method", lambda speculative: speculative.method),),
    ),
    Rule(
        scopes=("spec",),
        field="parallelism",
        cel="self.resources.gpusPerNode == 0 || "
        "((self.parallelism.tensor * self.parallelism.pipeline) % self.resources.gpusPerNode == 0 "
        "&& (self.parallelism.tensor % self.resources.gpusPerNode == 0 "
        "|| self.resources.gpusPerNode % self.parallelism.tensor == 0))",
        holds=_layout_holds,
        message="tensor %s x pipeline %s cannot be laid on nodes of gpusPerNode %s: "
        "the product must fill whole nodes, and tensor must divide gpusPerNode or be a multiple "
        "of it",
        general="tensor x pipeline must fill whole nodes of resources.gpusPerNode GPUs, "
        "and tensor must divide gpusPerNode or be a multiple of it",
        values=(
            Value("self.parallelism.tensor", lambda spec: spec.parallelism.tensor),
            Value("self.parallelism.pipeline", lambda spec: spec.parallelism.pipeline),
            Value("self.resources.gpusPerNode", lambda spec: spec.resources.gpus_per_node),
        ),
    ),
    Rule(
        scopes=("spec.autoscaling",),
        field="minReplicas",
        cel="self.minReplicas <= self.maxReplicas",
        holds=_bounds_hold,
        message="minReplicas %s is more than maxReplicas %s; lower the one or raise the other",
        general="minReplicas may not be more than maxReplicas",
        values=(
            Value("self.minReplicas", lambda autoscaling: autoscaling.min_replicas),
            Value("self.maxReplicas", lambda autoscaling: autoscaling.max_replicas),
        ),
    ),
    Rule(
        scopes=("spec.autoscaling",),
        field="minReplicas",
        cel="self.minReplicas > 0 || has(self.scaleToZero)",
        holds=_zero_has_a_way_back,
        message="minReplicas %s needs scaleToZero, which says when the last replica goes and how "
        "requests wait for it; add scaleToZero: {} or set minReplicas to 1 or more",
        general="minReplicas 0 needs scaleToZero; add scaleToZero: {} or set minReplicas to 1",
        values=(Value("self.minReplicas", lambda autoscaling: autoscaling.min_replicas),),
    ),
    Rule(
        scopes=("spec.autoscaling",),
        field="scaleToZero",
        cel="self.driver != 'hpa' || !has(self.scaleToZero)",
        holds=_driver_knows_zero,
        message="scaleToZero does not go with driver %s, as a HorizontalPodAutoscaler keeps at "
        "least one replica; leave it out, or choose driver internal or keda",
        general="scaleToZero does not go with driver hpa; choose driver internal or keda",
        values=(Value("self.driver", lambda autoscaling: autoscaling.driver),),
    ),
    Rule(
        scopes=("spec.autoscaling.metrics[]",),
        field="target",
        cel="self.type != 'KvUtilization' || self.target <= 1.0",
        holds=_kv_target_is_share,
        message="target %s is too large: KvUtilization is a share, at most 1",
        general="the target of KvUtilization is a share, at most 1",
        values=(Value("self.target", lambda metric: f"{metric.target:g}"),),
    ),
    Rule(
        scopes=("spec.rollout",),
        field="maxSurge",
        cel="self.maxSurge > 0 || self.maxUnavailable > 0",
        holds=_rollout_can_move,
        message="maxSurge %s and maxUnavailable %s leave a rollout no room to move; "
        "set one of them to 1 or more",
        general="maxSurge and maxUnavailable may not both be 0",
        values=(
            Value("self.maxSurge", lambda rollout: rollout.max_surge),
            Value("self.maxUnavailable", lambda rollout: rollout.max_unavailable),
        ),
    ),
    Rule(
        scopes=("spec.rollout",),
        field="canary",
        cel="!has(self.canary) || self.strategy != 'BlueGreen'",
        holds=_canary_has_a_stable_side,
        message="canary does not go with strategy %s, which switches all requests at once; "
        "leave one of the two out",
        general="canary does not go with strategy BlueGreen; leave one of the two out",
        values=(_STRATEGY,),
    ),
    Rule(
        scopes=("spec.rollout",),
        field="blueGreen",
        cel="!has(self.blueGreen) || self.strategy == 'BlueGreen'",
        holds=_blue_green_counts,
        message="blueGreen has no effect with strategy %s; leave it out, or choose BlueGreen",
        general="blueGreen has no effect without strategy BlueGreen",
        values=(_STRATEGY,),
    ),
    Rule(
        scopes=("spec.rollout",),
        field="inFlight",
        cel="self.inFlight == 'finish' || self.strategy == 'InPlace'",
        holds=_in_flight_counts,
        message="inFlight %s has no effect with strategy %s; leave it out, or choose InPlace",
        general="inFlight has no effect without strategy InPlace",
        values=(Value("self.inFlight", lambda rollout: rollout.in_flight), _STRATEGY),
    ),
    Rule(
        scopes=("spec.rollout.canary",),
        field="steps",
        # No steps at all are the schema's to refuse.
        cel="size(self.steps) == 0 || (self.steps[size(self.steps) - 1].weight == 100 && "
        "self.steps.map(s, s.weight).isSorted() && "
        "self.steps.all(s, self.steps.exists_one(t, t.weight == s.weight)))",
        holds=_weights_rise_to_100,
        message="the weights %s must rise from step to step and end at 100",
        general="the weights of the steps must rise from step to step and end at 100",
        values=(
            Value(
                "self.steps.map(s, s.weight)",
                lambda canary: _listed(step.weight for step in canary.steps),
            ),
        ),
    ),
    Rule(
        scopes=("spec.cache",),
        field="",
        cel="has(self.claimName) == (self.type == 'PVC') && "
        "has(self.path) == (self.type == 'HostPath')",
        holds=_cache_is_whole,
        message="type %s: type PVC needs claimName, type HostPath needs path, "
        "and neither field goes with another type",
        general="type PVC needs claimName, type HostPath needs path, "
        "and neither field goes with another type",
        values=(Value("self.type", lambda cache: cache.type),),
    ),
    Rule(
        scopes=("spec.cache",),
        field="path",
        cel=f"!has(self.path) || !(self.path.matches('{_SYSTEM_FOLDER}') || "
        f"self.path.matches('{_LEADS_UP}'))",
        holds=_cache_is_own_folder,
        message="%s may not be the cache, which workers take for their own; "
        "name a folder of its own, such as /var/lib/shoal, and without ..",
        general="the path must be a folder of its own, such as /var/lib/shoal, "
        "not one that the system needs, and without ..",
        values=(Value("self.path", lambda cache: cache.path),),
    ),
    Rule(
        scopes=("spec.resources",),
        field="gpuResource",
        cel="self.gpusPerNode > 0 || self.gpuResource == 'nvidia.com/gpu'",
        holds=_gpu_resource_is_used,
        message="gpuResource %s has no effect while gpusPerNode is %s; "
        "say how many GPUs each pod gets",
        general="gpuResource has no effect while gpusPerNode is 0; set gpusPerNode too",
        values=(
            Value("self.gpuResource", lambda resources: resources.gpu_resource),
            Value("self.gpusPerNode", lambda resources: resources.gpus_per_node),
        ),
    ),
    Rule(
        scopes=("spec.resources",),
        field="shm",
        cel="!has(self.shm) || !has(self.memory) || "
        "quantity(string(self.shm)).isLessThan(quantity(string(self.memory)))",
        holds=_shm_fits,
        message="shm %s must be less than memory %s: what lies in /dev/shm counts as memory",
        general="shm must be less than memory: what lies in /dev/shm counts as memory",
        values=(
            Value("self.shm", lambda resources: resources.shm),
            Value("self.memory", lambda resources: resources.memory),
        ),
    ),
    Rule(
        scopes=("spec.podOverlay",),
        field="metadata.labels",
        cel="!has(self.metadata) || !has(self.metadata.labels) || "
        "!self.metadata.labels.exists(k, "
        + " || ".join(f"k.startsWith('{own}')" for own in _OWN_LABELS)
        + ")",
        holds=lambda overlay: (
            not any(key.startswith(own) for key in _overlay_labels(overlay) for own in _OWN_LABELS)
        ),
        message="the overlay sets %s labels, of which some are set by Shoal itself ("
        + ", ".join(_OWN_LABELS)
        + "); leave those out",
        general="the overlay may not set the labels that Shoal sets itself: "
        + ", ".join(_OWN_LABELS),
        values=(
            Value("size(self.metadata.labels)", lambda overlay: len(_overlay_labels(overlay))),
        ),
    ),
)


def _parts(root: Any, scope: str) -> Iterator[tuple[str, Any]]:
    """The parts of a document at `scope` that are there, each with its path."""
    found: list[tuple[str, Any]] = [("", root)]
    for step in filter(None, scope.split(".")):
        key = step.removesuffix("[]")
        below = []
        for path, part in found:
            value = _get(part, key)
            path = f"{path}.{key}".lstrip(".")
            if step.endswith("[]"):
                below += [(f"{path}[{i}]", item) for i, item in enumerate(value)]
            elif value is not None:
                below.append((path, value))
        found = below
    yield from found


def _get(part: ApiModel, key: str) -> Any:
    return getattr(part, _attributes(type(part))[key])


@cache
def _attributes(model: type[ApiModel]) -> Mapping[str, str]:
    """A type's attributes by the keys they have in documents."""
    return {to_camel(name): name for name in model.model_fields}


def violations(service: InferenceService) -> tuple[Violation, ...]:
    """What is wrong between the fields of a service whose fields are right each alone."""
    return tuple(
        Violation(".".join(filter(None, (path, rule.field))), rule.message_for(part))
        for rule in RULES
        for scope in rule.scopes
        for path, part in _parts(service, scope)
        if not rule.holds(part)
    )
