"""The optional objects: what makes them, what is in them, what a wrong value is told."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

if TYPE_CHECKING:
    from tests.charts.conftest import Render

TLS = ("router.tls.enabled=true", "router.tls.secretName=mine")
ISSUER = (
    "router.tls.enabled=true",
    "router.tls.certManager.enabled=true",
    "router.tls.certManager.issuerRef.name=ca",
    "router.tls.certManager.issuerRef.kind=ClusterIssuer",
    "router.tls.certManager.dnsNames={llm.example.com}",
)


def test_a_given_certificate_is_served(render: "Render") -> None:
    """The Secret is mounted where the flags point, and probes speak HTTPS."""
    rendering = render(*TLS)
    assert {"name": "tls", "secret": {"secretName": "mine"}} in rendering.pod("router")["volumes"]
    container = rendering.container("router")
    assert {"name": "tls", "mountPath": "/etc/shoal/tls", "readOnly": True} in container[
        "volumeMounts"
    ]
    assert container["readinessProbe"]["httpGet"]["scheme"] == "HTTPS"
    assert not rendering.of("Certificate")


def test_cert_manager_is_asked_for_the_routers_names(render: "Render") -> None:
    """The certificate covers the Service and the names that the user adds."""
    rendering = render(*ISSUER)
    spec = rendering.one("Certificate", "shoal-router")["spec"]
    assert spec["issuerRef"] == {"name": "ca", "kind": "ClusterIssuer", "group": "cert-manager.io"}
    assert spec["dnsNames"][-2:] == ["shoal-router.shoal-system.svc", "llm.example.com"]
    mounted = {"name": "tls", "secret": {"secretName": spec["secretName"]}}
    assert mounted in rendering.pod("router")["volumes"]


def test_an_hpa_owns_the_number_of_routers(render: "Render") -> None:
    """With autoscaling the Deployment names no number, else an upgrade would reset it."""
    rendering = render("router.autoscaling.enabled=true", "router.autoscaling.maxReplicas=4")
    assert "replicas" not in rendering.one("Deployment", "shoal-router")["spec"]
    spec = rendering.one("HorizontalPodAutoscaler", "shoal-router")["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 4)
    assert spec["scaleTargetRef"]["name"] == "shoal-router"


def test_an_ingress_leads_to_the_router(render: "Render") -> None:
    """Every path of every host goes to the Service's HTTP port."""
    rendering = render("ingress.enabled=true", "ingress.hosts={a.example,b.example}")
    rules = rendering.one("Ingress", "shoal-router")["spec"]["rules"]
    assert [rule["host"] for rule in rules] == ["a.example", "b.example"]
    (path,) = rules[0]["http"]["paths"]
    assert path["backend"]["service"] == {"name": "shoal-router", "port": {"name": "http"}}


def test_a_gateway_route_has_no_time_limit(render: "Render") -> None:
    """Streams may last; the route names the Service's own port."""
    rendering = render(
        "httpRoute.enabled=true", "httpRoute.parentRefs[0].name=gw", "router.service.port=8080"
    )
    (rule,) = rendering.one("HTTPRoute", "shoal-router")["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": "shoal-router", "port": 8080}]
    assert rule["timeouts"] == {"request": "0s"}


def test_engines_are_reached_by_routers_and_the_operator_alone(render: "Render") -> None:
    """In every listed namespace the engine's port is open to the release's routers, and to its
    operator, which swaps weights there and may call webhooks where a value says so."""
    rendering = render(
        "networkPolicy.enabled=true",
        "namespaces={a,b}",
        "featureGates.MultiNode=false",
        "networkPolicy.operatorEgress[0].ports[0].port=443",
    )
    policies = [
        p for p in rendering.of("NetworkPolicy") if p["metadata"]["name"] == "shoal-workers"
    ]
    assert [policy["metadata"]["namespace"] for policy in policies] == ["a", "b"]
    engine = policies[0]["spec"]["ingress"][0]
    assert engine["ports"] == [{"protocol": "TCP", "port": 9000}]
    home = {"kubernetes.io/metadata.name": "shoal-system"}
    assert [peer["namespaceSelector"]["matchLabels"] for peer in engine["from"]] == [home, home]
    labels = [peer["podSelector"]["matchLabels"] for peer in engine["from"]]
    assert [of["app.kubernetes.io/component"] for of in labels] == ["router", "operator"]
    ports = [rule.get("ports", [{}])[0].get("port") for rule in policies[0]["spec"]["ingress"]]
    assert ports == [9000, 9001]
    egress = rendering.one("NetworkPolicy", "shoal-operator")["spec"]["egress"]
    ports = [[port["port"] for port in rule["ports"]] for rule in egress]
    assert ports == [[53, 53], [443, 6443], [8001], [9000], [443]]


