"""Replicas follow the load: more for a queue, none without requests, one for the first of them."""

import time
from concurrent.futures import ThreadPoolExecutor

import openai

from e2e.cluster.kube import condition, timed
from e2e.cluster.platform import Platform
from e2e.cluster.report import Report
from e2e.cluster.services import routable, service, workers
from e2e.cluster.testbed import Testbed

NAME = "follows"
TABLE = "Replicas follow the load"


def test_a_queue_adds_a_replica_and_idleness_takes_all(
    cluster: Testbed, shoal: Platform, namespace: str, report: Report
) -> None:
    """1 -> 2 -> 0 -> 1, and every request is answered."""
    kube = cluster.kube
    scaled = service(
        NAME,
        engine={"dtype": "float32", "maxModelLen": 512, "maxNumSeqs": 2, "threads": 1},
        autoscaling={
            "minReplicas": 0,
            "maxReplicas": 2,
            "metrics": [{"type": "QueueDepth", "target": 2}],
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": 10}},
            "scaleToZero": {"idleSeconds": 15, "queueTimeoutSeconds": 300},
        },
    )
    kube.apply(namespace, scaled)
    timed("one replica", 180, lambda: routable(kube, namespace, NAME) == 1)
    client = openai.OpenAI(base_url=f"{shoal.url}/v1", api_key="none", timeout=300, max_retries=0)

    def ask(tokens: int) -> str:
        answer = client.completions.create(
            model=NAME, prompt="Once upon a time", max_tokens=tokens, temperature=0
        )
        return answer.choices[0].text

    report.head(TABLE, "phase", "seconds")
    began = time.monotonic()
    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(ask, 60) for _ in range(24)]
        timed("two pods", 60, lambda: len(workers(kube, namespace, NAME)) == 2)
        report.row(TABLE, "a queue to a second pod", f"{time.monotonic() - began:.1f}")
        assert len({answer.result(300) for answer in answers}) == 1
    ended = time.monotonic()
    timed("no pods", 120, lambda: not workers(kube, namespace, NAME))
    report.row(TABLE, "the last answer to no pod (15 s idle)", f"{time.monotonic() - ended:.1f}")
    found = kube.get("infs", NAME, namespace)
    assert condition(found, "Ready")["reason"] == "ScaledToZero"
    assert found["status"]["autoscaling"]["desired"] == 0
    woken = time.monotonic()
    assert ask(8)
    report.row(TABLE, "a request at zero to its answer", f"{time.monotonic() - woken:.1f}")
    assert condition(kube.get("infs", NAME, namespace), "ScalingActive")["status"] == "True"
