"""The CRD is what Kubernetes asks of one, and what users see of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from shoal.api import names
from shoal.api.crd import COLUMNS, build_crd
from shoal.api.schema import editor_schema
from shoal.api.types import parse_document

MANIFESTS = Path(__file__).parents[2] / "manifests"
FORBIDDEN = {"$ref", "$defs", "title", "const", "uniqueItems", "prefixItems", "oneOf", "allOf"}


@pytest.fixture(scope="module")
def version() -> dict[str, Any]:
    (only,) = build_crd()["spec"]["versions"]
    return only  # type: ignore[no-any-return]  # JSON values


def _nodes(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, node
    for key, below in node.get("properties", {}).items():
        yield from _nodes(below, f"{path}.{key}")
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            yield from _nodes(node[key], f"{path}[]")


def test_the_schema_is_structural(version: dict[str, Any]) -> None:
    """Every node has one type, and none of the words that Kubernetes refuses."""
    for path, node in _nodes(version["schema"]["openAPIV3Schema"]):
        assert not FORBIDDEN & node.keys(), path
        assert node.get("x-kubernetes-int-or-string") or node.get("type"), path
        assert not isinstance(node.get("additionalProperties"), bool), path
        assert not ("additionalProperties" in node and "properties" in node), path
        assert "default" not in node or node["default"] is not None, path
        assert isinstance(node.get("exclusiveMinimum", True), bool), path


def test_every_field_is_explained(version: dict[str, Any]) -> None:
    """`kubectl explain` has text at every field."""
    for path, node in _nodes(version["schema"]["openAPIV3Schema"]):
        leaf = path.endswith("[]") or path == ".metadata"
        assert leaf or node.get("description"), path


def test_fractions_are_bounded_below_by_whole_numbers(version: dict[str, Any]) -> None:
    """Kubernetes compares an integer value with the bound cut to an integer: 0 would pass 0.01."""
    for path, node in _nodes(version["schema"]["openAPIV3Schema"]):
        for bound in ("minimum", "maximum"):
            assert float(node.get(bound, 0)).is_integer(), path


def test_names_and_subresources(version: dict[str, Any]) -> None:
    """Short name, category, status and scale are where kubectl looks for them."""
    spec = build_crd()["spec"]
    assert (spec["names"]["shortNames"], spec["names"]["categories"]) == (["infs"], ["shoal"])
    assert version["subresources"]["scale"] == {
        "specReplicasPath": ".spec.replicas",
        "statusReplicasPath": ".status.replicas",
        "labelSelectorPath": ".status.selector",
    }
    assert version["subresources"]["status"] == {}


def test_columns_read_fields_that_exist(version: dict[str, Any]) -> None:
    """A column whose path leads nowhere would stay empty for ever."""
    known = {path for path, _ in _nodes(version["schema"]["openAPIV3Schema"])}
    known.add(".metadata.creationTimestamp")
    for column in COLUMNS:
        path = column.path.replace('[?(@.type=="Ready")]', "[]")
        assert path in known, column.name
    assert [c.name for c in COLUMNS if not c.wide] == (
        ["Model", "Ready", "Replicas", "Desired", "Canary", "Reason", "Age"]
    )
    assert [c.name for c in COLUMNS if c.wide] == ["Revision", "URL", "TP", "PP"]
    wide = [c["name"] for c in version["additionalPrinterColumns"] if c.get("priority") == 1]
    assert wide == ["Revision", "URL", "TP", "PP"]


def test_the_pod_overlay_is_open_and_all_else_is_closed(version: dict[str, Any]) -> None:
    """Unknown fields pass through where a pod template is meant, and nowhere else."""
    spec = {"openAPIV3Schema": version["schema"]["openAPIV3Schema"]}["openAPIV3Schema"]
    is_open = {
        path for path, node in _nodes(spec) if node.get("x-kubernetes-preserve-unknown-fields")
    }
    assert is_open == {".spec.podOverlay", ".spec.podOverlay.metadata"}


def test_the_crd_fits_into_an_annotation() -> None:
    """Client-side apply keeps a copy in an annotation of at most 256 KiB."""
    assert len(yaml.safe_dump(build_crd())) < 200_000


EXAMPLES = sorted((MANIFESTS / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_right_for_parser_and_editor(path: Path) -> None:
    """Every example parses, satisfies the editor schema and names that schema. What stands beside
    the service, such as its volume claim, is Kubernetes' own."""
    text = path.read_text()
    documents = list(yaml.safe_load_all(text))
    services = [document for document in documents if document["kind"] == names.KIND]
    assert services
    if services == documents:
        assert text.startswith("# yaml-language-server: $schema=../schema/inferenceservice.json\n")
    for document in services:
        assert parse_document(document)
        jsonschema_rs.validator_for(editor_schema()).validate(document)


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"model": {"uri": "hf://a"}, "other": 1},
        {"model": {"uri": "hf://a"}, "engine": {"dtype": "bf16"}},
        {"model": {"uri": "hf://a"}, "resources": {"memory": "2GB"}},
        {"model": {"uri": "hf://a"}, "engine": {"kvCacheMemoryFraction": 0}},
        {"model": {"uri": "hf://a"}, "engine": {"maxModelLen": 1}},
        {"model": {"uri": "hf://a", "aliases": ["x", "x"]}},
    ],
)
def test_the_editor_schema_refuses_what_is_wrong(document: Any, spec: dict[str, Any]) -> None:
    """An editor underlines what the parser would refuse."""
    validator = jsonschema_rs.validator_for(editor_schema())
    assert validator.is_valid(document())
    assert not validator.is_valid({**document(), "spec": spec})
