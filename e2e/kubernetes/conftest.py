"""A real Kubernetes with Shoal installed by Helm, for the whole session."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from e2e.cluster import guard, platform, requirements
from e2e.cluster.command import Say, stopwatch
from e2e.cluster.forward import Forward, forwarded
from e2e.cluster.kube import Kube, external_kubeconfig
from e2e.cluster.layout import ClusterError, Layout, default_layout
from e2e.cluster.platform import Platform
from e2e.cluster.report import Report
from e2e.cluster.testbed import Testbed, open_api, since

COSTS = "What the cluster costs"
HERE = Path(__file__).resolve().parent
TEST_SECONDS = 600


@pytest.fixture(scope="session")
def say(pytestconfig: pytest.Config) -> Say:
    """Progress lines with seconds, shown while the tests run."""
    capture = pytestconfig.pluginmanager.get_plugin("capturemanager")
    assert capture is not None

    def write(line: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n    {line}", end="", flush=True)

    return stopwatch(write)


@pytest.fixture(scope="session")
def layout() -> Layout:
    return default_layout()


@pytest.fixture(scope="session")
def cluster(layout: Layout, say: Say, report: Report) -> Iterator[Testbed]:
    """A cluster: the one that KUBECONFIG names, or our own, which is gone at the end."""
    chosen = external_kubeconfig()
    if chosen is not None and chosen.resolve() != layout.kubeconfig().resolve():
        yield Testbed(Kube(chosen), None)
        return
    if reason := requirements.unsupported():
        if os.environ.get("CI"):
            pytest.fail(f"no test cluster: {reason}")
        pytest.skip(reason)
    began = time.monotonic()
    with guard.own_cluster(layout, say) as started:
        report.head(COSTS, "what", "seconds")
        report.row(COSTS, "cluster up" if started else "found up", since(began))
        yield Testbed(Kube(layout.kubeconfig()), layout)


@pytest.fixture(scope="session")
def forward(cluster: Testbed) -> Iterator[Forward]:
    """The way to the routers of a cluster that is not this machine's."""
    router = (platform.NAMESPACE, f"{platform.RELEASE}-router", "http")
    with forwarded(cluster.kube, *router) as found:
        yield found


@pytest.fixture(scope="session")
def shoal(
    cluster: Testbed,
    say: Say,
    report: Report,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Platform:
    """Shoal, installed."""
    values = tmp_path_factory.mktemp("helm") / "values.yaml"
    began = time.monotonic()
    forward: Forward | None = None
    if cluster.layout is None:
        values = platform.external_values()
        forward = request.getfixturevalue("forward")
    else:
        platform.write_values(platform.own_values(cluster.layout, say), values)
        report.row(COSTS, "images of router and operator there", since(began))
    found = Platform(cluster.kube, values, forward)
    began = time.monotonic()
    try:
        found.install()
    except ClusterError as error:
        pytest.fail(f"{error}\n{cluster.describe(platform.NAMESPACE)}")
    report.head(COSTS, "what", "seconds")
    report.row(COSTS, "helm install: two operators and two routers ready", since(began))
    say("helm install: operators and routers ready")
    return found


@pytest.fixture(scope="session")
def api(cluster: Testbed) -> Iterator[httpx.Client]:
    """The API server, for requests by the hundred."""
    with open_api(cluster.kube) as client:
        yield client


@pytest.fixture
def namespace(cluster: Testbed, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of the test's own. When the test fails, what is in it is kept in a folder."""
    name = cluster.make_namespace(request.node.name)
    yield name
    report = getattr(request.node, "outcome_of_call", None)
    if report is None or report.failed:
        folder = cluster.keep(name, request.node.name)
        print(f"objects, events and logs: {folder}")
    cluster.remove_namespace(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test's time is its own: the first run of a machine builds a Kubernetes before it."""
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS, func_only=True))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]  # pluggy's result is untyped here
    if report.when == "call":
        item.outcome_of_call = report  # type: ignore[attr-defined]  # read by the fixture above


@pytest.fixture(scope="session")
def report(say: Say, pytestconfig: pytest.Config) -> Iterator[Report]:
    """Measured figures, printed at the end and written where SHOAL_E2E_RESULTS says."""
    found = Report()
    yield found
    for line in found.markdown().splitlines():
        say(line)
    if path := os.environ.get("SHOAL_E2E_RESULTS"):
        Path(path).write_text(found.markdown())
