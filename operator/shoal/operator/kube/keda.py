"""KEDA's external scaler: the same figures that HorizontalPodAutoscalers get, over gRPC.

A trigger names the service and one metric; KEDA makes the autoscaler, and wakes a service at zero
when it is told that a request waits.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import ceil
from typing import Any, Final, Protocol

import grpc

from shoal.api.types import InferenceService
from shoal.api.v1 import externalscaler_pb2 as pb
from shoal.api.v1 import externalscaler_pb2_grpc
from shoal.operator.autoscale_load import Load
from shoal.operator.external import ExternalMetric, external_metrics, has_work, values

log: Final = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class WatchedLoads(Protocol):
    """Who knows the load of services that others scale, by `namespace/name`."""

    def service(self, key: str) -> InferenceService | None: ...

    def load(self, key: str) -> Load | None: ...

    async def news(self) -> None: ...


class ExternalScaler(externalscaler_pb2_grpc.ExternalScalerServicer):
    """Answers NOT_FOUND for a service that KEDA does not scale, FAILED_PRECONDITION for a metric
    that its spec does not ask for, and UNAVAILABLE where the load is not known."""

    def __init__(self, loads: WatchedLoads) -> None:
        self._loads = loads

    async def IsActive(self, request: pb.ScaledObjectRef, context: Context) -> pb.IsActiveResponse:
        await self._service(request, context)
        load = self._loads.load(_key(request))
        if load is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no router reports the load")
        return pb.IsActiveResponse(result=has_work(load))

    async def StreamIsActive(
        self, request: pb.ScaledObjectRef, context: Context
    ) -> AsyncIterator[pb.IsActiveResponse]:
        await self._service(request, context)
        told: bool | None = None
        while self._loads.service(_key(request)) is not None:
            load = self._loads.load(_key(request))
            active = has_work(load) if load is not None else told
            if active is not None and active is not told:
                told = active
                yield pb.IsActiveResponse(result=active)
            await self._loads.news()

    async def GetMetricSpec(
        self, request: pb.ScaledObjectRef, context: Context
    ) -> pb.GetMetricSpecResponse:
        metric = await self._metric(request, context)
        spec = pb.MetricSpec(
            metricName=metric.name, targetSize=ceil(metric.target), targetSizeFloat=metric.target
        )
        return pb.GetMetricSpecResponse(metricSpecs=[spec])

    async def GetMetrics(
        self, request: pb.GetMetricsRequest, context: Context
    ) -> pb.GetMetricsResponse:
        where = request.scaledObjectRef
        service, metric = await self._service(where, context), await self._metric(where, context)
        load = self._loads.load(_key(where))
        value = values(service, load).get(metric.name) if load is not None else None
        if value is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"{metric.name} is not known")
        found = pb.MetricValue(
            metricName=metric.name, metricValue=ceil(value), metricValueFloat=value
        )
        return pb.GetMetricsResponse(metricValues=[found])

    async def _service(self, where: pb.ScaledObjectRef, context: Context) -> InferenceService:
        service = self._loads.service(_key(where))
        if service is None:
            said = f"KEDA scales no InferenceService {_key(where)}"
            await context.abort(grpc.StatusCode.NOT_FOUND, said)
        return service

    async def _metric(self, where: pb.ScaledObjectRef, context: Context) -> ExternalMetric:
        service = await self._service(where, context)
        assert service.spec.autoscaling is not None, "somebody scales it"
        asked = where.scalerMetadata.get("metric", "")
        for metric in external_metrics(service.spec.autoscaling):
            if metric.name == asked:
                return metric
        return await context.abort(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"spec.autoscaling.metrics of {_key(where)} has no {asked or 'metric without a name'}",
        )


@asynccontextmanager
async def serve_scaler(host: str, port: int, loads: WatchedLoads) -> AsyncIterator[int]:
    """Serves KEDA; yields the port it got."""
    server = grpc.aio.server()
    externalscaler_pb2_grpc.add_ExternalScalerServicer_to_server(ExternalScaler(loads), server)
    got = server.add_insecure_port(f"{host or '[::]'}:{port}")
    await server.start()
    try:
        yield got
    finally:
        await server.stop(None)


def _key(where: pb.ScaledObjectRef) -> str:
    return f"{where.namespace}/{where.scalerMetadata.get('service') or where.name}"
