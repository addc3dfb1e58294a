"""The load as other autoscalers read it: the aggregated API, KEDA, and where both get it."""

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import trustme

from shoal.api.types import InferenceService, ScalingDriver, parse_document
from shoal.api.v1 import externalscaler_pb2 as pb
from shoal.api.v1 import externalscaler_pb2_grpc
from shoal.operator.autoscale_load import Load, RouterReport
from shoal.operator.kube.access import Access, Token
from shoal.operator.kube.book import ServiceBook
from shoal.operator.kube.client import Api
from shoal.operator.kube.external_metrics import ExternalMetricsServer, ServingFiles
from shoal.operator.kube.keda import serve_scaler
from shoal.operator.kube.kinds import AUTOSCALERS, CONFIG_MAPS, INFERENCE_SERVICES, SCALED_OBJECTS
from shoal.operator.kube.loadwatch import LoadWatch
from shoal.operator.observe import RouterView
from shoal.operator.platform import Platform
from shoal.operator.scaler import LOOK_SECONDS
from tests.operator.kube.fake_api import BUILT_IN, FakeApi, Json, inference_service, serving
from tests.operator.kube.running import condition, operating, pods_become_ready, quiet, until
from tests.operator.kube.test_router_fleet import Routers

CHAT = "default/chat"
SELECTOR = "labelSelector=serving.shoal.dev/service%3Dchat"


def load(queued: int = 0, idle: float = 0.0) -> Load:
    return Load(queued, {"p0": 3.0}, {"p0": 0.5}, None, idle, True)


def chat(driver: str = "hpa") -> InferenceService:
    document = inference_service(autoscaling={"driver": driver, "maxReplicas": 4})
    return parse_document(document)


class Loads:
    """A service, and a load that the test sets."""

    def __init__(self, driver: str = "hpa") -> None:
        self.now: Load | None = load(queued=7)
        self._chat = chat(driver)
        self._news = asyncio.Event()

    def service(self, key: str) -> InferenceService | None:
        return self._chat if key == CHAT else None

    def load(self, key: str) -> Load | None:
        return self.now

    async def news(self) -> None:
        await self._news.wait()
        self._news.clear()

    def say(self, now: Load) -> None:
        self.now = now
        self._news.set()


class Layer:
    """The API server's aggregation layer: an authority, and a client certificate of it."""

    def __init__(self, folder: Path, name: str = "front-proxy-client") -> None:
        self.serving, self.proxies = trustme.CA(), trustme.CA()
        self.client = self.proxies.issue_cert(common_name=name)
        self.files = ServingFiles(folder / "tls.crt", folder / "tls.key")
        pair = self.serving.issue_cert("localhost")
        pair.cert_chain_pems[0].write_to_path(self.files.certificate)
        pair.private_key_pem.write_to_path(self.files.key)

    def config(self) -> Json:
        return {
            "metadata": {
                "name": "extension-apiserver-authentication",
                "namespace": "kube-system",
            },
            "data": {
                "requestheader-client-ca-file": self.proxies.cert_pem.bytes().decode(),
                "requestheader-allowed-names": '["front-proxy-client"]',
            },
        }

    def context(self, *, certificate: bool = True) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.serving.configure_trust(context)
        if certificate:
            self.client.configure_cert(context)
        return context


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def aggregated(
    tmp_path: Path,
    check: Callable[[Callable[..., Awaitable[tuple[int, Json]]], Loads], Awaitable[None]],
    *,
    name: str = "front-proxy-client",
    certificate: bool = True,
) -> None:
    """Runs the server and hands out `get(path)`, as the aggregation layer calls."""

    async def main() -> None:
        layer, port = Layer(tmp_path, name), free_port()
        async with serving(FakeApi()) as fake:
            fake.put(CONFIG_MAPS, layer.config())
            access = Access(server=fake.url, token=Token(time.monotonic, text="x"), namespace="s")
            async with Api(access, may_write=lambda: False, count=lambda *_: None) as api:
                loads = Loads()
                server = ExternalMetricsServer(
                    api, loads, host="127.0.0.1", port=port, files=layer.files, wall=lambda: 1e9
                )
                task = asyncio.create_task(server.run())
                connector = aiohttp.TCPConnector(ssl=layer.context(certificate=certificate))
                try:
                    async with aiohttp.ClientSession(connector=connector) as session:
                        await until_open(port)

                        async def get(path: str) -> tuple[int, Json]:
                            url = f"https://localhost:{port}/apis/external.metrics.k8s.io/v1beta1"
                            async with session.get(url + path) as answer:
                                return answer.status, await answer.json()

                        await check(get, loads)
                finally:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())


