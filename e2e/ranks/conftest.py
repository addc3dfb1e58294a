"""What was measured is printed at the end, and written where SHOAL_E2E_RESULTS says."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.cluster.report import Report


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Iterator[Report]:
    found = Report()
    yield found
    text = found.markdown()
    capture = pytestconfig.pluginmanager.get_plugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():
        print(f"\n{text}", flush=True)
    if path := os.environ.get("SHOAL_E2E_RESULTS"):
        Path(path).write_text(text)
