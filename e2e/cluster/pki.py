"""Keys, certificates and tokens of a cluster that lives for one test run."""

import secrets
from pathlib import Path
from typing import Final

from e2e.cluster.command import run
from e2e.cluster.layout import API_SERVER, FIRST, NODE_IP, SECOND, Layout

DAYS: Final = "3650"
FRONT_PROXY: Final = "front-proxy-client"  # as whom the API server asks aggregated APIs
# user name, groups
USERS: Final = {
    "admin": ("admin", "system:masters"),
    "kwok": ("kwok", "system:masters"),
    **{host.user: (f"system:node:{host.name}", "system:nodes") for host in (FIRST, SECOND)},
    "kube-controller-manager": ("system:kube-controller-manager", ""),
    "kube-scheduler": ("system:kube-scheduler", ""),
    "kube-proxy": ("system:kube-proxy", ""),
}
_API_NAMES: Final = ",".join(
    [
        "DNS:localhost",
        *(
            f"DNS:kubernetes{suffix}"
            for suffix in ("", ".default", ".default.svc", ".default.svc.cluster.local")
        ),
        *(f"IP:{address}" for address in (NODE_IP, "198.19.0.1", "127.0.0.1")),
    ]
)
_KUBECONFIG: Final = """\
apiVersion: v1
kind: Config
clusters: [{{name: shoal-e2e, cluster: {{server: "{server}", certificate-authority: {ca}}}}}]
users: [{{name: {user}, user: {{token: {token}}}}}]
contexts: [{{name: shoal-e2e, context: {{cluster: shoal-e2e, user: {user}}}}}]
current-context: shoal-e2e
"""


def make_keys(layout: Layout) -> None:
    """A new authority, the servers' certificates, and a kubeconfig with a token for each user."""
    pki = layout.pki
    pki.mkdir(parents=True, mode=0o700)
    _authority(pki, "ca", "shoal-e2e")
    _authority(pki, "front-proxy-ca", "front-proxy-ca")
    _certificate(pki, "apiserver", "/CN=kube-apiserver", f"subjectAltName={_API_NAMES}")
    for host in (FIRST, SECOND):
        names = f"subjectAltName=DNS:{host.name},IP:{host.address}"
        _certificate(pki, host.user, f"/CN={host.name}", names)
    _certificate(
        pki, "kubelet-client", "/O=system:masters/CN=apiserver", "extendedKeyUsage=clientAuth"
    )
    client_alone = "extendedKeyUsage=clientAuth"
    _certificate(pki, FRONT_PROXY, f"/CN={FRONT_PROXY}", client_alone, "front-proxy-ca")
    run("openssl", "genrsa", "-out", pki / "sa.key", "2048")
    lines = []
    for user, (name, groups) in USERS.items():
        token = secrets.token_hex(16)
        lines.append(f'{token},{name},{user},"{groups}"\n')
        layout.kubeconfig(user).write_text(
            _KUBECONFIG.format(server=API_SERVER, ca=pki / "ca.crt", user=user, token=token)
        )
        layout.kubeconfig(user).chmod(0o600)
    (pki / "tokens.csv").write_text("".join(lines))


def _key(path: Path) -> None:
    run("openssl", "ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", path)


def _authority(pki: Path, name: str, subject: str) -> None:
    _key(pki / f"{name}.key")
    run(
        *(
            "openssl",
            "req",
            "-x509",
            "-new",
            "-key",
            pki / f"{name}.key",
            "-subj",
            f"/CN={subject}",
        ),
        *("-days", DAYS, "-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        *("-out", pki / f"{name}.crt"),
    )


def _certificate(pki: Path, name: str, subject: str, extension: str, authority: str = "ca") -> None:
    _key(pki / f"{name}.key")
    request = run("openssl", "req", "-new", "-key", pki / f"{name}.key", "-subj", subject)
    extensions = pki / f"{name}.ext"
    extensions.write_text(extension + "\n")
    run(
        *("openssl", "x509", "-req", "-CA", pki / f"{authority}.crt"),
        *("-CAkey", pki / f"{authority}.key"),
        *("-CAcreateserial", "-days", DAYS, "-extfile", extensions, "-out", pki / f"{name}.crt"),
        stdin=request,
    )
