"""Each rule between fields is broken once, and says the same in both languages."""

import re
from typing import Any

import pytest

from shoal.api.crd import build_crd
from shoal.api.rules import RULES, URI_SCHEMES, Rule
from shoal.api.types import InvalidManifest, parse_document

# The parts of a spec that break one rule each, the culprit's path and a part of the sentence.
BROKEN: list[tuple[dict[str, Any], str, str]] = [
    ({"name": "a" * 41}, "metadata.name", "41 characters long, at most 40"),
    ({"name": "my.chat"}, "metadata.name", '"my.chat" must be lower-case letters'),
    ({"model": {"uri": "ftp://a"}}, "spec.model.uri", '"ftp://a" has no scheme'),
    ({"model": {"uri": "hf://"}}, "spec.model.uri", '"hf://" has no scheme'),
    (
        {"model": {"uri": "hf://a", "adapters": [{"name": "x", "uri": "y"}]}},
        "spec.model.adapters[0].uri",
        '"y" has no scheme',
    ),
    (
        {"model": {"uri": "hf://a", "name": "x", "aliases": ["x"]}},
        "spec.model",
        'the aliases ["x"] and the adapters []',
    ),
    (
        {
            "model": {
                "uri": "hf://a",
                "aliases": ["x"],
                "adapters": [{"name": "x", "uri": "hf://b"}],
            }
        },
        "spec.model",
        "a model id is given twice",
    ),
    (
        {"engine": {"maxPrefillTokens": 4096}},
        "spec.engine.maxPrefillTokens",
        "maxPrefillTokens 4096 is more than maxBatchedTokens 2048",
    ),
    (
        {"engine": {"speculative": {"method": "draft"}}},
        "spec.engine.speculative.draftModel",
        "method is draft",
    ),
    (
        {"engine": {"speculative": {"method": "ngram", "draftModel": "hf://a"}}},
        "spec.engine.speculative.draftModel",
        "method is ngram",
    ),
    (
        {"parallelism": {"tensor": 3}, "resources": {"gpusPerNode": 2}},
        "spec.parallelism",
        "tensor 3 x pipeline 1 cannot be laid on nodes of gpusPerNode 2",
    ),
    (
        {"parallelism": {"tensor": 3, "pipeline": 2}, "resources": {"gpusPerNode": 2}},
        "spec.parallelism",
        "tensor 3 x pipeline 2",
    ),
    (
        {"autoscaling": {"minReplicas": 9, "maxReplicas": 4}},
        "spec.autoscaling.minReplicas",
        "minReplicas 9 is more than maxReplicas 4",
    ),
    (
        {"autoscaling": {"minReplicas": 0, "maxReplicas": 4}},
        "spec.autoscaling.minReplicas",
        "minReplicas 0 needs scaleToZero",
    ),
    (
        {"autoscaling": {"driver": "hpa", "maxReplicas": 4, "scaleToZero": {}}},
        "spec.autoscaling.scaleToZero",
        "scaleToZero does not go with driver hpa",
    ),
    (
        {"autoscaling": {"maxReplicas": 4, "metrics": [{"type": "KvUtilization", "target": 80}]}},
        "spec.autoscaling.metrics[0].target",
        "target 80 is too large",
    ),
    ({"rollout": {"maxSurge": 0}}, "spec.rollout.maxSurge", "maxSurge 0 and maxUnavailable 0"),
    (
        {"rollout": {"canary": {"steps": [{"weight": 5}, {"weight": 50}]}}},
        "spec.rollout.canary.steps",
        "the weights [5, 50] must rise",
    ),
    (
        {"rollout": {"canary": {"steps": [{"weight": 5}, {"weight": 5}, {"weight": 100}]}}},
        "spec.rollout.canary.steps",
        "the weights [5, 5, 100] must rise",
    ),
    (
        {"rollout": {"strategy": "BlueGreen", "canary": {"steps": [{"weight": 100}]}}},
        "spec.rollout.canary",
        "canary does not go with strategy BlueGreen",
    ),
    (
        {"rollout": {"blueGreen": {}}},
        "spec.rollout.blueGreen",
        "blueGreen has no effect with strategy RollingUpdate",
    ),
    (
        {"rollout": {"inFlight": "recompute"}},
        "spec.rollout.inFlight",
        "inFlight recompute has no effect with strategy RollingUpdate",
    ),
    ({"cache": {"type": "PVC"}}, "spec.cache", "type PVC needs claimName"),
    ({"cache": {"type": "HostPath", "claimName": "x"}}, "spec.cache", "type HostPath: "),
    ({"cache": {"path": "/models"}}, "spec.cache", "type None: "),
    ({"cache": {"type": "HostPath", "path": "/"}}, "spec.cache.path", "/ may not be the cache"),
    (
        {"cache": {"type": "HostPath", "path": "/var//lib/"}},
        "spec.cache.path",
        "/var//lib/ may not be the cache",
    ),
    (
        {"cache": {"type": "HostPath", "path": "/data/../etc"}},
        "spec.cache.path",
        "/data/../etc may not be the cache",
    ),
    (
        {"resources": {"gpuResource": "amd.com/gpu"}},
        "spec.resources.gpuResource",
        "gpuResource amd.com/gpu has no effect while gpusPerNode is 0",
    ),
    (
        {"resources": {"memory": "1Gi", "shm": "1024Mi"}},
        "spec.resources.shm",
        "shm 1024Mi must be less than memory 1Gi",
    ),
    (
        {"podOverlay": {"metadata": {"labels": {"serving.shoal.dev/role": "x", "mine": "y"}}}},
        "spec.podOverlay.metadata.labels",
        "the overlay sets 2 labels",
    ),
]

