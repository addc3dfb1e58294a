"""Wrong manifests by the hundred: a sentence for each, and nobody else is disturbed."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import httpx
import pytest

from e2e.cluster import services
from e2e.cluster.command import wait_for
from e2e.cluster.kube import Kube, Object
from e2e.cluster.platform import Platform
from e2e.cluster.report import Report
from e2e.cluster.testbed import Testbed, create_service
from tests.api.bad_manifests import REFUSED, UNMET, Unmet

CALM = "calm"
TABLE = "Manifests that are wrong"
HEAD = ("what", "manifests", "errors counted by the operator", "restarts of a service beside them")


@dataclass(frozen=True)
class Beside:
    """A service that is served while others are refused."""

    kube: Kube
    shoal: Platform
    namespace: str
    pod: str  # uid
    errors: float

    def assert_undisturbed(self) -> None:
        (pod,) = services.workers(self.kube, self.namespace, CALM)
        assert pod["metadata"]["uid"] == self.pod
        assert [one["restartCount"] for one in pod["status"]["containerStatuses"]] == [0]
        assert services.settled(self.kube, self.namespace, CALM, 1)
        assert errors(self.shoal) == self.errors
        answer = httpx.post(
            f"{self.shoal.url}/v1/completions",
            json={"model": CALM, "prompt": "Fish live in", "max_tokens": 2},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text


def errors(shoal: Platform) -> float:
    """What the operators have counted since they started."""
    return sum(
        shoal.metrics(pod).get("shoal_reconcile_errors_total", 0.0) for pod in shoal.operators()
    )


@pytest.fixture
def beside(cluster: Testbed, shoal: Platform, namespace: str) -> Iterator[Beside]:
    kube = cluster.kube
    kube.apply(namespace, services.service(CALM))
    wait_for("a service", 180, lambda: services.settled(kube, namespace, CALM, 1), every=0.5)
    (pod,) = services.workers(kube, namespace, CALM)
    found = Beside(kube, shoal, namespace, str(pod["metadata"]["uid"]), errors(shoal))
    yield found
    found.assert_undisturbed()


def test_wrong_manifests_are_refused_when_applied(
    beside: Beside, api: httpx.Client, report: Report
) -> None:
    """The API server refuses each, and says what and where."""
    wrong: list[str] = []
    for bad in REFUSED:
        answer = create_service(api, beside.namespace, bad.document)
        said = str(answer.json().get("message"))
        if answer.status_code < 400 or bad.server not in said:
            wrong.append(f"{bad.why}: {answer.status_code}: {said}")
    assert not wrong, "\n".join(wrong)
    assert {one["metadata"]["name"] for one in _all(beside)} == {CALM}
    beside.assert_undisturbed()
    report.head(TABLE, *HEAD)
    report.row(TABLE, "refused when applied, with the sentence", str(len(REFUSED)), "0", "0")


def test_what_cannot_be_met_becomes_a_condition(
    beside: Beside, api: httpx.Client, report: Report
) -> None:
    """Each is accepted, says why it is not Ready, and disturbs nobody."""
    named: dict[str, Unmet] = {f"unmet-{index}": bad for index, bad in enumerate(UNMET)}
    for name, bad in named.items():
        thing = deepcopy(bad.document)
        thing["metadata"]["name"] = name
        answer = create_service(api, beside.namespace, thing)
        assert answer.status_code == 201, f"{bad.why}: {answer.text}"

    def silent() -> list[str]:
        """Those that do not say yet what they must say."""
        found = {one["metadata"]["name"]: one for one in _all(beside)}
        return [
            f"{bad.why}: {_conditions(found[name])}"
            for name, bad in named.items()
            if not _says(found[name], bad)
        ]

    try:
        wait_for("all to say why", 60, lambda: not silent(), every=1)
    finally:
        assert not (quiet := silent()), "\n".join(quiet)
    beside.assert_undisturbed()
    report.head(TABLE, *HEAD)
    report.row(TABLE, "accepted, with a condition that says why", str(len(UNMET)), "0", "0")


def _all(beside: Beside) -> list[Object]:
    return beside.kube.list("infs", beside.namespace)


def _conditions(thing: Object) -> list[tuple[str, str, str, str]]:
    found = thing.get("status", {}).get("conditions", [])
    return [(one["type"], one["status"], one["reason"], one["message"]) for one in found]


def _says(thing: Object, bad: Unmet) -> bool:
    return any(
        kind == "Degraded" and state == "True" and reason == bad.reason and bad.says in message
        for kind, state, reason, message in _conditions(thing)
    )
