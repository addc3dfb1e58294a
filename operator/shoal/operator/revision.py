"""Revisions: names for everything that changes a worker.

Two specs have one revision if their workers are interchangeable. What only the router or the
operator acts on (names, replicas, routing, rollout, prices) is left out, and so are defaults: a
field that is spelled out as its default, or that a later release adds, changes nothing. What the
operator's own configuration says about every pod counts, as it changes workers too.
"""

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any, Final

from shoal.api.quantity import parse_quantity
from shoal.api.types import InferenceServiceSpec
from shoal.operator.platform import PodDefaults

REVISION_LENGTH: Final = 10
_WORKER: Final[dict[str, bool | set[str]]] = {
    "model": {"uri", "revision", "adapters"},
    "engine": True,
    "parallelism": True,
    "resources": True,
    "cache": True,
    "pod_overlay": True,
}
_QUANTITIES: Final = ("cpu", "memory", "shm")


@dataclass(frozen=True, slots=True)
class Revision:
    """A revision and what it was made from, so that its pods can be made again."""

    name: str
    created: datetime
    spec: InferenceServiceSpec
    pods: PodDefaults = field(default_factory=PodDefaults)

    def to_document(self) -> dict[str, Any]:
        spec = self.spec.model_dump(by_alias=True, exclude_unset=True, mode="json")
        document = {"name": self.name, "created": self.created.isoformat(), "spec": spec}
        pods = self.pods.to_document()
        return {**document, "podDefaults": pods} if pods else document

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> "Revision":
        """Reads what `to_document` made; ValueError or KeyError for anything else."""
        return cls(
            document["name"],
            datetime.fromisoformat(document["created"]).astimezone(UTC),
            InferenceServiceSpec.model_validate(document["spec"]),
            PodDefaults.from_document(document.get("podDefaults", {})),
        )


def revision_of(spec: InferenceServiceSpec, pods: PodDefaults = PodDefaults()) -> str:  # noqa: B008
    """The revision of a spec under an operator's pod defaults: 10 hexadecimal digits."""
    form = _normal_form(spec)
    if defaults := pods.to_document():
        form["podDefaults"] = defaults
    text = json.dumps(form, sort_keys=True, separators=(",", ":"))
    return blake2b(text.encode(), digest_size=REVISION_LENGTH // 2).hexdigest()


def _normal_form(spec: InferenceServiceSpec) -> dict[str, Any]:
    worker: dict[str, Any] = spec.model_dump(
        by_alias=True, mode="json", exclude_defaults=True, include=_WORKER
    )
    resources = worker.get("resources", {})
    for name in _QUANTITIES:
        if name in resources:
            resources[name] = f"{parse_quantity(resources[name]).normalize():f}"
    return {key: value for key, value in worker.items() if value != {}}


def differing_fields(one: Revision, other: Revision) -> tuple[str, ...]:
    """What two revisions' workers differ in, as paths; () where only the model's files do."""
    first, second = _normal_form(one.spec), _normal_form(other.spec)
    for form in (first, second):
        form["model"] = {k: v for k, v in form["model"].items() if k not in ("uri", "revision")}
    fields = sorted(f"spec.{k}" for k in {*first, *second} if first.get(k) != second.get(k))
    return (*fields, *(["the operator's pod defaults"] if one.pods != other.pods else []))
