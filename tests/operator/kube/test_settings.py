"""Flags and their environment: what is wrong is said with the flag and the way out."""

from pathlib import Path

import pytest

from shoal.api.types import ScalingDriver
from shoal.operator.kube.settings import OperatorSettings, read_settings


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    with pytest.raises(SystemExit) as error:
        read_settings(flags, {})
    assert error.value.code == 2
    return capsys.readouterr().err


def read(*flags: str, **environ: str) -> OperatorSettings:
    return read_settings(flags, environ)


def test_defaults_serve_the_whole_cluster() -> None:
    """Nothing need be given in a cluster."""
    settings = read()
    assert settings.namespaces == ()
    assert settings.router_selector == (
        "app.kubernetes.io/name=shoal,app.kubernetes.io/component=router"
    )
    assert settings.platform.multi_node


def test_each_flag_has_a_variable() -> None:
    """The flag wins over its variable."""
    settings = read("--lease-name", "b", SHOAL_LEASE_NAME="a", SHOAL_NAMESPACES="x, y,")
    assert settings.lease_name == "b"
    assert settings.namespaces == ("x", "y")


def test_gates_are_switched_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown gate and an unknown value are refused."""
    assert read("--feature-gates", "MultiNode=true,GPU=false").platform.multi_node
    assert not read("--feature-gates", "MultiNode=false").platform.multi_node
    assert "there are MultiNode, GPU" in refused(capsys, "--feature-gates", "Magic=true")
    assert "MultiNode=true nor MultiNode=false" in refused(capsys, "--feature-gates", "MultiNode")


def test_pod_defaults_come_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The flag for the image wins; a key that nobody reads is refused."""
    file = tmp_path / "pods.yaml"
    file.write_text("image: a\nimagePullPolicy: Never\n")
    assert read("--pod-defaults", str(file)).platform.pods.image == "a"
    settings = read("--pod-defaults", str(file), "--worker-image", "b")
    assert settings.platform.pods.image == "b"
    assert settings.platform.pods.image_pull_policy == "Never"
    file.write_text("imag: a\n")
    assert "unknown key 'imag'" in refused(capsys, "--pod-defaults", str(file))
    file.write_text("- a\n")
    assert "expected a mapping" in refused(capsys, "--pod-defaults", str(file))
    assert "No such file" in refused(capsys, "--pod-defaults", str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--metrics-port", "70000", "0 to 65535"),
        ("--health-port", "http", "0 to 65535"),
        ("--workers", "0", "from 1"),
        ("--router-url", "router:8000", "http://"),
        ("--log-format", "xml", "choose from"),
    ],
)
def test_wrong_values_are_refused(
    capsys: pytest.CaptureFixture[str], flag: str, value: str, says: str
) -> None:
    """The sentence names the flag, the value and what would do."""
    said = refused(capsys, flag, value)
    assert flag in said and value in said and says in said


def test_other_autoscalers_need_their_ports_and_files(capsys: pytest.CaptureFixture[str]) -> None:
    """Each port brings its driver, and says what it lacks."""
    assert "--tls-cert-file" in refused(capsys, "--external-metrics-port", "6443")
    assert "--scaler-address" in refused(capsys, "--keda-port", "9092")
    settings = read(
        *("--external-metrics-port", "6443", "--tls-cert-file", "/c", "--tls-key-file", "/k"),
        *("--keda-port", "9092", "--scaler-address", "op:9092"),
    )
    assert settings.platform.drivers == frozenset(ScalingDriver)
    assert read().platform.drivers == {ScalingDriver.INTERNAL}
