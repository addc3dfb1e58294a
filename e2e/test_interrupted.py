"""A test run that is ended in the middle leaves nothing behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from e2e.cluster import node, requirements
from e2e.cluster.command import wait_for
from e2e.cluster.layout import BRIDGE, CHECKOUT, default_layout

# What a run of e2e/kubernetes does, up to its first test.
RUN = """
import time
from e2e.cluster.guard import own_cluster
from e2e.cluster.layout import default_layout
with own_cluster(default_layout(), lambda line: None) as started:
    print("up" if started else "found", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_the_cluster_goes_with_its_run(number: signal.Signals) -> None:
    """Processes, mounts, bridge and folder are gone soon after the run was killed."""
    if reason := requirements.unsupported():
        pytest.skip(reason)
    if os.environ.get("KUBECONFIG"):
        pytest.skip("KUBECONFIG names the cluster to use, so none is brought up here")
    if node.read_claim() is not None:
        pytest.skip("this machine runs a cluster already")
    run = default_layout().run
    with subprocess.Popen(
        [sys.executable, "-c", RUN], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = process.stdout.readline().strip()
        process.send_signal(number)
        process.wait(10)
    assert said == "up"
    wait_for("the cluster's end", 120, lambda: node.read_claim() is None)
    wait_for("the end of all that ran", 10, lambda: not _processes(run))
    assert not run.exists()
    assert not Path("/sys/class/net", BRIDGE).exists()
    assert str(run) not in Path("/proc/mounts").read_text()


def _processes(run: Path) -> list[str]:
    """Command lines that name the cluster's folder."""
    lines = (" ".join(one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"]))
    return [line for line in lines if str(run) in line]