async def until_open(port: int) -> None:
    for _ in range(500):
        with suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(0.01)
    raise AssertionError("nobody listens")


def test_an_autoscaler_reads_the_load(tmp_path: Path) -> None:
    """The list that autoscaling/v2 expects, and one without items where nothing is known."""

    async def check(get: Any, loads: Loads) -> None:
        code, found = await get(f"/namespaces/default/shoal_queue_depth?{SELECTOR}")
        assert code == 200
        assert found["kind"] == "ExternalMetricValueList"
        (item,) = found["items"]
        assert (item["metricName"], item["value"]) == ("shoal_queue_depth", "7")
        assert item["timestamp"] == "2001-09-09T01:46:40Z"
        code, found = await get(f"/namespaces/default/shoal_kv_utilization?{SELECTOR}")
        assert found["items"][0]["value"] == "500m"
        _, found = await get(f"/namespaces/other/shoal_queue_depth?{SELECTOR}")
        assert found["items"] == []
        loads.now = None
        _, found = await get(f"/namespaces/default/shoal_queue_depth?{SELECTOR}")
        assert found["items"] == []
        code, resources = await get("")
        assert "shoal_running" in [resource["name"] for resource in resources["resources"]]

    aggregated(tmp_path, check)


def test_a_question_that_names_no_service_is_refused(tmp_path: Path) -> None:
    """With the label to name it by; an unknown metric gets the list of those there are."""

    async def check(get: Any, loads: Loads) -> None:
        code, said = await get("/namespaces/default/shoal_queue_depth")
        assert (code, said["kind"]) == (400, "Status")
        assert "serving.shoal.dev/service=<name>" in said["message"]
        code, said = await get(f"/namespaces/default/cpu?{SELECTOR}")
        assert code == 404
        assert "shoal_running" in said["message"]

    aggregated(tmp_path, check)


def test_nobody_but_the_aggregation_layer_is_answered(tmp_path: Path) -> None:
    """No certificate: no connection. One of the same authority for another use: 401."""

    async def refused(get: Any, loads: Loads) -> None:
        with pytest.raises((aiohttp.ClientError, OSError)):
            await get("")

    async def stranger(get: Any, loads: Loads) -> None:
        assert (await get(""))[0] == 401

    aggregated(tmp_path, refused, certificate=False)
    aggregated(tmp_path, stranger, name="somebody")


