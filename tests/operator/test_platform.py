"""The operator's own configuration of pods."""

import pytest

from shoal.operator.platform import KUBERNETES, LOCAL, PodDefaults
from tests.operator.conftest import make_service

DOCUMENT = {
    "image": "reg/worker:2",
    "imagePullPolicy": "Always",
    "imagePullSecrets": [{"name": "regcred"}],
    "serviceAccountName": "workers",
    "podOverlay": {"spec": {"priorityClassName": "high"}},
}


def test_pod_defaults_are_read_and_written():
    """Every key, there and back; nothing given is nothing written."""
    assert PodDefaults.from_document(DOCUMENT).to_document() == DOCUMENT
    assert PodDefaults.from_document({}) == PodDefaults()
    assert PodDefaults().to_document() == {}


@pytest.mark.parametrize(
    "document, words",
    [
        ({"imgae": "x"}, "unknown key 'imgae'"),
        ({"image": 7}, "image is not right: expected text, got 7"),
        ({"imagePullPolicy": "Sometimes"}, "'Sometimes' is none of Always, IfNotPresent, Never"),
        ({"imagePullSecrets": ["regcred"]}, "imagePullSecrets is not right"),
        ({"podOverlay": "spec"}, "podOverlay is not right: expected a partial pod template"),
        ({"podOverlay": {"spec": None}}, "podOverlay is not right: spec (must be an object)"),
        ({"podOverlay": {"spec": {"hostname": "x"}}}, "spec.hostname (Shoal sets it)"),
    ],
)
def test_bad_defaults_are_named(document, words):
    """The operator does not start on a typing error."""
    with pytest.raises(ValueError, match="pod defaults") as error:
        PodDefaults.from_document(document)
    assert words in str(error.value)


def test_services_of_two_namespaces_have_two_keys():
    """On one machine there are no namespaces to tell apart."""
    assert KUBERNETES.service_key(make_service()) == "default/chat"
    assert LOCAL.service_key(make_service()) == "chat"
