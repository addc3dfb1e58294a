"""No field of the API is taken and forgotten: each changes the plan, or is refused by name."""

from collections.abc import Iterator
from dataclasses import replace
from enum import Enum
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest

from shoal.api.rollout import CanarySpec, CanaryStep, RollbackSpec
from shoal.api.rules import violations
from shoal.api.scaling import AutoscalingSpec
from shoal.api.types import ApiModel, InferenceService, InferenceServiceSpec, InferenceServiceStatus
from shoal.operator.actions import SaveRevision
from shoal.operator.observe import EndpointView, Observed, ObservedPod, RouterView
from shoal.operator.plan import Plan, plan
from shoal.operator.platform import Platform
from shoal.operator.revision import Revision, revision_of
from shoal.operator.trials import Trials
from shoal.operator.unsupported import unsupported
from shoal.operator.webhooks import Webhooks
from tests.operator.conftest import CREATED, make_service

# This release quantizes nothing at load time, so `none` is what `auto` does.
_ALIKE = {("engine", "quantization", "none")}
# What no bound of a number tells: values that are quantities, addresses and the like.
_TEXTS = {"uri": "hf://org/other", "cpu": "3", "memory": "3Gi", "shm": "1Gi"}

# Sections that need a field of their own to mean anything.
_SECTIONS = {
    "autoscaling": AutoscalingSpec(max_replicas=1),
    "canary": CanarySpec(steps=(CanaryStep(weight=100),)),
    "rollback_to": RollbackSpec(revision="1234567890"),
}


def _kind(annotation: Any) -> Any:
    """The type itself, without `| None` and annotations."""
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(a for a in get_args(annotation) if a is not type(None))
    return annotation.__origin__ if get_origin(annotation) is Annotated else annotation


def _others(name: str, kind: Any, value: Any) -> list[Any]:
    """Values of the type that differ from `value`."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [member for member in kind if member is not value]
    if get_origin(kind) is Literal:
        return [choice for choice in get_args(kind) if choice != value]
    if kind is bool:
        return [not value]
    if kind is float:
        return [value / 2]
    if kind is int:
        # Where there is no default, some number that every bound allows.
        return [value + 1 if value is not None else 64]
    if kind is str:
        return [_TEXTS.get(name, "x-other")]
    return []


def _leaves(owner: ApiModel, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, another value) of every leaf. An optional section is one leaf: its presence."""
    for name, field in type(owner).model_fields.items():
        value, kind = getattr(owner, name), _kind(field.annotation)
        if isinstance(value, ApiModel):
            yield from _leaves(value, (*path, name))
        elif isinstance(kind, type) and issubclass(kind, ApiModel):
            yield (*path, name), _SECTIONS.get(name) or kind.model_construct()
        elif others := _others(name, kind, value):
            for other in others:
                if (*path, name, str(other)) not in _ALIKE:
                    yield (*path, name), other
        elif kind is str or not isinstance(value, dict):
            yield (*path, name), ("other",)
        else:
            yield (*path, name), {"spec": {"priorityClassName": "high"}}


def _with(model: ApiModel, path: tuple[str, ...], value: Any) -> Any:
    name, *rest = path
    below = _with(getattr(model, name), tuple(rest), value) if rest else value
    return model.model_copy(update={name: below})


ALL = Platform(multi_node=True, gpus=True)  # a cluster, every feature gate open
BASE = make_service(replicas=2)
LEAVES = list(_leaves(BASE.spec))


def _plans(service: InferenceService) -> list[Plan]:
    """What is decided where nothing is yet, in the middle of a rollout, and after a drain."""
    name = "0000000000"
    old = Revision(name, CREATED, BASE.spec)
    pods = tuple(
        ObservedPod(f"chat-00000-{n}", name, n, 0.0, address=f"h:{n}", ready=True) for n in range(2)
    )
    views = {pod.name: EndpointView(str(pod.address), True, 1) for pod in pods}
    rollout = Observed(pods=pods, routers=(RouterView(1, views),), revisions=(old,))
    draining = replace(rollout, pods=tuple(replace(p, drain_started=0.0) for p in pods))
    served = replace(rollout, status=InferenceServiceStatus(active_revision=name))
    trials = Trials(ALL, Webhooks(lambda: 0.0))
    tried = replace(served, trial=trials.look("chat", service, served, 61.0))
    return [plan(service, seen, 61.0, ALL) for seen in (Observed(), rollout, draining, tried)]


def _told(plans: list[Plan], revision: str) -> str:
    """The actions, with the revision's name left out: a hash that changes is no effect."""
    actions = [a for p in plans for a in p.actions if not isinstance(a, SaveRevision)]
    text = repr(actions)
    return text.replace(revision, "REVISION").replace(revision[:5], "SHORT")


@pytest.mark.parametrize(
    "path, value", LEAVES, ids=[f"{'.'.join(path)}={value!r:.30}" for path, value in LEAVES]
)
def test_a_field_counts_or_is_refused(path: tuple[str, ...], value: Any) -> None:
    """Any other value than the default is seen in what the planner does."""
    spec: InferenceServiceSpec = _with(BASE.spec, path, value)
    service = BASE.model_copy(update={"spec": spec})
    if unsupported(spec, ALL) or violations(service):
        return
    before, after = _plans(BASE), _plans(service)
    assert _told(before, revision_of(BASE.spec)) != _told(after, revision_of(spec))


def test_the_walk_sees_every_section() -> None:
    """A walk that stops early would prove nothing."""
    tops = {path[0] for path, _ in LEAVES}
    assert tops == set(InferenceServiceSpec.model_fields)
    assert {path[1] for path, _ in LEAVES if path[0] == "engine"} == set(
        type(BASE.spec.engine).model_fields
    )
