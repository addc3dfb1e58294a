"""The way to the API server: in a pod, by a kubeconfig, and what is said where there is none."""

import base64
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoal.operator.kube.access import NoAccess, load_access


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def kubeconfig(folder: Path, user: dict[str, Any], **cluster: Any) -> Path:
    file = folder / "config"
    document = {
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": "https://1.2.3.4:6443/", **cluster}}],
        "users": [{"name": "u", "user": user}],
    }
    file.write_text(yaml.safe_dump(document))
    return file


def test_a_pod_uses_its_service_account_and_follows_its_token(tmp_path: Path) -> None:
    """The kubelet replaces the file; within seconds, or when asked to, the new token is used."""
    (tmp_path / "token").write_text("one\n")
    (tmp_path / "namespace").write_text("shoal-system\n")
    (tmp_path / "ca.crt").write_text("PEM")
    clock = Clock()
    environ = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
    access = load_access(environ, clock, account=tmp_path)
    assert (access.server, access.namespace) == ("https://[fd00::1]:443", "shoal-system")
    assert access.token.value() == "one"
    (tmp_path / "token").write_text("two")
    assert access.token.value() == "one"
    assert access.token.value(fresh=True) == "two"
    (tmp_path / "token").write_text("three")
    clock.now += 11
    assert access.token.value() == "three"


def test_a_kubeconfig_may_hold_data_or_name_files(tmp_path: Path) -> None:
    """Files are found beside the kubeconfig."""
    (tmp_path / "t").write_text("tok")
    (tmp_path / "ca.pem").write_text("CA")
    user = {
        "tokenFile": "t",
        "client-certificate-data": base64.b64encode(b"CERT").decode(),
        "client-key-data": base64.b64encode(b"KEY").decode(),
    }
    file = kubeconfig(tmp_path, user, **{"certificate-authority": "ca.pem"})
    for environ, named in (({"KUBECONFIG": str(file)}, None), ({}, file)):
        access = load_access(environ, Clock(), kubeconfig=named)
        assert (access.server, access.ca) == ("https://1.2.3.4:6443", "CA")
        assert (access.certificate, access.key) == ("CERT", "KEY")
        assert access.token.value() == "tok"


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    """No cluster and no file, a command plugin, a broken file, a context that is not there."""
    with pytest.raises(NoAccess, match="--kubeconfig"):
        load_access({"HOME": str(tmp_path)}, Clock())
    with pytest.raises(NoAccess, match="from a command"):
        load_access({}, Clock(), kubeconfig=kubeconfig(tmp_path, {"exec": {"command": "aws"}}))
    broken = tmp_path / "broken"
    broken.write_text("a: [")
    with pytest.raises(NoAccess, match="no usable kubeconfig"):
        load_access({}, Clock(), kubeconfig=broken)
    document = yaml.safe_load(kubeconfig(tmp_path, {}).read_text())
    document["current-context"] = "elsewhere"
    broken.write_text(yaml.safe_dump(document))
    with pytest.raises(NoAccess, match="elsewhere"):
        load_access({}, Clock(), kubeconfig=broken)
