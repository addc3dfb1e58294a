"""The real process, with kopf's real streams, against the fake API server."""

import asyncio
import copy
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import yaml

from shoal.operator.kube.kinds import INFERENCE_SERVICES, LEASES, PODS
from tests.operator.kube.fake_api import FakeApi, inference_service, serving
from tests.operator.kube.running import pods_become_ready, quiet, status, until

START_SECONDS = 60.0  # imports, on a busy machine


@asynccontextmanager
async def process(api: FakeApi, folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """`python -m shoal.operator`; its log is shown where the test fails."""
    kubeconfig = folder / "kubeconfig"
    names = {"cluster": "c", "user": "u", "namespace": "shoal"}
    document = {
        "current-context": "x",
        "contexts": [{"name": "x", "context": names}],
        "clusters": [{"name": "c", "cluster": {"server": api.url}}],
        "users": [{"name": "u", "user": {"token": "secret"}}],
    }
    kubeconfig.write_text(yaml.safe_dump(document))
    started = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "shoal.operator", "--kubeconfig", str(kubeconfig)),
        *("--metrics-port", "0", "--health-port", "0", "--log-format", "json"),
        env={**os.environ, "SHOAL_POD_NAME": "op"},
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
            await started.wait()


def test_streams_are_followed_and_sigterm_ends_it(tmp_path: Path) -> None:
    """It serves what is applied, goes on when its streams break, and leaves the lease free."""

    async def main() -> None:
        async with serving(FakeApi()) as api, process(api, tmp_path) as operator:
            pods_become_ready(api)
            api.put(INFERENCE_SERVICES, inference_service())
            await until(lambda: status(api)["readyReplicas"] == 1, within=START_SECONDS)
            await quiet(api)
            api.break_watches()
            live = copy.deepcopy(api.get(INFERENCE_SERVICES, "default", "chat"))
            live["spec"]["replicas"] = 2
            api.put(INFERENCE_SERVICES, live)
            await until(lambda: status(api)["readyReplicas"] == 2)
            api.remove(PODS, "default", api.names(PODS)[0])
            await until(lambda: len(api.names(PODS)) == 2)
            operator.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(operator.wait(), 5) == 0
            lease = api.get(LEASES, "shoal", "shoal-operator")
            assert lease["spec"]["holderIdentity"] == ""

    asyncio.run(main())


def test_it_says_what_is_missing_and_waits_for_it(tmp_path: Path) -> None:
    """Without the type it neither ends nor fails; once the type is there it works."""

    async def main() -> None:
        kinds = tuple(kind for kind in FakeApi().kinds if kind is not INFERENCE_SERVICES)
        api = FakeApi(kinds=kinds)
        async with serving(api), process(api, tmp_path) as operator:
            await until(lambda: api.calls, within=START_SECONDS)
            await asyncio.sleep(1.5)
            assert operator.returncode is None
            api.kinds = FakeApi().kinds
            api.objects[INFERENCE_SERVICES] = {}
            api.put(INFERENCE_SERVICES, inference_service())
            await until(lambda: api.names(PODS), within=20)

    asyncio.run(main())


def test_it_ends_while_it_waits(tmp_path: Path) -> None:
    """SIGTERM counts before there is anything to do, also for the first process of a container."""

    async def main() -> None:
        api = FakeApi(kinds=())
        async with serving(api), process(api, tmp_path) as operator:
            await until(lambda: api.calls, within=START_SECONDS)
            operator.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(operator.wait(), 5) == 0

    asyncio.run(main())
