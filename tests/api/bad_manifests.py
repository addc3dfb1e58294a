"""Manifests that are wrong, and what users are told: the table for all who refuse them.

`REFUSED` are refused when they are applied, here by `parse_document` and on a cluster by the API
server, whose words for the schema differ. `UNMET` are well formed but ask for what this release
does not have or what contradicts something outside the document: they are accepted, and become
conditions with a sentence. The tests of the types, of the planner and of the cluster share both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shoal.api.names import API_VERSION, KIND

MODEL = {"uri": "hf://org/model"}


@dataclass(frozen=True)
class Refused:
    """A manifest that nobody takes."""

    why: str
    document: dict[str, Any]
    path: str  # of the culprit
    says: str  # the sentence, or its beginning
    server: str  # a part of what the API server says


@dataclass(frozen=True)
class Unmet:
    """A manifest that is taken, and the reason and sentence of its conditions."""

    why: str
    document: dict[str, Any]
    reason: str
    says: str


def _manifest(name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name},
        "spec": _given({"model": MODEL, **spec}),
    }


def _model(**fields: Any) -> dict[str, Any]:
    return {"model": {**MODEL, **fields}}


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


def _unmet(why: str, spec: Mapping[str, Any], reason: str, says: str) -> Unmet:
    return Unmet(why, _manifest("chat", spec), reason, says)


def _overlay(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {"podOverlay": {"spec": spec}}


def _refused(row: dict[str, Any]) -> Refused:
    """A row of the file. `document` overrides top-level keys; null leaves one out."""
    document = _manifest(row.get("name", "chat"), row.get("spec", {}))
    whole = _given({**document, **row.get("document", {})})
    return Refused(row["why"], whole, row["path"], row["says"], row.get("server", row["says"]))


_ROWS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
REFUSED: tuple[Refused, ...] = tuple(map(_refused, _ROWS))

UNMET: tuple[Unmet, ...] = (
    _unmet(
        "a source that is not built",
        {"model": {"uri": "s3://bucket/model"}},
        "NotSupported",
        "not supported yet: spec.model.uri=s3://bucket/model (schemes: py, file, hf)",
    ),
    _unmet(
        "a revision of a file",
        {"model": {"uri": "file:///models/a", "revision": "v1"}},
        "NotSupported",
        "not supported yet: spec.model.revision=v1 (only py:// and hf:// have revisions)",
    ),
    _unmet(
        "an adapter",
        _model(adapters=[{"name": "legal", "uri": "hf://org/lora"}]),
        "NotSupported",
        "not supported yet: spec.model.adapters",
    ),
    _unmet(
        "int8 at load time",
        {"engine": {"quantization": "fp8"}},
        "NotSupported",
        "not supported yet: spec.engine.quantization=fp8",
    ),
    _unmet(
        "a KV cache in fp8",
        {"engine": {"kvCacheDtype": "fp8"}},
        "NotSupported",
        "not supported yet: spec.engine.kvCacheDtype=fp8",
    ),
    _unmet(
        "speculation",
        {"engine": {"speculative": {"method": "ngram"}}},
        "NotSupported",
        "not supported yet: spec.engine.speculative",
    ),
    _unmet(
        "bit-equal answers",
        {"engine": {"deterministic": True}},
        "NotSupported",
        "not supported yet: spec.engine.deterministic=true",
    ),
    _unmet(
        "GPUs without the gate",
        {"resources": {"gpusPerNode": 1}},
        "NotSupported",
        "spec.resources.gpusPerNode=1 (the operator's feature gate GPU, alpha, is off)",
    ),
    _unmet(
        "prices",
        {"cost": {"perGpuHour": 2.5}},
        "NotSupported",
        "not supported yet: spec.cost",
    ),
    _unmet(
        "an overlay of something else than a pod",
        {"podOverlay": {"template": {}}},
        "InvalidOverlay",
        "spec.podOverlay.template (a pod template has metadata and spec)",
    ),
    _unmet(
        "an overlay that names the pod",
        {"podOverlay": {"metadata": {"name": "mine"}}},
        "InvalidOverlay",
        "spec.podOverlay.metadata.name (Shoal sets it; only labels and annotations are open)",
    ),
    _unmet(
        "an overlay that marks a drain",
        {"podOverlay": {"metadata": {"annotations": {"serving.shoal.dev/drain-started": "0"}}}},
        "InvalidOverlay",
        "spec.podOverlay.metadata.annotations[serving.shoal.dev/drain-started] (Shoal sets it)",
    ),
    _unmet(
        "an overlay whose spec is a list",
        {"podOverlay": {"spec": []}},
        "InvalidOverlay",
        "spec.podOverlay.spec (must be an object)",
    ),
    _unmet(
        "an overlay that ends pods for good",
        _overlay({"restartPolicy": "Never"}),
        "InvalidOverlay",
        "spec.podOverlay.spec.restartPolicy (Shoal sets it)",
    ),
    _unmet(
        "an overlay of a container without a name",
        _overlay({"containers": [{"image": "mine:1"}]}),
        "InvalidOverlay",
        "spec.podOverlay: spec.containers[0]: needs name, by which elements are merged",
    ),
    _unmet(
        "an overlay whose containers are an object",
        _overlay({"containers": {"worker": {}}}),
        "InvalidOverlay",
        "spec.podOverlay: spec.containers: must be a list",
    ),
    _unmet(
        "an overlay without the worker",
        _overlay({"containers": [{"name": "worker", "$patch": "delete"}]}),
        "InvalidOverlay",
        "spec.podOverlay: spec.containers: worker must stay",
    ),
    _unmet(
        "an overlay with an unknown directive",
        _overlay({"$retainKeys": ["volumes"]}),
        "InvalidOverlay",
        "spec.podOverlay: spec: the directive $retainKeys is not known",
    ),
    _unmet(
        "an overlay with an unknown field",
        _overlay({"priorityClas": "high"}),
        "PodRejected",
        "priorityClas",
    ),
    _unmet(
        "an overlay with a value of the wrong type",
        _overlay({"containers": [{"name": "worker", "env": [{"name": "A", "value": 1}]}]}),
        "PodRejected",
        "value",
    ),
    _unmet(
        "an overlay that mounts a volume that is not there",
        _overlay(
            {"containers": [{"name": "worker", "volumeMounts": [{"name": "x", "mountPath": "/x"}]}]}
        ),
        "PodRejected",
        'volumeMounts[2].name: Not found: "x"',
    ),
)
"""Those of reason PodRejected only the API server can tell, when the pod is made."""
