"""The examples are what they claim: valid, supported, and each with a comment."""

from pathlib import Path

import pytest
import yaml

from shoal.api.manifest import parse_manifest
from shoal.operator.overlay import overlay_problems
from shoal.operator.platform import KUBERNETES
from shoal.operator.unsupported import unsupported

EXAMPLES = sorted((Path(__file__).parents[2] / "manifests/examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_valid_and_supported(path: Path) -> None:
    """Every service of the file passes types and rules, and asks for nothing that is refused."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#")
    documents = [d for d in yaml.safe_load_all(text) if d["kind"] == "InferenceService"]
    services = parse_manifest(yaml.safe_dump_all(documents))
    assert services
    for service in services:
        assert unsupported(service.spec, KUBERNETES) == []
        assert not list(overlay_problems(service.spec.pod_overlay))


def test_examples_can_live_side_by_side() -> None:
    """Names and model ids differ, so that a reader can apply them all into one namespace."""
    texts = [path.read_text(encoding="utf-8") for path in EXAMPLES]
    documents = [d for text in texts for d in yaml.safe_load_all(text)]
    services = parse_manifest(
        yaml.safe_dump_all(d for d in documents if d["kind"] == "InferenceService")
    )
    ids = [model for service in services for model in service.model_ids]
    assert len(set(ids)) == len(ids)


def test_the_hpa_scales_the_service_of_its_file() -> None:
    """The target of the autoscaler exists, and leaves the number to it."""
    (path,) = [path for path in EXAMPLES if path.stem == "hpa"]
    service, autoscaler = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    target = autoscaler["spec"]["scaleTargetRef"]
    assert (target["apiVersion"], target["kind"]) == (service["apiVersion"], service["kind"])
    assert target["name"] == service["metadata"]["name"]
    assert "replicas" not in service["spec"]
