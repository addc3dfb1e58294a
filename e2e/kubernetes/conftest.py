"""A real Kubernetes with Shoal installed by Helm, for the whole session."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.cluster import node, platform, requirements
from e2e.cluster.command import Say, stopwatch
from e2e.cluster.kube import Kube, external_kubeconfig
from e2e.cluster.layout import ClusterError, Layout, default_layout
from e2e.cluster.platform import Platform
from e2e.cluster.report import Report
from e2e.cluster.testbed import Testbed


@pytest.fixture(scope="session")
def say(pytestconfig: pytest.Config) -> Say:
    """Progress lines with seconds, shown while the tests run."""
    reporter = pytestconfig.pluginmanager.get_plugin("terminalreporter")
    assert reporter is not None
    return stopwatch(lambda line: reporter.write_line(f"    {line}"))


@pytest.fixture(scope="session")
def layout() -> Layout:
    return default_layout()


@pytest.fixture(scope="session")
def cluster(layout: Layout, say: Say) -> Iterator[Testbed]:
    """A cluster: the one that KUBECONFIG names, or our own, which is gone at the end."""
    chosen = external_kubeconfig()
    if chosen is not None and chosen.resolve() != layout.kubeconfig().resolve():
        yield Testbed(Kube(chosen), None)
        return
    if reason := requirements.unsupported():
        if os.environ.get("CI"):
            pytest.fail(f"no test cluster: {reason}")
        pytest.skip(reason)
    started = node.up(layout, say, owned=True)
    say("the cluster is up")
    try:
        yield Testbed(Kube(layout.kubeconfig()), layout)
    finally:
        kept = node.keep_logs(layout)
        if started:
            node.down(layout)
            say(f"the cluster is gone; logs of its processes: {kept}")


@pytest.fixture(scope="session")
def shoal(cluster: Testbed, say: Say, tmp_path_factory: pytest.TempPathFactory) -> Platform:
    """Shoal, installed."""
    values = tmp_path_factory.mktemp("helm") / "values.yaml"
    if cluster.layout is None:
        values = platform.external_values()
    else:
        platform.write_values(platform.own_values(cluster.layout, say), values)
    found = Platform(cluster.kube, values)
    try:
        found.install()
    except ClusterError as error:
        pytest.fail(f"{error}\n{cluster.describe(platform.NAMESPACE)}")
    say("helm install: operator and routers ready")
    return found


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
