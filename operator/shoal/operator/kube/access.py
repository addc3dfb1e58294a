"""How to reach the API server: a pod's service account, or a kubeconfig file outside a cluster.

A service account's token is replaced on disk about once an hour; whoever uses it reads the file
again (`Token`). Kubeconfigs may hold tokens, token files and client certificates; command plugins
are not run: an operator is given its own account.
"""

import base64
import binascii
import ssl
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

ACCOUNT_DIR: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_TOKEN_SECONDS: Final = 10.0


class NoAccess(ValueError):
    """There is no usable way to the API server; the message says what was tried."""


class Token:
    """A bearer token: fixed, or the content of a file that others replace."""

    def __init__(self, clock: Callable[[], float], *, text: str = "", file: Path | None = None):
        self._clock = clock
        self._text = text
        self._file = file
        self._read_at = float("-inf")

    def value(self, *, fresh: bool = False) -> str:
        """The token, empty where there is none; from the file again with `fresh` or by age."""
        now = self._clock()
        if self._file is not None and (fresh or now - self._read_at > _TOKEN_SECONDS):
            self._text = self._file.read_text(encoding="utf-8").strip()
            self._read_at = now
        return self._text


@dataclass(frozen=True, slots=True)
class Access:
    """Everything a client needs to know."""

    server: str  # https://host:port
    token: Token
    namespace: str  # of the operator itself, or of the kubeconfig's context
    ca: str | None = None  # PEM
    certificate: str | None = None  # PEM, of the client
    key: str | None = None  # PEM
    insecure: bool = False

    def ssl_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=self.ca)
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.certificate is not None and self.key is not None:
            # The ssl module loads a certificate from files alone.
            with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
                file.write(f"{self.certificate}\n{self.key}\n")
                file.flush()
                context.load_cert_chain(file.name)
        return context


def load_access(
    environ: Mapping[str, str],
    clock: Callable[[], float],
    *,
    kubeconfig: Path | None = None,
    account: Path = ACCOUNT_DIR,
) -> Access:
    """By `kubeconfig`, else the pod's service account, else $KUBECONFIG or ~/.kube/config."""
    if kubeconfig is not None:
        return _from_kubeconfig(kubeconfig, clock)
    if host := environ.get("KUBERNETES_SERVICE_HOST"):
        return _in_cluster(host, environ.get("KUBERNETES_SERVICE_PORT", "443"), account, clock)
    named = environ.get("KUBECONFIG", "").partition(":")[0]
    path = Path(named) if named else Path(environ.get("HOME", "/")) / ".kube" / "config"
    if not path.is_file():
        raise NoAccess(
            f"not in a cluster (no KUBERNETES_SERVICE_HOST) and there is no kubeconfig {path}; "
            f"run in a pod, or name a file with --kubeconfig"
        )
    return _from_kubeconfig(path, clock)


def _in_cluster(host: str, port: str, account: Path, clock: Callable[[], float]) -> Access:
    host = f"[{host}]" if ":" in host else host
    try:
        return Access(
            server=f"https://{host}:{port}",
            token=Token(clock, file=account / "token"),
            namespace=(account / "namespace").read_text(encoding="utf-8").strip(),
            ca=(account / "ca.crt").read_text(encoding="utf-8"),
        )
    except OSError as error:
        raise NoAccess(f"the pod's service account cannot be read: {error}") from None


def _from_kubeconfig(path: Path, clock: Callable[[], float]) -> Access:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        context = _named(document, "contexts", "context", document["current-context"])
        cluster = _named(document, "clusters", "cluster", context["cluster"])
        user = _named(document, "users", "user", context["user"])
        if "exec" in user or "auth-provider" in user:
            raise NoAccess(
                f"{path}: user {context['user']} gets its credentials from a command; "
                f"use a context with a token or a client certificate"
            )
        token_file = user.get("tokenFile")
        return Access(
            server=cluster["server"].rstrip("/"),
            token=Token(
                clock,
                text=user.get("token", ""),
                file=_beside(path, token_file) if token_file else None,
            ),
            namespace=context.get("namespace", "default"),
            ca=_pem(cluster, "certificate-authority", path),
            certificate=_pem(user, "client-certificate", path),
            key=_pem(user, "client-key", path),
            insecure=bool(cluster.get("insecure-skip-tls-verify", False)),
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise NoAccess(f"{path} is no usable kubeconfig: {error!r}") from None


def _named(document: Mapping[str, Any], section: str, key: str, name: str) -> Mapping[str, Any]:
    found = next((entry[key] for entry in document[section] if entry["name"] == name), None)
    if not isinstance(found, Mapping):
        raise KeyError(f"{section}: {name}")
    return found


def _pem(section: Mapping[str, Any], key: str, path: Path) -> str | None:
    if data := section.get(f"{key}-data"):
        return base64.b64decode(data).decode("ascii")
    if file := section.get(key):
        return _beside(path, file).read_text(encoding="utf-8")
    return None


def _beside(path: Path, file: str) -> Path:
    return path.parent / file
