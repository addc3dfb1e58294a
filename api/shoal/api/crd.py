"""The CustomResourceDefinition, built from the types and the rules."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from shoal.api import names
from shoal.api.rules import RULES, Rule
from shoal.api.schema import Schema, inlined_schema

PLURAL = "inferenceservices"
SHORT_NAME = "infs"
CATEGORY = "shoal"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of `kubectl get infs` and `shoal get`; wide ones show with `-o wide`."""

    name: str
    type: str  # string | integer | date
    path: str  # JSONPath within the document
    description: str
    wide: bool = False


COLUMNS: tuple[Column, ...] = (
    Column("Model", "string", ".spec.model.uri", "Where the model lies."),
    Column(
        "Ready",
        "string",
        '.status.conditions[?(@.type=="Ready")].status',
        "Whether the service answers.",
    ),
    Column("Replicas", "integer", ".status.readyReplicas", "Replicas that are ready."),
    Column("Desired", "integer", ".status.desiredReplicas", "Replicas that are wanted."),
    Column("Canary", "integer", ".status.canary.weight", "Percent of requests at the canary."),
    Column(
        "Reason",
        "string",
        '.status.conditions[?(@.type=="Ready")].reason',
        "Why it is ready, or is not.",
    ),
    Column("Age", "date", ".metadata.creationTimestamp", "Time since it was created."),
    Column("Revision", "string", ".status.activeRevision", "Revision that serves.", wide=True),
    Column("URL", "string", ".status.url", "Base URL of the OpenAI API.", wide=True),
    Column("TP", "integer", ".spec.parallelism.tensor", "Tensor-parallel ranks.", wide=True),
    Column("PP", "integer", ".spec.parallelism.pipeline", "Pipeline stages.", wide=True),
)


def build_crd() -> dict[str, Any]:
    """The CRD as JSON values (apiextensions.k8s.io/v1)."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP,
            "names": {
                "kind": names.KIND,
                "listKind": f"{names.KIND}List",
                "plural": PLURAL,
                "singular": names.KIND.lower(),
                "shortNames": [SHORT_NAME],
                "categories": [CATEGORY],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": names.VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": _root_schema()},
                    "subresources": {
                        "status": {},
                        "scale": {
                            "specReplicasPath": ".spec.replicas",
                            "statusReplicasPath": ".status.replicas",
                            "labelSelectorPath": ".status.selector",
                        },
                    },
                    "additionalPrinterColumns": [_printer_column(column) for column in COLUMNS],
                }
            ],
        },
    }


def _printer_column(column: Column) -> dict[str, Any]:
    shown = {
        "name": column.name,
        "type": column.type,
        "jsonPath": column.path,
        "description": column.description,
    }
    return {**shown, "priority": 1} if column.wide else shown


def _root_schema() -> Schema:
    root = inlined_schema()
    for rule in RULES:
        for scope in rule.scopes:
            node = _node_at(root, scope.split(".") if scope else ())
            node.setdefault("x-kubernetes-validations", []).append(_validation(rule))
    # The API server owns these three; it takes no more than their types here.
    root["properties"]["apiVersion"] = {
        "type": "string",
        "description": f"Version of this type: {names.API_VERSION}.",
    }
    root["properties"]["kind"] = {"type": "string", "description": f"Always {names.KIND}."}
    root["properties"]["metadata"] = {"type": "object"}
    del root["properties"]["status"]["default"]  # the operator alone brings a status into being
    root["required"] = ["spec"]
    return _structural(root)


def _node_at(root: Schema, steps: Iterable[str]) -> Schema:
    node = root
    for step in steps:
        node = node["properties"][step.removesuffix("[]")]
        if step.endswith("[]"):
            node = node["items"]
    return node


def _validation(rule: Rule) -> dict[str, str]:
    validation = {
        "rule": rule.cel,
        "message": rule.general,
        "messageExpression": rule.message_cel,
    }
    if rule.field and not rule.field.startswith("metadata.name"):  # no fieldPath leads there
        validation["fieldPath"] = f".{rule.field}"
    return validation


def _structural(node: Schema) -> Schema:
    """The node as Kubernetes wants it: closed objects are its default, open ones are marked."""
    node = dict(node)
    extra = node.get("additionalProperties")
    if isinstance(extra, bool):
        del node["additionalProperties"]
        if extra:
            node["x-kubernetes-preserve-unknown-fields"] = True
    elif extra is not None:
        node["additionalProperties"] = _structural(extra)
    if "exclusiveMinimum" in node:  # a flag beside the minimum, in OpenAPI 3.0
        node["minimum"], node["exclusiveMinimum"] = node["exclusiveMinimum"], True
    if "properties" in node:
        node["properties"] = {key: _structural(value) for key, value in node["properties"].items()}
    if "items" in node:
        node["items"] = _structural(node["items"])
    return node