@asynccontextmanager
async def keda(loads: Loads) -> AsyncIterator[Any]:
    async with (
        serve_scaler("127.0.0.1", 0, loads) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield externalscaler_pb2_grpc.ExternalScalerStub(channel)


def where(metric: str = "shoal_queue_depth", namespace: str = "default") -> pb.ScaledObjectRef:
    metadata = {"service": "chat", "metric": metric}
    return pb.ScaledObjectRef(name="chat", namespace=namespace, scalerMetadata=metadata)


def test_keda_reads_target_and_value() -> None:
    """The spec's target, the routers' figure, and a status code where there is none."""

    async def main() -> None:
        loads = Loads("keda")
        async with keda(loads) as stub:
            spec = await stub.GetMetricSpec(where())
            assert spec.metricSpecs[0].targetSizeFloat == 4
            asked = pb.GetMetricsRequest(scaledObjectRef=where(), metricName="shoal_queue_depth")
            found = await stub.GetMetrics(asked)
            assert found.metricValues[0].metricValueFloat == 7
            for call, code in (
                (stub.GetMetricSpec(where(namespace="x")), grpc.StatusCode.NOT_FOUND),
                (stub.GetMetricSpec(where("shoal_running")), grpc.StatusCode.FAILED_PRECONDITION),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await call
                assert error.value.code() is code
            loads.now = None
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.GetMetrics(asked)
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(main())


def test_keda_is_told_when_a_request_wakes_a_service() -> None:
    """Each change once."""

    async def main() -> None:
        loads = Loads("keda")
        loads.now = Load(0, {}, {}, None, 900.0, True)
        async with keda(loads) as stub:
            told = stub.StreamIsActive(where())
            assert (await told.read()).result is False
            loads.say(Load(1, {}, {}, None, 0.0, True))
            assert (await told.read()).result is True
            told.cancel()

    asyncio.run(main())


class Now:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


def view(router: str, queued: int, at: float) -> Mapping[str, RouterView]:
    return {CHAT: RouterView(1, {}, router, RouterReport(at, queued))}


def test_all_routers_are_asked_about_services_that_others_scale() -> None:
    """Their queues add up; a service of our own autoscaler is not asked about."""

    async def main() -> None:
        routers, book, now = Routers("10.0.0.1", "10.0.0.2"), ServiceBook(), Now()
        api: Any = routers
        watch = LoadWatch(api, book, namespace="s", selector="x", connect=routers.connect, wall=now)
        document = inference_service(autoscaling={"driver": "hpa", "maxReplicas": 4})
        document["metadata"] |= {"uid": "u", "generation": 1}
        routers.says["10.0.0.1"] = dict(view("10.0.0.1", 2, 1000.0))
        routers.says["10.0.0.2"] = dict(view("10.0.0.2", 3, 1000.0))
        task = asyncio.create_task(watch.run())
        await watch.news()
        assert not routers.asked
        assert watch.load(CHAT) is None
        book.note(CHAT, document)
        for _ in range(400):
            if (found := watch.load(CHAT)) is not None:
                break
            await asyncio.sleep(0.01)
        assert found is not None
        assert (found.queued, found.complete) == (5, True)
        now.time += 20
        silent = watch.load(CHAT)
        assert silent is None, "reports are too old"
        assert watch.service("default/other") is None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())


def test_a_router_that_never_answers_is_waited_for_a_minute() -> None:
    """Until then the load is not all there is; after that it is no reason to keep replicas."""

    async def main() -> None:
        routers, book, now = Routers("10.0.0.1", "10.0.0.2"), ServiceBook(), Now()
        api: Any = routers
        watch = LoadWatch(api, book, namespace="s", selector="x", connect=routers.connect, wall=now)
        document = inference_service(autoscaling={"driver": "hpa", "maxReplicas": 4})
        document["metadata"] |= {"uid": "u", "generation": 1}
        book.note(CHAT, document)
        routers.says["10.0.0.1"] = dict(view("10.0.0.1", 0, 1000.0))
        routers.says["10.0.0.2"] = None
        task = asyncio.create_task(watch.run())
        await watch.news()
        first = watch.load(CHAT)
        assert first is not None and not first.complete
        now.time += 61
        routers.says["10.0.0.1"] = dict(view("10.0.0.1", 0, now.time))
        await watch.news()
        later = watch.load(CHAT)
        assert later is not None and later.complete
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())


