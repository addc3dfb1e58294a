"""What the chart installs, and what each switch changes."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from shoal.api import names
from shoal.operator.kube.settings import GATES, read_settings
from shoal.operator.platform import PodDefaults
from shoal.router.process import build_parser as router_parser

if TYPE_CHECKING:
    from tests.charts.conftest import Render

ROOT = Path(__file__).parents[2]
WRITE = {"get", "list", "watch", "create", "patch", "delete"}
READ = {"get", "list", "watch"}


@pytest.mark.parametrize("chart", ["shoal", "shoal-crds"])
def test_helm_finds_nothing_wrong(run_helm: Callable[..., str], chart: str) -> None:
    """Both charts pass helm's own checks."""
    assert "0 chart(s) failed" in run_helm("lint", "--strict", ROOT / "charts" / chart)


def test_the_default_is_small_and_whole(render: "Render") -> None:
    """Nothing that a cluster may lack is asked for unless a switch says so."""
    assert sorted({o["kind"] for o in render().objects}) == [
        "ClusterRole",
        "ClusterRoleBinding",
        "ConfigMap",
        "Deployment",
        "PodDisruptionBudget",
        "Role",
        "RoleBinding",
        "Service",
        "ServiceAccount",
    ]


@pytest.mark.parametrize("component", ["operator", "router"])
def test_pods_hold_to_the_restricted_standard(render: "Render", component: str) -> None:
    """Kubernetes' restricted pod security admits them, with a read-only root."""
    pod, container = render().pod(component), render().container(component)
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"name": "tmp", "emptyDir": {}} in pod["volumes"]
    assert container["resources"]["limits"].keys() == {"memory"}
    assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()


def test_the_router_understands_its_flags(render: "Render") -> None:
    """The program parses what the chart passes, also with every switch on."""
    plain = router_parser({}).parse_args(render().container("router")["args"])
    assert (plain.http_port, plain.grpc_port, plain.drain_seconds) == (8000, 8001, 120)
    full = render(
        "router.tls.enabled=true",
        "router.tls.secretName=mine",
        "namespaces={a,b}",
        "logFormat=text",
        "router.shutdownDelaySeconds=7",
        "router.extraArgs={--log-level=debug}",
    )
    options = router_parser({}).parse_args(full.container("router")["args"])
    assert str(options.tls_cert_file) == "/etc/shoal/tls/tls.crt"
    assert (options.shutdown_delay_seconds, options.log_level) == (7, "debug")
    assert options.log_format == "text"


def test_the_operator_understands_its_flags(render: "Render", tmp_path: Path) -> None:
    """The program parses what the chart passes, and means by it what the values say."""
    rendering = render(
        "namespaces={a,b}",
        "featureGates.MultiNode=true",
        "logFormat=text",
        "workers.image.tag=v7",
        "operator.extraArgs={--workers=3}",
    )
    path = tmp_path / "pod-defaults.yaml"
    path.write_text(rendering.one("ConfigMap", "shoal-pod-defaults")["data"][path.name])
    container = rendering.container("operator")
    arguments = [a.replace("/etc/shoal", str(tmp_path)) for a in container["args"]]
    settings = read_settings(arguments, {})
    assert settings.namespaces == ("a", "b")
    assert (settings.platform.multi_node, settings.platform.gpus) == (True, False)
    assert settings.platform.pods.image == "shoal-worker:v7"
    assert (settings.log_format, settings.workers) == ("text", 3)
    assert settings.lease_namespace == settings.router_namespace == "shoal-system"
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"health": settings.health_port, "metrics": settings.metrics_port}


def test_every_gate_is_a_value() -> None:
    """The chart knows the operator's feature gates, with the same defaults."""
    values = yaml.safe_load((ROOT / "charts/shoal/values.yaml").read_text(encoding="utf-8"))
    assert values["featureGates"] == GATES


def test_a_stopping_router_has_its_time(render: "Render") -> None:
    """The pod's grace is longer than what the process takes to leave and to drain."""
    pod = render("router.drainSeconds=600", "router.shutdownDelaySeconds=20").pod("router")
    assert pod["terminationGracePeriodSeconds"] > 620


