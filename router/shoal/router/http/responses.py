"""Answers, for /openapi.json. Handlers write them by hand, which is faster; tests hold the two
together."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Answer):
    """What is wrong, and where."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(_Answer):
    """OpenAI's shape of an error."""

    error: ErrorDetail


class PromptTokensDetails(_Answer):
    """Where prompt tokens came from."""

    cached_tokens: int


class Usage(_Answer):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(_Answer):
    """One token that could have been at a place of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class TopLogprob(_Answer):
    """A token with its logprob."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer, and what else was likely."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Answer):
    """Logprobs of a chat's choice."""

    content: list[TokenLogprob]
    refusal: None


class AssistantMessage(_Answer):
    """The answer's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Answer):
    """One sample."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None
    token_ids: list[int] = []


class Chat(_Answer):
    """Of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] = []
    prompt_logprobs: PromptLogprobs | None = None


class CompletionLogprobs(_Answer):
    """Logprobs of a completion's choice, in parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Answer):
    """One sample of one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []
    prompt_logprobs: PromptLogprobs | None = None


class Completion(_Answer):
    """Of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Tokenized(_Answer):
    """Of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(_Answer):
    """Of POST /detokenize."""

    prompt: str


class Model(_Answer):
    """A model id that requests may name."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(_Answer):
    """Of GET /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Status(_Answer):
    """Of GET /health and /ready."""

    status: str
