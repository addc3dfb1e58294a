"""A wrong manifest is answered by one line for each problem: path, value, way out."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.api.types import (
    InferenceServiceSpec,
    InvalidManifest,
    parse_document,
    parse_manifest,
    to_document,
)

HEAD = """\
apiVersion: serving.shoal.dev/v1alpha1
kind: InferenceService
metadata: {name: chat}
"""


def refusal(text: str) -> str:
    with pytest.raises(InvalidManifest) as refused:
        parse_manifest(text)
    return str(refused.value)


def test_a_manifest_becomes_a_service() -> None:
    """Values, defaults and quantities arrive typed."""
    (service,) = parse_manifest(
        HEAD + "spec: {model: {uri: hf://a/b, aliases: [x]}, engine: {dtype: float32}, "
        "resources: {cpu: 8, memory: 64Gi}}"
    )
    assert (service.name, service.model_ids) == ("chat", ("chat", "x"))
    assert service.spec.engine.dtype == "float32"
    assert (service.spec.resources.cpu, service.spec.resources.memory) == ("8", "64Gi")


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        (
            "{model: {uri: hf://a}, engine: {maxModelLenn: 4}}",
            "spec.engine.maxModelLenn: unknown field; did you mean maxModelLen?",
        ),
        (
            "{model: {uri: hf://a}, engine: {max_model_len: 4}}",
            "spec.engine.max_model_len: unknown field; did you mean maxModelLen?",
        ),
        (
            "{model: {uri: hf://a}, engine: {colour: null}}",
            "spec.engine.colour: unknown field; known here: maxModelLen, maxNumSeqs",
        ),
        (
            "{model: {uri: hf://a, adapters: [{name: x, uri: hf://b, rev: c}]}}",
            "spec.model.adapters[0].rev: unknown field; did you mean revision?",
        ),
        ("{}", "spec.model: is required: the model, and the names"),
        ("{model: {uri: null}}", "spec.model.uri: is required: where the model lies"),
        (
            "{model: {uri: hf://a, revision: 0.1}}",
            "spec.model.revision: 0.1 is a number, but must be a string; put it in quotes",
        ),
        (
            '{model: {uri: hf://a}, replicas: "2"}',
            'spec.replicas: "2" is a string, but must be a whole number; leave the quotes out',
        ),
        (
            "{model: {uri: hf://a}, replicas: 1.5}",
            "spec.replicas: 1.5 is a number, but must be a whole number",
        ),
        (
            '{model: {uri: hf://a}, paused: "yes"}',
            'spec.paused: "yes" is a string, but must be true or false; leave the quotes out',
        ),
        ("{model: [], replicas: 1}", "spec.model: this is a list, but must be a mapping"),
        (
            "{model: {uri: hf://a, aliases: x}}",
            'spec.model.aliases: "x" is a string, but must be a list',
        ),
        (
            "{model: {uri: hf://a, aliases: [x, x]}}",
            "spec.model.aliases: x is given twice; take one out",
        ),
        ("{model: {uri: hf://a}, replicas: -1}", "spec.replicas: -1 is too small; at least 0"),
        (
            "{model: {uri: hf://a}, replicas: 10001}",
            "spec.replicas: 10001 is too large; at most 10000",
        ),
        (
            "{model: {uri: hf://a}, engine: {kvCacheMemoryFraction: 0}}",
            "spec.engine.kvCacheMemoryFraction: 0 is too small; more than 0",
        ),
        (
            "{model: {uri: hf://a}, engine: {maxNumSeqs: 99999999999999999999999}}",
            "spec.engine.maxNumSeqs: 99999999999999999999999 is too large; at most 4096",
        ),
        (
            "{model: {uri: hf://a}, engine: {dtype: bf16}}",
            'spec.engine.dtype: "bf16" is not one of auto, bfloat16, float16, float32; '
            "did you mean bfloat16?",
        ),
        (
            "{model: {uri: hf://a}, engine: {blockSize: 17}}",
            "spec.engine.blockSize: 17 is not one of 8, 16, 32, 64, 128",
        ),
        (
            "{model: {uri: hf://a}, resources: {memory: 2GB}}",
            'spec.resources.memory: "2GB" is not a quantity; write a number and a unit',
        ),
        (
            "{model: {uri: hf://a, name: 'a b'}}",
            'spec.model.name: "a b" is not a model id; use letters, digits',
        ),
        (
            "{model: {uri: hf://a}, rollout: {canary: {steps: []}}}",
            "spec.rollout.canary.steps: 0 entries are too few; at least 1",
        ),
        (
            "{model: {uri: hf://a}, podOverlay: {metadata: {labels: {a: 3}}}}",
            "spec.podOverlay.metadata.labels.a: 3 is a number, but must be a string",
        ),
    ],
)
def test_a_wrong_field_is_named_with_value_and_way_out(spec: str, line: str) -> None:
    """One wrong field gives one line that begins with its dotted path."""
    (message,) = refusal(f"{HEAD}spec: {spec}").splitlines()
    assert message.startswith(line)


def test_all_problems_are_told_at_once() -> None:
    """Nobody mends a manifest line by line."""
    lines = refusal(HEAD + "spec: {model: {}, replicas: -1, rolout: {}}").splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "spec.model.uri",
        "spec.replicas",
        "spec.rolout",
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "there is no document in it; write at least one InferenceService"),
        ("# nothing\n---\n", "there is no document in it"),
        ("hello", 'a manifest is a mapping with apiVersion, kind, metadata and spec, but "hello"'),
        ("- 1", "a manifest is a mapping with apiVersion, kind, metadata and spec, but this is"),
        ("a: b: c", "line 1, column 5: this is not YAML"),
        (
            "kind: Pod\napiVersion: v1",
            'apiVersion: "v1" is not served here; write apiVersion: serving.shoal.dev/v1alpha1\n'
            'kind: "Pod" is not served here; write kind: InferenceService',
        ),
        (
            "kind: InferenceService",
            "apiVersion: is missing; write apiVersion: serving.shoal.dev/v1alpha1",
        ),
        (HEAD + "spec: {model: {uri: hf://a}, replicas: .nan}", "nan is not a finite number"),
    ],
)
def test_what_is_no_manifest_is_answered_by_a_sentence(text: str, sentence: str) -> None:
    """Empty files, other kinds and broken YAML say what was expected."""
    assert sentence in refusal(text)


def test_several_documents_are_told_apart() -> None:
    """A problem names its document; a name may be used once."""
    good = HEAD + "spec: {model: {uri: hf://a}}\n"
    bad = HEAD + "spec: {model: {uri: hf://a}, replicas: x}\n"
    assert len(parse_manifest(good + "---\n" + good.replace("chat", "other"))) == 2
    assert refusal(good + "---\n" + bad).startswith('document 2: spec.replicas: "x" is a string')
    assert refusal(good + "---\nkind: Pod").startswith("document 2: apiVersion: is missing")
    assert refusal(good + "---\n" + good).startswith("document 2: metadata.name: an earlier")


def test_null_stands_for_the_default(document: Any) -> None:
    """As at the API server, a null leaves the default; within podOverlay it is a value."""
    service = parse_document(document(replicas=None, podOverlay={"spec": {"x": None}}))
    assert service.spec.replicas == 1
    assert to_document(service)["spec"]["podOverlay"] == {"spec": {"x": None}}


def test_a_document_as_kubernetes_gives_it_back_is_read(document: Any) -> None:
    """Server-side metadata and status are carried along."""
    doc = document()
    doc["metadata"] |= {
        "uid": "1",
        "generation": 3,
        "creationTimestamp": "2025-01-31T12:00:00Z",
        "managedFields": [{"manager": "kubectl", "fieldsV1": {"f:spec": {}}}],
    }
    doc["status"] = {
        "conditions": [
            {
                "type": "Ready",
                "status": "True",
                "reason": "AllReady",
                "lastTransitionTime": "2025-01-31T12:00:00Z",
            }
        ]
    }
    service = parse_document(doc)
    assert service.metadata.generation == 3
    assert service.status.conditions[0].reason == "AllReady"
    assert parse_document(to_document(service)) == service


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = st.sampled_from([*InferenceServiceSpec.model_fields, "podOverlay", "other"])


@given(spec=JSON | st.dictionaries(KEYS, JSON, max_size=4), name=JSON)
def test_junk_is_refused_or_survives_the_round_trip(spec: Any, name: Any) -> None:
    """Whatever the document holds, the answer is a service or InvalidManifest, nothing else."""
    doc = {
        "apiVersion": "serving.shoal.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": name},
        "spec": spec,
    }
    try:
        service = parse_document(doc)
    except InvalidManifest as refused:
        assert refused.problems and all(problem.message for problem in refused.problems)
    else:
        assert parse_document(json.loads(json.dumps(to_document(service)))) == service


@given(text=st.text(max_size=200))
def test_any_text_is_refused_with_a_sentence(text: str) -> None:
    """No text makes the parser fail in another way."""
    with pytest.raises(InvalidManifest):
        parse_manifest(text)