def test_pod_defaults_are_what_the_operator_reads(render: "Render") -> None:
    """The ConfigMap's document is one that the operator understands, and says what values say."""
    rendering = render(
        "image.registry=registry.example.com/team/",
        "image.tag=v9",
        "image.pullSecrets={one,two}",
        "workers.serviceAccountName=worker",
        "workers.podOverlay.spec.nodeSelector.disk=fast",
    )
    text = rendering.one("ConfigMap", "shoal-pod-defaults")["data"]["pod-defaults.yaml"]
    assert PodDefaults.from_document(yaml.safe_load(text)) == PodDefaults(
        image="registry.example.com/team/shoal-worker:v9",
        image_pull_policy="IfNotPresent",
        image_pull_secrets=("one", "two"),
        service_account_name="worker",
        pod_overlay={"spec": {"nodeSelector": {"disk": "fast"}}},
    )
    assert rendering.pod("router")["imagePullSecrets"] == [{"name": "one"}, {"name": "two"}]


def test_the_operator_restarts_for_new_defaults_and_the_router_does_not(render: "Render") -> None:
    """A change of the workers' image is read at the operator's start, and touches no router."""
    before, after = render(), render("workers.image.tag=v2")
    assert before.one("Deployment", "shoal-operator") != after.one("Deployment", "shoal-operator")
    assert before.one("Deployment", "shoal-router") == after.one("Deployment", "shoal-router")


def test_a_digest_goes_before_a_tag(render: "Render") -> None:
    """Whoever pins by digest gets that image."""
    digest = f"sha256:{'0' * 64}"
    container = render(f"router.image.digest={digest}").container("router")
    assert container["image"] == f"shoal-router@{digest}"


def test_the_operator_finds_exactly_the_routers(render: "Render") -> None:
    """The selector that the operator gets matches the labels of the router's pods."""
    (flag,) = [
        a for a in render().container("operator")["args"] if a.startswith("--router-selector=")
    ]
    wanted = dict(part.split("=") for part in flag.partition("=")[2].split(","))
    template = render().one("Deployment", "shoal-router")["spec"]["template"]
    assert wanted.items() <= template["metadata"]["labels"].items()
    operator = render().one("Deployment", "shoal-operator")["spec"]["template"]
    assert not wanted.items() <= operator["metadata"]["labels"].items()


def test_permissions_are_what_each_needs(render: "Render") -> None:
    """Routers read ConfigMaps and nothing else; the operator has no verb and kind to spare."""
    assert render().rules("router") == {("", "configmaps"): READ}
    assert render().rules("operator") == {
        (names.GROUP, "inferenceservices"): READ,
        (names.GROUP, "inferenceservices/status"): {"patch"},
        ("", "pods"): WRITE,
        ("", "pods/log"): {"get"},
        ("", "services"): WRITE,
        ("", "configmaps"): WRITE,
        ("", "nodes"): READ,
        ("", "secrets"): {"get", "create"},
        ("", "events"): {"get", "create", "patch"},
        ("apps", "controllerrevisions"): WRITE - {"watch"},
        ("policy", "poddisruptionbudgets"): WRITE - {"watch"},
        ("monitoring.coreos.com", "podmonitors"): WRITE - {"watch"},
        ("coordination.k8s.io", "leases"): {"create", "get", "update"},
    }


def test_secrets_are_touched_for_groups_of_pods_alone(render: "Render") -> None:
    """Only with the gate MultiNode may the operator read a Secret by name, or make one."""
    rendering = render("featureGates.MultiNode=true")
    assert rendering.rules("operator")[("", "secrets")] == {"get", "create"}
    assert "--feature-gates=MultiNode=true" in rendering.container("operator")["args"]
    assert ("", "secrets") not in render("featureGates.MultiNode=false").rules("operator")


