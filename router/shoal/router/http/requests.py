"""Request bodies, of OpenAI's API and of vLLM's extras."""

from typing import Annotated

from pydantic import ConfigDict, Field

from shoal.router.http.fields import (
    AtLeastOne,
    Body,
    Count,
    LogitBias,
    Logprobs,
    Messages,
    MinP,
    Model,
    Name,
    NotYet,
    Penalty,
    Priority,
    Prompt,
    RepetitionPenalty,
    Salt,
    Samples,
    Seed,
    Share,
    Stop,
    StopIds,
    StreamOptions,
    Temperature,
    TokenIds,
    TopK,
)


class GenerateBody(Body):
    """What chat and completions share. null means the default."""

    model: Model
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Samples | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    typical_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: LogitBias | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    stop_token_ids: StopIds | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: Logprobs | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    priority: Priority | None = None
    user: Name | None = None
    prompt_cache_key: Annotated[
        Name | None, Field(description="Requests with one key prefer one replica.")
    ] = None
    cache_salt: Annotated[
        Salt | None,
        Field(
            description="Keeps cached prefixes apart: only requests with the same salt share "
            "them, so nobody learns from response times what others have sent."
        ),
    ] = None
    safety_identifier: Annotated[
        Name | None, Field(description="Stands in for `user` where that is missing.")
    ] = None
    metadata: Annotated[object, NotYet({})] = None
    store: Annotated[object, NotYet(False)] = None
    service_tier: Annotated[object, NotYet("auto", "default")] = None


class ChatBody(GenerateBody):
    """POST /v1/chat/completions."""

    messages: Messages
    max_tokens: AtLeastOne | None = None
    max_completion_tokens: AtLeastOne | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    add_generation_prompt: bool | None = None
    parallel_tool_calls: bool | None = None
    tools: Annotated[object, NotYet([])] = None
    tool_choice: Annotated[object, NotYet("none")] = None
    functions: Annotated[object, NotYet([])] = None
    function_call: Annotated[object, NotYet("none")] = None
    response_format: Annotated[object, NotYet({"type": "text"})] = None
    modalities: Annotated[object, NotYet(["text"])] = None
    audio: Annotated[object, NotYet()] = None
    prediction: Annotated[object, NotYet()] = None
    reasoning_effort: Annotated[object, NotYet("none")] = None
    verbosity: Annotated[object, NotYet()] = None
    web_search_options: Annotated[object, NotYet()] = None


class CompletionBody(GenerateBody):
    """POST /v1/completions."""

    prompt: Prompt
    max_tokens: Count | None = None
    logprobs: Logprobs | None = None
    echo: bool | None = None
    best_of: Samples | None = None
    suffix: Annotated[object, NotYet("")] = None


class TokenizeBody(Body):
    """POST /tokenize: either `prompt` or `messages`."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]}
    )

    model: Model
    prompt: str = ""
    messages: Annotated[Messages, Field(default_factory=list)]
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: Model
    tokens: TokenIds
