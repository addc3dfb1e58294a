"""The types as JSON schema: one pass over pydantic's, for the CRD and for editors alike."""

from collections.abc import Mapping
from typing import Any

from shoal.api.service import InferenceService

Schema = dict[str, Any]


def inlined_schema() -> Schema:
    """The schema of InferenceService without references, titles, or null alternatives and
    defaults."""
    raw = InferenceService.model_json_schema(by_alias=True, mode="validation")
    return _inline(raw, raw.pop("$defs"))


def editor_schema() -> Schema:
    """The JSON schema by which editors complete and check manifests."""
    schema = _without_kubernetes_keys(inlined_schema())
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "InferenceService",
        **schema,
        "required": ["apiVersion", "kind", "metadata", "spec"],
    }


def _inline(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Schema:
    node = dict(schema)
    if "$ref" in node:
        target = definitions[node.pop("$ref").rpartition("/")[2]]
        node = {**target, **node}
    alternatives = [option for option in node.get("anyOf", ()) if option != {"type": "null"}]
    if len(alternatives) == 1:
        del node["anyOf"]
        return _inline({**_inline(alternatives[0], definitions), **node}, definitions)
    node.pop("title", None)
    if "default" in node:
        node["default"] = _without_nulls(node["default"])
        if node["default"] is None:
            del node["default"]
    if "const" in node:
        node["enum"] = [node.pop("const")]
    if "properties" in node:
        node["properties"] = {
            key: _inline(value, definitions) for key, value in node["properties"].items()
        }
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            node[key] = _inline(node[key], definitions)
    return node


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _without_kubernetes_keys(node: Schema) -> Schema:
    """The node without `x-kubernetes-*`: what they say is said in plain JSON schema."""
    if node.get("x-kubernetes-int-or-string"):
        rest = {key: value for key, value in node.items() if key != "anyOf"}
        node = {"type": ["integer", "string"], **rest}
    plain = {key: value for key, value in node.items() if not key.startswith("x-kubernetes-")}
    if node.get("x-kubernetes-list-type") == "set":
        plain["uniqueItems"] = True
    if "properties" in plain:
        plain["properties"] = {
            key: _without_kubernetes_keys(value) for key, value in plain["properties"].items()
        }
    for key in ("items", "additionalProperties"):
        if isinstance(plain.get(key), dict):
            plain[key] = _without_kubernetes_keys(plain[key])
    return plain
