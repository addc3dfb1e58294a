"""What a request may ask for. Errors name field, value and limit; fields go by their name on
the wire (`sampling.top_p`)."""

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from shoal.worker.config import EngineConfig
from shoal.worker.request import EngineRequest, InvalidRequest, SamplingParams

MAX_TEMPERATURE = 100.0
MAX_PENALTY = 2.0
MAX_REPETITION_PENALTY = 100.0
MAX_LOGIT_BIAS = 100.0
MAX_LOGPROBS = 20
MAX_SAMPLES = 128
# Of engine settings, below which no request could be served.
LEAST: Final[Mapping[str, int]] = MappingProxyType(
    {
        "max_num_seqs": 1,
        "max_batched_tokens": 1,
        "max_prefill_tokens": 1,
        "max_model_len": 2,  # a prompt token and a generated one
    }
)
_MIN_SEED, _MAX_SEED = -(1 << 63), (1 << 64) - 1  # either way of reading 64 bits
_MAX_INT32 = (1 << 31) - 1


def check_config(config: EngineConfig) -> None:
    """Raises ValueError for engine settings that no request could be served with."""
    for name, low in LEAST.items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")


def validate_request(request: EngineRequest, *, vocab_size: int, max_model_len: int) -> None:
    """Raises InvalidRequest for the first field that is wrong."""
    if not isinstance(request.request_id, str) or not request.request_id:
        raise InvalidRequest("id", f"id must be a string and not empty, got {request.request_id!r}")
    _tokens("token_ids", request.token_ids, vocab_size)
    length = len(request.token_ids)
    if length == 0:
        raise InvalidRequest("token_ids", "the prompt is empty: at least 1 token is needed")
    if length >= max_model_len:
        raise InvalidRequest(
            "token_ids",
            f"the prompt has {length} tokens, but at most {max_model_len - 1} fit: prompt and "
            f"generated tokens together are limited to {max_model_len} (max_model_len)",
        )
    _integer("prompt_tokens", request.prompt_len, 1, length)
    _integer("priority", request.priority, -_MAX_INT32 - 1, _MAX_INT32)
    _integer("sample_index", request.first_index, 0, _MAX_INT32)
    if request.deadline_seconds is not None:
        _number("deadline_seconds", request.deadline_seconds, 0.0, math.inf, low_open=True)
    validate_sampling(request.sampling, vocab_size=vocab_size)


def validate_sampling(sampling: SamplingParams, *, vocab_size: int) -> None:
    """Raises InvalidRequest for the first parameter that is out of its range."""
    s = sampling
    _number("sampling.temperature", s.temperature, 0.0, MAX_TEMPERATURE)
    _number("sampling.top_p", s.top_p, 0.0, 1.0, low_open=True)
    _integer("sampling.top_k", s.top_k, 0, _MAX_INT32)
    _number("sampling.min_p", s.min_p, 0.0, 1.0)
    _number("sampling.typical_p", s.typical_p, 0.0, 1.0, low_open=True)
    _number("sampling.presence_penalty", s.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    _number("sampling.frequency_penalty", s.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    _number(
        "sampling.repetition_penalty",
        s.repetition_penalty,
        0.0,
        MAX_REPETITION_PENALTY,
        low_open=True,
    )
    _tokens("sampling.logit_bias", s.logit_bias, vocab_size)
    for token_id, bias in s.logit_bias.items():
        _number(f"sampling.logit_bias[{token_id}]", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
    if s.seed is not None:
        _integer("sampling.seed", s.seed, _MIN_SEED, _MAX_SEED)
    _tokens("sampling.stop_token_ids", s.stop_token_ids, vocab_size)
    _integer("sampling.min_tokens", s.min_tokens, 0, _MAX_INT32)
    if s.max_tokens is not None:
        _integer("sampling.max_tokens", s.max_tokens, 1, _MAX_INT32)
        if s.min_tokens > s.max_tokens:
            raise InvalidRequest(
                "sampling.min_tokens",
                f"min_tokens must not exceed max_tokens ({s.max_tokens}), got {s.min_tokens}",
            )
    if s.logprobs is not None:
        _integer("sampling.logprobs", s.logprobs, 0, MAX_LOGPROBS)
    if s.prompt_logprobs is not None:
        _integer("sampling.prompt_logprobs", s.prompt_logprobs, 0, MAX_LOGPROBS)
    if not isinstance(s.ignore_eos, bool):
        raise InvalidRequest(
            "sampling.ignore_eos", f"ignore_eos must be true or false, got {s.ignore_eos!r}"
        )
    _integer("n", s.n, 1, MAX_SAMPLES)


def _number(field: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    # Comparisons with NaN are false, and an infinity never passes the open end.
    above = numeric and (low < value if low_open else low <= value)
    if not (above and value <= high and math.isfinite(value)):
        bracket = "(" if low_open else "["
        close = ")" if math.isinf(high) else "]"
        _refuse(field, f"a number in {bracket}{low:g}, {high:g}{close}", value)


def _integer(field: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        _refuse(field, f"an integer from {low} to {high}", value)


def _tokens(field: str, ids: Iterable[int], vocab_size: int) -> None:
    ids = tuple(ids)
    # Types and range of the whole at C speed; one by one only to name the culprit.
    if not ids or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size):
        return
    for place, token_id in enumerate(ids):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            _refuse(f"{field}[{place}]", f"a token id from 0 to {vocab_size - 1}", token_id)


def _refuse(field: str, expected: str, value: object) -> None:
    shown = repr(value)
    if len(shown) > 80:
        shown = f"{shown[:77]}..."
    raise InvalidRequest(field, f"{field.rpartition('.')[2]} must be {expected}, got {shown}")
