"""The operator's settings: flags, each with an environment variable SHOAL_<NAME>."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import yaml

from shoal.api.names import APP, LABEL_COMPONENT, LABEL_NAME, ROLE_ROUTER
from shoal.api.types import ScalingDriver
from shoal.operator.platform import DEFAULT_IMAGE, Platform, PodDefaults

LOG_FORMATS: Final = ("text", "json")
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
# Gates, each with whether it is on by default.
GATES: Final[Mapping[str, bool]] = {"MultiNode": True, "GPU": False}
_PREFIX: Final = "SHOAL_"


@dataclass(frozen=True, slots=True)
class OperatorSettings:
    """Everything that a person may set."""

    platform: Platform
    namespaces: tuple[str, ...]  # (): the whole cluster
    router_selector: str
    router_namespace: str | None  # None: the operator's own
    router_url: str | None
    lease_name: str
    lease_namespace: str | None  # None: the operator's own
    metrics_port: int
    health_port: int
    external_metrics_port: int  # 0: not served
    tls_cert_file: Path | None  # of the external metrics
    tls_key_file: Path | None
    keda_port: int  # 0: not served
    scaler_address: str  # host:port of keda_port as KEDA reaches it
    workers: int
    identity: str
    pod_uid: str | None  # None: not in a pod, or it was not told
    log_format: str
    log_level: str
    kubeconfig: Path | None


def read_settings(
    arguments: Sequence[str] | None, environ: Mapping[str, str] = os.environ
) -> OperatorSettings:
    """Reads flags and environment; exits with status 2 and a sentence where one is wrong."""
    parser = _parser(environ)
    options = parser.parse_args(arguments)
    try:
        gates = _gates(options.feature_gates)
        pods = _pod_defaults(options.pod_defaults, options.worker_image)
        _check_url(options.router_url)
        drivers = _drivers(options)
    except ValueError as error:
        parser.error(str(error))
    return OperatorSettings(
        platform=Platform(
            pods=pods, multi_node=gates["MultiNode"], gpus=gates["GPU"], drivers=drivers
        ),
        namespaces=_words(options.namespaces),
        router_selector=options.router_selector,
        router_namespace=options.router_namespace or None,
        router_url=options.router_url.rstrip("/") or None,
        lease_name=options.lease_name,
        lease_namespace=options.lease_namespace or None,
        metrics_port=options.metrics_port,
        health_port=options.health_port,
        external_metrics_port=options.external_metrics_port,
        tls_cert_file=Path(options.tls_cert_file) if options.tls_cert_file else None,
        tls_key_file=Path(options.tls_key_file) if options.tls_key_file else None,
        keda_port=options.keda_port,
        scaler_address=options.scaler_address,
        workers=options.workers,
        identity=environ.get("SHOAL_POD_NAME") or os.uname().nodename,
        pod_uid=environ.get("SHOAL_POD_UID") or None,
        log_format=options.log_format,
        log_level=options.log_level,
        kubeconfig=options.kubeconfig,
    )


def _parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m shoal.operator",
        description="Brings about what InferenceServices ask for.",
        epilog="Each flag has an environment variable: --router-url is SHOAL_ROUTER_URL.",
    )

    def flag(name: str, default: str, text: str, **more: Any) -> None:
        variable = _PREFIX + name.upper().replace("-", "_")
        shown = f" (default: {default})" if default else ""
        parser.add_argument(
            f"--{name}", default=environ.get(variable, default), help=text + shown, **more
        )

    flag("namespaces", "", "namespaces to serve, by commas; none: the whole cluster")
    flag(
        "worker-image", "", f"image of worker pods, over that of --pod-defaults and {DEFAULT_IMAGE}"
    )
    flag("pod-defaults", "", "YAML file with what every worker pod has", metavar="FILE")
    selector = f"{LABEL_NAME}={APP},{LABEL_COMPONENT}={ROLE_ROUTER}"
    flag("router-selector", selector, "label selector of the router pods")
    flag("router-namespace", "", "where the router pods are; none: the operator's own namespace")
    flag("router-url", "", "base URL of the routers, shown as status.url", metavar="URL")
    flag("lease-name", "shoal-operator", "name of the Lease by which operators agree who leads")
    flag("lease-namespace", "", "where that Lease is; none: the operator's own namespace")
    flag("metrics-port", "9090", "port of /metrics", type=_port)
    flag("health-port", "8080", "port of /healthz and /readyz", type=_port)
    flag(
        "external-metrics-port",
        "0",
        "port of external.metrics.k8s.io for driver hpa; 0: not served",
        type=_port,
    )
    flag("tls-cert-file", "", "certificate of that port, PEM", metavar="FILE")
    flag("tls-key-file", "", "its key, PEM", metavar="FILE")
    flag("keda-port", "0", "port of KEDA's external scaler for driver keda; 0: none", type=_port)
    flag("scaler-address", "", "host:port of --keda-port as KEDA reaches it")
    flag("workers", "16", "services that are looked at at the same time", type=_count)
    flag("feature-gates", "", f"Name=true by commas; there are {', '.join(GATES)}")
    flag("log-format", "text", "text or json", choices=LOG_FORMATS)
    flag("log-level", "info", "debug, info, warning or error", choices=LOG_LEVELS)
    parser.add_argument(
        "--kubeconfig", type=Path, metavar="FILE", help="outside a cluster: how to reach it"
    )
    return parser


def _gates(text: str) -> dict[str, bool]:
    gates = dict(GATES)
    for word in _words(text):
        name, _, value = word.partition("=")
        if name not in GATES:
            raise ValueError(f"--feature-gates: no gate {name!r}; there are {', '.join(GATES)}")
        if value not in ("true", "false"):
            raise ValueError(f"--feature-gates: {word!r} is neither {name}=true nor {name}=false")
        gates[name] = value == "true"
    return gates


def _drivers(options: argparse.Namespace) -> frozenset[ScalingDriver]:
    """Who may scale services. ValueError where a port lacks what goes with it."""
    drivers = {ScalingDriver.INTERNAL}
    if options.external_metrics_port:
        if not (options.tls_cert_file and options.tls_key_file):
            raise ValueError("--external-metrics-port needs --tls-cert-file and --tls-key-file")
        drivers.add(ScalingDriver.HPA)
    if options.keda_port:
        if not options.scaler_address:
            raise ValueError("--keda-port needs --scaler-address, its host:port as KEDA sees it")
        drivers.add(ScalingDriver.KEDA)
    return frozenset(drivers)


def _pod_defaults(path: str, image: str) -> PodDefaults:
    document: object = {}
    if path:
        try:
            document = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"--pod-defaults {path}: {error}") from None
    if not isinstance(document, Mapping):
        raise ValueError(f"--pod-defaults {path}: expected a mapping")
    return PodDefaults.from_document({**document, "image": image} if image else document)


def _check_url(url: str) -> None:
    if url and urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"--router-url {url}: begin with http:// or https://")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _port(text: str) -> int:
    if text.isdigit() and int(text) < 65536:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no port; give a number from 0 to 65535")


def _count(text: str) -> int:
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no count; give a number from 1")