def test_pods_of_a_group_reach_each_other(render: "Render") -> None:
    """Where replicas have several pods, and only there, workers may talk to workers."""
    rendering = render(
        "networkPolicy.enabled=true", "namespaces={a}", "featureGates.MultiNode=true"
    )
    (_, _, among) = rendering.one("NetworkPolicy", "shoal-workers")["spec"]["ingress"]
    assert among["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "worker"


def test_clients_are_narrowed_without_shutting_the_operator_out(render: "Render") -> None:
    """With clients listed, the operator still asks routers for their load, and scrapers scrape."""
    rendering = render(
        "networkPolicy.enabled=true",
        "networkPolicy.clients[0].podSelector.matchLabels.app=web",
        "networkPolicy.scrapers[0].namespaceSelector.matchLabels.name=monitoring",
    )
    ingress = rendering.one("NetworkPolicy", "shoal-router")["spec"]["ingress"]
    ports = [[port["port"] for port in rule["ports"]] for rule in ingress]
    assert ports == [[8000, 8001], [8001], [8000]]
    (peer,) = ingress[1]["from"]
    assert peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "operator"


def test_monitors_find_the_ports(render: "Render") -> None:
    """The named ports of the monitors exist at the Service and at the pod."""
    rendering = render("monitoring.enabled=true", "monitoring.labels.release=prom", *TLS)
    router = rendering.one("ServiceMonitor", "shoal-router")
    operator = rendering.one("PodMonitor", "shoal-operator")
    (endpoint,) = router["spec"]["endpoints"]
    service = rendering.one("Service", "shoal-router")
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    assert endpoint["scheme"] == "https"
    assert (
        router["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    )
    (endpoint,) = operator["spec"]["podMetricsEndpoints"]
    ports = rendering.container("operator")["ports"]
    assert endpoint["port"] in [port["name"] for port in ports]
    assert router["metadata"]["labels"]["release"] == "prom"


def test_alerts_have_the_users_limits_and_labels(render: "Render") -> None:
    """Limits come from the values, a user's label does not displace the severity by accident."""
    rendering = render(
        "monitoring.enabled=true",
        "monitoring.alerts.enabled=true",
        "monitoring.alerts.queueDepth=7",
        "monitoring.alerts.labels.team=llm",
    )
    groups = rendering.one("PrometheusRule", "shoal")["spec"]["groups"]
    rules = {rule["alert"]: rule for group in groups for rule in group["rules"]}
    assert rules["ShoalQueueLong"]["expr"].endswith("> 7")
    assert rules["ShoalQueueLong"]["labels"] == {"severity": "warning", "team": "llm"}
    assert "{{ $labels.service }}" in rules["ShoalQueueLong"]["annotations"]["summary"]
    assert all({"summary", "description"} == set(rule["annotations"]) for rule in rules.values())


def test_the_dashboard_is_found_by_grafana(render: "Render") -> None:
    """The ConfigMap carries the sidecar's label and a whole dashboard."""
    config = render("monitoring.dashboard.enabled=true").one("ConfigMap", "shoal-dashboard")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    board = json.loads(config["data"]["shoal.json"])
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in board["panels"]}) == len(places)


def test_external_metrics_are_registered_with_the_certificate_they_are_served_by(
    render: "Render",
) -> None:
    """The API server reaches the named port of the operator, and trusts the chart's own pair."""
    rendering = render("externalMetrics.enabled=true")
    spec = rendering.one("APIService", "v1beta1.external.metrics.k8s.io")["spec"]
    secret = rendering.one("Secret", "shoal-operator-tls")
    assert spec["caBundle"] == secret["data"]["tls.crt"]
    service = rendering.one("Service", spec["service"]["name"])
    (port,) = service["spec"]["ports"]
    assert port["port"] == spec["service"]["port"]
    container = rendering.container("operator")
    assert port["targetPort"] in [found["name"] for found in container["ports"]]
    assert "--tls-cert-file=/etc/shoal-tls/tls.crt" in container["args"]
    volumes = rendering.pod("operator")["volumes"]
    assert {"name": "tls", "secret": {"secretName": "shoal-operator-tls"}} in volumes
    (rule,) = [
        rule
        for rule in rendering.one("ClusterRole", "shoal-system:shoal-operator")["rules"]
        if rule["apiGroups"] == ["autoscaling"]
    ]
    assert set(rule["verbs"]) == {"get", "list", "create", "patch", "delete"}


def test_a_certificate_of_ones_own_needs_its_authority(render: "Render") -> None:
    """With both nothing is made; the API server gets the authority."""
    mine = ("externalMetrics.enabled=true", "externalMetrics.tls.secretName=mine")
    with pytest.raises(RuntimeError, match="caBundle must hold the authority"):
        render(*mine)
    rendering = render(*mine, "externalMetrics.tls.caBundle=Q0E=")
    assert not rendering.of("Secret")
    spec = rendering.one("APIService", "v1beta1.external.metrics.k8s.io")["spec"]
    assert spec["caBundle"] == "Q0E="


def test_keda_finds_the_scaler(render: "Render") -> None:
    """The operator tells KEDA the name and port of its own Service."""
    rendering = render("keda.enabled=true")
    service = rendering.one("Service", "shoal-operator")
    (port,) = service["spec"]["ports"]
    args = rendering.container("operator")["args"]
    assert f"--scaler-address=shoal-operator.shoal-system.svc:{port['port']}" in args
    assert f"--keda-port={port['port']}" in args
    assert not rendering.of("APIService")


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (("operator.replcas=2",), "additional properties 'replcas' not allowed"),
        (("operator.replicas=two",), "got string, want integer"),
        (("operator.replicas=-1",), "minimum"),
        (("logFormat=xml",), "must be one of 'text', 'json'"),
        (("router.image.digest=latest",), "does not match pattern"),
        (("featureGates.MultiNode=perhaps",), "want boolean"),
        (("featureGates.Warp=true",), "additional properties 'Warp' not allowed"),
        (("router.tls.enabled=true",), "router.tls.secretName must name a Secret"),
        (("monitoring.alerts.enabled=true",), "needs monitoring.enabled=true"),
        (("ingress.enabled=true",), "ingress.hosts must name at least one host"),
        (("httpRoute.enabled=true",), "httpRoute.parentRefs must name at least one Gateway"),
        (
            ("router.tls.enabled=true", "router.tls.certManager.enabled=true"),
            "router.tls.certManager.issuerRef.name must name an Issuer",
        ),
        (
            ("router.serviceAccount.create=false",),
            "router.serviceAccount.name must name an account that exists",
        ),
    ],
)
def test_a_wrong_value_is_refused(
    render: "Render", assignments: tuple[str, ...], said: str
) -> None:
    """Helm names the value and what it should be, before anything is installed."""
    with pytest.raises(RuntimeError, match=re.escape(said)):
        render(*assignments)


def test_the_crd_outlives_its_chart(run_helm: Callable[..., str]) -> None:
    """helm uninstall leaves the type, and with it all services."""
    text = run_helm("template", "crds", Path(__file__).parents[2] / "charts/shoal-crds")
    (crd,) = yaml.safe_load_all(text)
    assert crd["kind"] == "CustomResourceDefinition"
    assert crd["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
