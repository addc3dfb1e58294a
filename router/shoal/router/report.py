"""A router's figures for the autoscaler and the canary analysis: `Router.GetLoad`."""

from shoal.api.v1 import engine_pb2, router_pb2
from shoal.router.core import Service
from shoal.router.histogram import Histogram


def service_load(service: Service, now: float) -> router_pb2.ServiceLoad:
    """What one service looks like from here. `now` is of the core's clock."""
    dispatcher = service.dispatcher
    stats = dispatcher.stats
    replicas = list(dispatcher.replicas.values())
    oldest = dispatcher.queue.oldest()
    report = router_pb2.ServiceLoad(
        service=service.table.service,
        generation=service.table.generation,
        queued=service.queued,
        oldest_queued_seconds=0.0 if oldest is None else now - oldest,
        arrivals=stats.arrivals,
        idle_seconds=0.0 if service.queued else stats.idle_seconds(now),
    )
    for name in sorted({*stats.revisions, *(replica.revision for replica in replicas)} - {""}):
        revision = stats.of(name)
        ttft, itl = revision.ttft.quantiles(0.5, 0.95), revision.itl.quantiles(0.5, 0.95)
        report.revisions.add(
            revision=name,
            running=sum(r.in_flight for r in replicas if r.revision == name),
            requests=revision.ended,
            errors=revision.errors,
            ttft_p50_seconds=ttft[0],
            ttft_p95_seconds=ttft[1],
            itl_p50_seconds=itl[0],
            itl_p95_seconds=itl[1],
            ttft=_durations(revision.ttft),
            itl=_durations(revision.itl),
            broken=revision.broken,
        )
    for replica in replicas:
        load = engine_pb2.Load()
        load.CopyFrom(replica.load)
        report.endpoints.add(
            name=replica.name,
            address=replica.address,
            revision=replica.revision,
            admitted=replica.available and not replica.outlier.ejected(now),
            in_flight=replica.in_flight,
            load=load,
            startup=replica.startup,
            warm_blocks=dispatcher.selection.index.held(replica.name),
        )
    return report


def _durations(histogram: Histogram) -> router_pb2.Durations:
    first, counts = histogram.counts()
    return router_pb2.Durations(first=first, counts=counts)