KEPT: list[dict[str, Any]] = [
    {"name": "a" * 40},
    *({"model": {"uri": f"{scheme}://x"}} for scheme in URI_SCHEMES),
    {"model": {"uri": "hf://a", "aliases": ["y"], "adapters": [{"name": "x", "uri": "hf://b"}]}},
    {"engine": {"maxPrefillTokens": 2048, "speculative": {"method": "ngram"}}},
    {"engine": {"speculative": {"method": "draft", "draftModel": "hf://a"}}},
    {"parallelism": {"tensor": 2, "pipeline": 3}},
    {"parallelism": {"tensor": 2, "pipeline": 4}, "resources": {"gpusPerNode": 4}},
    {"parallelism": {"tensor": 4}, "resources": {"gpusPerNode": 2}},
    {"autoscaling": {"minReplicas": 4, "maxReplicas": 4}},
    {"autoscaling": {"minReplicas": 0, "maxReplicas": 1, "scaleToZero": {}}},
    {"autoscaling": {"maxReplicas": 4, "metrics": [{"type": "KvUtilization", "target": 1}]}},
    {"rollout": {"maxSurge": 0, "maxUnavailable": 1}},
    {"rollout": {"canary": {"steps": [{"weight": 5}, {"weight": 100}]}}},
    {"rollout": {"strategy": "BlueGreen", "blueGreen": {"keepSeconds": 0}}},
    {"rollout": {"strategy": "InPlace", "inFlight": "recompute"}},
    {"cache": {"type": "PVC", "claimName": "models"}},
    {"cache": {"type": "HostPath", "path": "/models"}},
    {"cache": {"type": "HostPath", "path": "/var/lib/shoal..d/models"}},
    {"resources": {"gpuResource": "amd.com/gpu", "gpusPerNode": 1}},
    {"resources": {"memory": 2, "shm": 1}},
    {"resources": {"shm": "64Gi"}},
    {"podOverlay": {"metadata": {"labels": {"mine": "y"}}, "spec": {"hostIPC": True}}},
]


@pytest.mark.parametrize(("given", "path", "sentence"), BROKEN)
def test_a_broken_rule_is_told(
    document: Any, given: dict[str, Any], path: str, sentence: str
) -> None:
    """The culprit's path and a sentence with the values, once."""
    with pytest.raises(InvalidManifest) as refused:
        parse_document(document(**given))
    (problem,) = refused.value.problems
    assert problem.path == path
    assert sentence in problem.message


@pytest.mark.parametrize("given", KEPT)
def test_what_keeps_the_rules_passes(document: Any, given: dict[str, Any]) -> None:
    """The border cases on the right side are accepted."""
    parse_document(document(**given))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.general[:40])
def test_every_rule_is_broken_above(document: Any, rule: Rule) -> None:
    """No rule goes untested."""
    template = re.compile(".*".join(map(re.escape, rule.message.split("%s"))))
    assert any(template.fullmatch(_sentence(document(**given))) for given, _, _ in BROKEN)


def _sentence(doc: dict[str, Any]) -> str:
    with pytest.raises(InvalidManifest) as refused:
        parse_document(doc)
    return refused.value.problems[0].message


def _validations(node: dict[str, Any], path: str = "") -> dict[str, list[dict[str, str]]]:
    found = {path: node["x-kubernetes-validations"]} if "x-kubernetes-validations" in node else {}
    for key, below in node.get("properties", {}).items():
        found |= _validations(below, f"{path}.{key}".lstrip("."))
    if "items" in node:
        found |= _validations(node["items"], f"{path}[]")
    return found


def test_the_crd_holds_every_rule_where_it_looks() -> None:
    """Rule for rule and scope for scope, the CRD says what the Python side says."""
    (version,) = build_crd()["spec"]["versions"]
    found = _validations(version["schema"]["openAPIV3Schema"])
    expected: dict[str, list[Rule]] = {}
    for rule in RULES:
        for scope in rule.scopes:
            expected.setdefault(scope, []).append(rule)
    assert found.keys() == expected.keys()
    for scope, rules in expected.items():
        assert [v["rule"] for v in found[scope]] == [rule.cel for rule in rules]
        for validation, rule in zip(found[scope], rules, strict=True):
            assert validation["messageExpression"].startswith(f"'{rule.message}'.format([")
            assert validation["message"] == rule.general


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.general[:40])
def test_messages_are_well_formed_in_both_languages(rule: Rule) -> None:
    """A quote would end the CEL string, a newline or a stray % would spoil the message."""
    assert not set("'\n\\") & set(rule.message)
    assert rule.message.count("%") == rule.message.count("%s") == len(rule.values)
    assert "%" not in rule.general and len(rule.general) < 2048
