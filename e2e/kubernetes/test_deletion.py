"""A service is deleted while it answers."""

import openai
import pytest

from e2e.cluster.command import wait_for
from e2e.cluster.kube import condition
from e2e.cluster.platform import Platform
from e2e.cluster.services import service, workers
from e2e.cluster.testbed import Testbed

TOKENS = 300


def test_requests_in_flight_end_whole(cluster: Testbed, shoal: Platform, namespace: str) -> None:
    """kubectl delete lets a stream go on to its last token; new requests find no such model; then
    nothing is left."""
    kube = cluster.kube
    kube.apply(namespace, service("leaving"))
    wait_for(
        "Ready",
        180,
        lambda: condition(kube.get("infs", "leaving", namespace), "Ready").get("status") == "True",
    )
    client = openai.OpenAI(base_url=f"{shoal.url}/v1", api_key="none", timeout=120, max_retries=0)
    stream = client.chat.completions.create(
        model="leaving",
        messages=[{"role": "user", "content": "Tell a long story of the sea."}],
        temperature=0,
        max_tokens=TOKENS,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    next(stream)
    kube.delete("infs", "leaving", namespace, "--wait=false")
    *_, last = stream
    assert last.usage is not None
    assert last.usage.completion_tokens == TOKENS
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="leaving", prompt="Hi", max_tokens=1)
    wait_for("the end of its pods", 60, lambda: not workers(kube, namespace, "leaving"))
