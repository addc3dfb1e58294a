"""Sampling parameters for the wire: what the request says, else what the model's makers say."""

from typing import Any

from shoal.api.v1 import engine_pb2
from shoal.router.http.errors import ApiError
from shoal.router.http.requests import GenerateBody
from shoal.router.text import TextModel

# Fields that body and wire name alike.
_PLAIN = frozenset(
    (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "typical_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "min_tokens",
        "ignore_eos",
        "prompt_logprobs",
    )
)


def build_sampling(
    body: GenerateBody, text: TextModel, *, max_tokens: int, logprobs: int | None
) -> engine_pb2.Sampling:
    """`max_tokens`: already within the model's length. Raises ApiError for ids that the model
    does not have and for limits that contradict each other."""
    values: dict[str, Any] = {**text.default_sampling, "max_tokens": max_tokens}
    for name in body.model_fields_set.intersection(_PLAIN):
        if (value := getattr(body, name)) is not None:
            values[name] = value
    if values.get("top_k", 0) < 0:
        values["top_k"] = 0
    if logprobs is not None:
        values["logprobs"] = logprobs
    sampling = engine_pb2.Sampling(**values)
    if body.min_tokens is not None and body.min_tokens > max_tokens:
        raise ApiError(
            400,
            f"min_tokens is {body.min_tokens}, but must be at most max_tokens ({max_tokens})",
            param="min_tokens",
            code="invalid_value",
        )
    if body.seed is not None:
        sampling.seed = body.seed % 2**64
    if body.stop_token_ids:
        check_ids(body.stop_token_ids, text.model.vocab_size, "stop_token_ids")
        sampling.stop_token_ids.extend(body.stop_token_ids)
    if body.logit_bias:
        bias = {int(key): value for key, value in body.logit_bias.items()}
        check_ids(list(bias), text.model.vocab_size, "logit_bias")
        sampling.logit_bias.update(bias)
    return sampling


def check_ids(token_ids: list[int], vocab_size: int, param: str) -> None:
    """Raises ApiError where an id is beyond the vocabulary."""
    if max(token_ids) >= vocab_size:
        raise ApiError(
            400,
            f"{param} has token id {max(token_ids)}, but must be below the vocabulary size "
            f"{vocab_size}",
            param=param,
            code="invalid_value",
        )