def test_listed_namespaces_are_all_that_is_reached(render: "Render") -> None:
    """With `namespaces`, Roles in each of them take the place of the cluster-wide ones."""
    rendering = render("namespaces={a,b}", "rbac.aggregate=false")
    assert not rendering.of("ClusterRole") and not rendering.of("ClusterRoleBinding")
    places = [(o["metadata"]["namespace"], o["metadata"]["name"]) for o in rendering.of("Role")]
    assert sorted(places) == [
        ("a", "shoal-operator"),
        ("a", "shoal-router"),
        ("b", "shoal-operator"),
        ("b", "shoal-router"),
        ("shoal-system", "shoal-leader"),
    ]
    for component in ("operator", "router"):
        assert "--namespaces=a,b" in rendering.container(component)["args"]


def test_accounts_and_roles_can_be_somebody_elses(render: "Render") -> None:
    """Where accounts and permissions are made elsewhere, the chart uses them and makes none."""
    rendering = render(
        "rbac.create=false",
        "rbac.aggregate=false",
        "operator.serviceAccount.create=false",
        "operator.serviceAccount.name=given",
    )
    assert not rendering.of("ClusterRole") and not rendering.of("Role")
    assert rendering.pod("operator")["serviceAccountName"] == "given"
    assert [o["metadata"]["name"] for o in rendering.of("ServiceAccount")] == ["shoal-router"]


@pytest.mark.parametrize("component", ["operator", "router"])
def test_places_and_extras_reach_the_pods(render: "Render", component: str) -> None:
    """Scheduling, extra variables, volumes and metadata stand where Kubernetes wants them."""
    rendering = render(
        f"{component}.priorityClassName=high",
        f"{component}.nodeSelector.zone=z",
        f"{component}.tolerations[0].key=k",
        f"{component}.affinity.nodeAffinity.x=1",
        f"{component}.topologySpreadConstraints[0].maxSkew=2",
        f"{component}.extraEnv[0].name=A",
        f"{component}.extraVolumes[0].name=v",
        f"{component}.extraVolumeMounts[0].name=v",
        f"{component}.extraArgs={{--more}}",
        f"{component}.podLabels.team=t",
        f"{component}.podAnnotations.note=n",
        f"{component}.podDisruptionBudget.enabled=false",
        "commonLabels.cost=c",
    )
    pod, container = rendering.pod(component), rendering.container(component)
    assert pod["priorityClassName"] == "high"
    assert pod["nodeSelector"] == {"zone": "z"}
    assert pod["tolerations"] == [{"key": "k"}]
    assert pod["affinity"] == {"nodeAffinity": {"x": 1}}
    assert pod["topologySpreadConstraints"] == [{"maxSkew": 2}]
    assert {"name": "A"} in container["env"]
    assert {"name": "v"} in pod["volumes"] and {"name": "v"} in container["volumeMounts"]
    assert container["args"][-1] == "--more"
    metadata = rendering.one("Deployment", f"shoal-{component}")["spec"]["template"]["metadata"]
    assert metadata["labels"]["team"] == "t" and metadata["labels"]["cost"] == "c"
    assert metadata["annotations"]["note"] == "n"
    budgets = [o["metadata"]["name"] for o in rendering.of("PodDisruptionBudget")]
    assert f"shoal-{component}" not in budgets and len(budgets) == 1


def test_the_url_is_where_the_service_is(render: "Render") -> None:
    """Status shows the in-cluster name, or the one that clients outside use."""

    def url(*assignments: str) -> str:
        flags = render(*assignments).container("operator")["args"]
        (flag,) = [flag for flag in flags if flag.startswith("--router-url=")]
        return str(flag.partition("=")[2])

    secure = ("router.tls.enabled=true", "router.tls.secretName=mine")
    assert url() == "http://shoal-router.shoal-system.svc"
    assert url("router.service.port=8080") == "http://shoal-router.shoal-system.svc:8080"
    assert url(*secure, "router.service.port=443") == "https://shoal-router.shoal-system.svc"
    assert url("router.url=https://llm.example.com") == "https://llm.example.com"


def test_names_follow_the_release(run_helm: Callable[..., str]) -> None:
    """A release called otherwise prefixes the names, so that two releases differ."""
    text = run_helm("template", "blue", ROOT / "charts/shoal", "--namespace", "n")
    deployments = [
        o["metadata"]["name"] for o in yaml.safe_load_all(text) if o["kind"] == "Deployment"
    ]
    assert sorted(deployments) == ["blue-shoal-operator", "blue-shoal-router"]
