"""Why a request is refused or given up, in words for its client."""

from shoal.router.generation import GenerationError


def queue_full(service: str, waiting: int, limit: int, retry_after: float) -> GenerationError:
    return GenerationError(
        429,
        "queue_full",
        f"{service} has {waiting} requests waiting, and its limit (maxQueued) is {limit}",
        retry_after=retry_after,
    )


def no_revision(service: str, revision: str) -> GenerationError:
    return GenerationError(
        404,
        "revision_not_found",
        f"no replica of {service} has revision {revision!r}",
        field="revision",
    )


def timed_out(service: str, waited: float, timeout: float, retry_after: float) -> GenerationError:
    message = f"the request waited {waited:.1f} s for {service}; its timeout is {timeout} s"
    return GenerationError(408, "timeout", message, retry_after=retry_after)


def no_room(service: str, limit: float, retry_after: float) -> GenerationError:
    """`limit`: seconds that a request may wait."""
    message = f"{service} is busy: no replica had room within {limit:g} s"
    return GenerationError(429, "queue_timeout", message, retry_after=retry_after)


def no_replica(service: str, limit: float, retry_after: float) -> GenerationError:
    """`limit`: seconds that a request may wait."""
    message = f"{service} has no replica that is ready; the request waited {limit:g} s for one"
    return GenerationError(503, "no_replica", message, retry_after=retry_after)
