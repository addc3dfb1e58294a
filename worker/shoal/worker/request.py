"""What a client asks of the engine, and where a sequence stands.

Pure data: no tensors, no wire, no clock. A request of `n` samples becomes `n` sequences that
share the prompt's blocks; the scheduler knows sequences only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple

GREEDY_EPSILON = 1e-5  # temperatures below this are greedy


class SequenceKey(NamedTuple):
    """Names one sequence: the request's id and the sample's index within it."""

    request_id: str
    index: int  # type: ignore[assignment]  # hides tuple.index, which nothing calls


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class ErrorCode(Enum):
    """What a sequence that ended with `FinishReason.ERROR` died of."""

    DEADLINE_EXCEEDED = "deadline_exceeded"
    INTERNAL = "internal"  # this request failed here; another try may succeed


class InvalidRequest(ValueError):
    """The request is wrong: `field` names the culprit, the message says value and limit."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. Validated by `validate`, which the engine calls on admission."""

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    max_tokens: int | None = None  # None: until max_model_len
    ignore_eos: bool = False
    logprobs: int | None = None  # 0: of the sampled token only; k: and of the k likeliest
    prompt_logprobs: int | None = None
    n: int = 1

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_EPSILON


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request as the wire or `LLM` hands it in. `token_ids` may go beyond the prompt: a
    migrated request brings the tokens that another replica generated. `min_tokens` and
    `max_tokens` are what is left of them then: they count from the end of `token_ids`."""

    request_id: str
    token_ids: tuple[int, ...]
    prompt_len: int
    sampling: SamplingParams
    priority: int = 0  # smaller is sooner
    salt: str = ""
    deadline_seconds: float | None = None
    first_index: int = 0
    revision: str = ""  # whose weights compute it; "": those active when it comes
