"""From --kubeconfig, --context and --namespace to a client, as kubectl finds its way."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from shoal.cli.errors import CliError
from shoal.cli.kube.client import KubeClient

_POD_NAMESPACE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def connect(
    kubeconfig: str | None, context: str | None, environ: Mapping[str, str] = os.environ
) -> tuple[KubeClient, str]:
    """The client, and the namespace that the context names. Raises CliError.

    Without a kubeconfig, in a pod, its service account is used. Nothing is asked of the server.
    """
    from kubernetes import client, config

    named = kubeconfig or environ.get("KUBECONFIG")
    path = named or str(Path("~/.kube/config").expanduser())
    if not any(Path(part).expanduser().is_file() for part in path.split(os.pathsep)):
        if not named and context is None and environ.get("KUBERNETES_SERVICE_HOST"):
            return _of_pod()
        raise CliError(
            f"no kubeconfig: {path} is not there; name one with --kubeconfig or KUBECONFIG"
        )
    configuration = client.Configuration()
    configuration.retries = False  # whoever waits asks again; nobody else waits for a minute
    try:
        found = _context(path, context)
        api = config.new_client_from_config(
            path, found["name"], persist_config=False, client_configuration=configuration
        )
    except (config.ConfigException, OSError, ValueError, KeyError, TypeError) as error:
        raise CliError(f"the kubeconfig {path} cannot be used: {error}") from error
    return KubeClient(api, found["name"]), _namespace_of(found)


def _context(path: str, wanted: str | None) -> Mapping[str, Any]:
    """The context of that name, or the current one: as for kubectl, of several files the first
    that says something counts. Raises CliError, OSError, ValueError."""
    contexts: dict[str, Mapping[str, Any]] = {}
    current = ""
    for part in filter(None, path.split(os.pathsep)):
        file = Path(part).expanduser()
        if file.is_file():
            document = _document(file)
            current = current or str(document.get("current-context") or "")
            for context in document.get("contexts") or []:
                contexts.setdefault(context["name"], context)
    name = wanted or current
    if name not in contexts:
        missing = f"no context {name!r}" if name else "no current context"
        known = ", ".join(contexts) or "none"
        raise CliError(f"{missing} in {path}; choose one with --context; there are: {known}")
    return contexts[name]


def _document(file: Path) -> Mapping[str, Any]:
    import yaml

    try:
        document = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{file} holds no kubeconfig")
    return document


def _of_pod() -> tuple[KubeClient, str]:
    from kubernetes import client, config

    configuration = client.Configuration()
    configuration.retries = False
    try:
        config.load_incluster_config(client_configuration=configuration)
        namespace = _POD_NAMESPACE.read_text().strip()
    except (config.ConfigException, OSError) as error:
        raise CliError(f"the service account of this pod cannot be used: {error}") from error
    return KubeClient(client.ApiClient(configuration), "of this pod"), namespace or "default"


def _namespace_of(context: Mapping[str, Any]) -> str:
    return str((context.get("context") or {}).get("namespace") or "default")
