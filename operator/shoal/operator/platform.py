"""Where the workers run, and what the operator's own configuration says about every pod.

Pods are either pods of a cluster or processes of this machine; what a process cannot have (a
volume claim, an overlay) is refused there by name. `PodDefaults` belong to a revision, as they
change its workers: another worker image is rolled out like any other change.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from shoal.api.types import InferenceService, ScalingDriver
from shoal.operator.overlay import overlay_problems

DEFAULT_IMAGE: Final = "shoal-worker"
_PULL_POLICIES: Final = ("Always", "IfNotPresent", "Never")


@dataclass(frozen=True, slots=True)
class PodDefaults:
    """What every worker pod has before its service says anything."""

    image: str = DEFAULT_IMAGE
    image_pull_policy: str | None = None
    image_pull_secrets: tuple[str, ...] = ()
    service_account_name: str | None = None
    # All ranks of a replica are processes of one pod, however many GPUs it has.
    whole_replicas: bool = False
    # A partial pod template, merged before the service's own overlay.
    pod_overlay: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def to_document(self) -> dict[str, Any]:
        """As in a file; only what differs from the defaults, so that `{}` means none."""
        document: dict[str, Any] = {}
        if self.image != DEFAULT_IMAGE:
            document["image"] = self.image
        if self.image_pull_policy is not None:
            document["imagePullPolicy"] = self.image_pull_policy
        if self.image_pull_secrets:
            document["imagePullSecrets"] = [{"name": name} for name in self.image_pull_secrets]
        if self.service_account_name is not None:
            document["serviceAccountName"] = self.service_account_name
        if self.whole_replicas:
            document["wholeReplicas"] = True
        if self.pod_overlay:
            document["podOverlay"] = dict(self.pod_overlay)
        return document

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "PodDefaults":
        """Reads the file. ValueError with a sentence for what it does not know."""
        unknown = sorted(document.keys() - _READERS.keys())
        if unknown:
            known = ", ".join(_READERS)
            raise ValueError(f"pod defaults: unknown key {unknown[0]!r}; known are {known}")
        given = {}
        for key, (name, read) in _READERS.items():
            if (value := document.get(key)) is not None:
                try:
                    given[name] = read(value)
                except (TypeError, ValueError, KeyError) as error:
                    said = f": {error}" if isinstance(error, ValueError) else ""
                    raise ValueError(f"pod defaults: {key} is not right{said}") from None
        return cls(**given)


NO_DEFAULTS: Final = PodDefaults()


@dataclass(frozen=True, slots=True)
class Platform:
    """Where workers run, and the features that are on there."""

    pods: PodDefaults = NO_DEFAULTS
    processes: bool = False  # pods are processes of one machine
    multi_node: bool = False  # gate MultiNode: replicas of more than one pod
    gpus: bool = False  # gate GPU: pods that ask for GPUs
    # Who may scale services.
    drivers: frozenset[ScalingDriver] = frozenset({ScalingDriver.INTERNAL})

    def service_key(self, service: InferenceService) -> str:
        """The name by which routers, metrics and other services know a service."""
        if self.processes:
            return service.name
        return f"{service.metadata.namespace}/{service.name}"


KUBERNETES: Final = Platform(multi_node=True)  # as the gates are by default
LOCAL: Final = Platform(PodDefaults(whole_replicas=True), processes=True)


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected text, got {value!r}")
    return value


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _pull_policy(value: object) -> str:
    if value not in _PULL_POLICIES:
        raise ValueError(f"{value!r} is none of {', '.join(_PULL_POLICIES)}")
    return _text(value)


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError("expected a list of {name: ...}")
    return tuple(_text(entry["name"]) for entry in value)


def _overlay(value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a partial pod template, got {value!r}")
    if problems := list(overlay_problems(value)):
        raise ValueError("; ".join(problems))
    return value


_READERS: Final[Mapping[str, tuple[str, Callable[[Any], Any]]]] = {
    "image": ("image", _text),
    "imagePullPolicy": ("image_pull_policy", _pull_policy),
    "imagePullSecrets": ("image_pull_secrets", _names),
    "serviceAccountName": ("service_account_name", _text),
    "wholeReplicas": ("whole_replicas", _switch),
    "podOverlay": ("pod_overlay", _overlay),
}
