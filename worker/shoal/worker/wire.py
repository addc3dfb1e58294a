"""Between protobuf and the engine's own data. Pure."""

from collections.abc import Iterable
from types import MappingProxyType
from typing import Any, Final

from shoal.api.v1 import engine_pb2
from shoal.worker.engine import EngineLoad, SequenceDelta
from shoal.worker.request import (
    EngineRequest,
    ErrorCode,
    FinishReason,
    InvalidRequest,
    SamplingParams,
)
from shoal.worker.step import TokenLogprobs
from shoal.worker.validate import MAX_SAMPLES

_FINISH = MappingProxyType(
    {
        FinishReason.STOP: engine_pb2.FINISH_REASON_STOP,
        FinishReason.LENGTH: engine_pb2.FINISH_REASON_LENGTH,
        FinishReason.CANCELLED: engine_pb2.FINISH_REASON_CANCELLED,
        FinishReason.ERROR: engine_pb2.FINISH_REASON_ERROR,
    }
)
_CODES = MappingProxyType(
    {
        ErrorCode.DEADLINE_EXCEEDED: engine_pb2.Error.DEADLINE_EXCEEDED,
        ErrorCode.INTERNAL: engine_pb2.Error.INTERNAL,
    }
)

MAX_SAMPLE_INDEX: Final = 1 << 20


def request_of(start: engine_pb2.Start, request_id: str) -> EngineRequest:
    """The engine's request. Raises InvalidRequest for what only the wire can get wrong."""
    length = len(start.token_ids)
    if start.prompt_tokens > length:
        raise InvalidRequest(
            "prompt_tokens", f"prompt_tokens is {start.prompt_tokens}, token_ids has {length}"
        )
    # The engine checks the rest; these two bound what is kept, and sent back, of the request.
    if start.n > MAX_SAMPLES:
        raise InvalidRequest("n", f"n is {start.n}, it must be from 1 to {MAX_SAMPLES}")
    if start.sample_index > MAX_SAMPLE_INDEX:
        raise InvalidRequest(
            "sample_index",
            f"sample_index is {start.sample_index}, it must be from 0 to {MAX_SAMPLE_INDEX}",
        )
    return EngineRequest(
        request_id=request_id,
        token_ids=tuple(start.token_ids),
        prompt_len=start.prompt_tokens or length,
        sampling=sampling_of(start.sampling, start.n or 1),
        priority=start.priority,
        salt=start.salt,
        # 0 is how the wire says none; whatever else is wrong the engine refuses.
        deadline_seconds=start.deadline_seconds if start.deadline_seconds != 0.0 else None,
        first_index=start.sample_index,
        revision=start.revision,
    )


def sampling_of(sampling: engine_pb2.Sampling, n: int) -> SamplingParams:
    """Unset fields keep the defaults of SamplingParams, which are those of the wire;
    the fields of both bear the same names."""
    given: dict[str, Any] = {field.name: value for field, value in sampling.ListFields()}
    if "logit_bias" in given:
        given["logit_bias"] = MappingProxyType(dict(sampling.logit_bias))
    if "stop_token_ids" in given:
        given["stop_token_ids"] = tuple(sampling.stop_token_ids)
    return SamplingParams(n=n, **given)


def add_delta(
    batch: engine_pb2.GenerateBatch, request_id: str, delta: SequenceDelta
) -> engine_pb2.Delta:
    """Appends the delta to the batch, under the stream's own id of the request."""
    message = batch.deltas.add(
        id=request_id,
        index=delta.key.index,
        token_ids=delta.token_ids,
        cached_tokens=delta.cached_tokens,
    )
    if delta.logprobs:
        message.logprobs.extend(_logprobs(delta.logprobs))
    if delta.prompt_logprobs is not None:
        message.prompt_logprobs.extend(_logprobs(delta.prompt_logprobs))
    if delta.revision:
        message.revision = delta.revision
    if delta.finish is not None:
        message.finish_reason = _FINISH[delta.finish]
        if delta.finish is FinishReason.ERROR:
            message.error.code = _CODES.get(
                delta.code or ErrorCode.INTERNAL, engine_pb2.Error.INTERNAL
            )
            message.error.message = delta.error or "the engine failed"
    return message


def add_error(
    batch: engine_pb2.GenerateBatch,
    request_id: str,
    index: int,
    error: engine_pb2.Error,
) -> None:
    """Appends the end of a sequence that has no delta of the engine's."""
    batch.deltas.add(
        id=request_id, index=index, finish_reason=engine_pb2.FINISH_REASON_ERROR, error=error
    )


def load_message(load: EngineLoad, draining: bool) -> engine_pb2.Load:
    return engine_pb2.Load(
        running=load.running,
        waiting=load.waiting,
        blocks_used=load.blocks_used,
        blocks_total=load.blocks_total,
        queued_prefill_tokens=load.queued_prefill_tokens,
        step_seconds=load.step_seconds,
        prefill_tokens_per_second=load.prefill_tokens_per_second,
        draining=draining,
    )


def _logprobs(
    entries: Iterable[TokenLogprobs | None],
) -> Iterable[engine_pb2.TokenLogprobs]:
    for entry in entries:
        if entry is None:
            yield engine_pb2.TokenLogprobs()
        else:
            yield engine_pb2.TokenLogprobs(
                token_ids=entry.token_ids, logprobs=entry.logprobs, rank=entry.rank
            )