def test_an_autoscaler_comes_and_goes_with_its_driver() -> None:
    """Made for driver hpa, gone for internal; pods follow what it writes meanwhile."""

    async def main() -> None:
        fake = FakeApi(kinds=(*BUILT_IN, AUTOSCALERS))
        async with serving(fake) as api:
            pods_become_ready(api)
            api.put(
                INFERENCE_SERVICES,
                inference_service(autoscaling={"driver": "hpa", "maxReplicas": 4}),
            )
            platform = Platform(drivers=frozenset({ScalingDriver.INTERNAL, ScalingDriver.HPA}))
            async with operating(api, platform=platform):
                await until(lambda: api.names(AUTOSCALERS) == ["chat"])
                await until(lambda: condition(api, "ScalingActive")["reason"] == "DrivenByHpa")
                await quiet(api)
                live = api.get(INFERENCE_SERVICES, "default", "chat")
                changed = {**live, "spec": {**live["spec"], "autoscaling": {"maxReplicas": 4}}}
                api.put(INFERENCE_SERVICES, changed)
                await until(lambda: api.names(AUTOSCALERS) == [])

    asyncio.run(main())


def test_an_autoscaler_is_written_once_and_again_when_its_spec_changes() -> None:
    """Looks that find nothing new write nothing; what the spec leaves out goes from the object."""
    scaling = {
        "driver": "hpa",
        "maxReplicas": 4,
        "metrics": [{"type": "QueueDepth", "target": 4}, {"type": "Running", "target": 2}],
        "behavior": {"scaleDown": {"tolerance": 0.3}},
    }

    async def main() -> None:
        async with serving(FakeApi(kinds=(*BUILT_IN, AUTOSCALERS))) as api:
            pods_become_ready(api)
            api.put(INFERENCE_SERVICES, inference_service(autoscaling=scaling))
            platform = Platform(drivers=frozenset({ScalingDriver.INTERNAL, ScalingDriver.HPA}))
            async with operating(api, platform=platform):
                await until(lambda: api.names(AUTOSCALERS) == ["chat"])
                await quiet(api)
                writes = len(api.writes)
                await asyncio.sleep(2 * LOOK_SECONDS + 0.5)
                assert api.writes[writes:] == []
                live = api.get(INFERENCE_SERVICES, "default", "chat")
                fewer = {**scaling, "behavior": {}}
                api.put(
                    INFERENCE_SERVICES, {**live, "spec": {**live["spec"], "autoscaling": fewer}}
                )
                await until(lambda: len(api.writes) > writes)
                assert any("horizontalpodautoscalers" in path for _, path in api.writes[writes:])

    asyncio.run(main())


def test_a_scaled_object_is_made_where_the_cluster_knows_them() -> None:
    """With the operator's own address in every trigger, and gone with its driver."""

    async def main() -> None:
        async with serving(FakeApi(kinds=(*BUILT_IN, SCALED_OBJECTS))) as api:
            pods_become_ready(api)
            spec = {"driver": "keda", "maxReplicas": 4}
            api.put(INFERENCE_SERVICES, inference_service(autoscaling=spec))
            platform = Platform(drivers=frozenset(ScalingDriver))
            async with operating(api, platform=platform, scaler_address="op:9092"):
                await until(lambda: api.names(SCALED_OBJECTS) == ["chat"])
                made = api.get(SCALED_OBJECTS, "default", "chat")
                addresses = {t["metadata"]["scalerAddress"] for t in made["spec"]["triggers"]}
                assert addresses == {"op:9092"}
                await quiet(api)
                live = api.get(INFERENCE_SERVICES, "default", "chat")
                api.put(INFERENCE_SERVICES, {**live, "spec": {"model": live["spec"]["model"]}})
                await until(lambda: api.names(SCALED_OBJECTS) == [])

    asyncio.run(main())


def test_a_cluster_without_keda_is_told_so() -> None:
    """The condition says what to install, and pods are made nevertheless."""

    async def main() -> None:
        async with serving(FakeApi()) as api:
            pods_become_ready(api)
            spec = {"driver": "keda", "maxReplicas": 4}
            api.put(INFERENCE_SERVICES, inference_service(autoscaling=spec))
            platform = Platform(drivers=frozenset(ScalingDriver))
            async with operating(api, platform=platform, scaler_address="op:9092"):
                await until(lambda: "install KEDA" in condition(api, "Degraded")["message"])
            assert SCALED_OBJECTS not in api.objects

    asyncio.run(main())
