"""The engine workloads W1 to W4: token ids in, greedy, end-of-sequence ignored.

| name | work | figure |
|---|---|---|
| W1 | one prompt of 128 tokens, 128 new | decode tokens per second, 127 / (last - first token) |
| W2 | 64 prompts of 32 to 256 tokens, 32 to 128 new each, all at t=0, at most 32 in flight | output tokens per second |
| W3 | 32 prompts, a shared prefix of 512 tokens and 32 of their own, 32 new each, all at t=0, cache empty | wall seconds |
| W4 | one prompt of 1,024 tokens, 1 new | prefill tokens per second |
"""  # noqa: E501

import random
from dataclasses import dataclass
from typing import NamedTuple

VOCABULARY = range(1000, 40000)  # plain tokens of every vocabulary that is compared here


class Prompt(NamedTuple):
    token_ids: list[int]
    new_tokens: int


@dataclass(frozen=True)
class Workload:
    name: str
    prompts: tuple[Prompt, ...]
    in_flight: int
    figure: str  # decode | output | wall | prefill

    @property
    def unit(self) -> str:
        return "s" if self.figure == "wall" else "tok/s"

    @property
    def higher_is_better(self) -> bool:
        return self.figure != "wall"


@dataclass(frozen=True)
class Timing:
    """What a peer measured in one run; seconds from the moment all prompts were handed in."""

    first: float  # first token of the first prompt
    last: float  # last token of all
    prompt_tokens: int
    new_tokens: int


def workloads(seed: int) -> dict[str, Workload]:
    """Fresh prompts for one round: another seed shares no prefix with this one's."""
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.choice(VOCABULARY) for _ in range(count)]

    prefix = tokens(512)
    return {
        "W1": Workload("W1", (Prompt(tokens(128), 128),), 1, "decode"),
        "W2": Workload(
            "W2",
            tuple(Prompt(tokens(rng.randint(32, 256)), rng.randint(32, 128)) for _ in range(64)),
            32,
            "output",
        ),
        "W3": Workload("W3", tuple(Prompt(prefix + tokens(32), 32) for _ in range(32)), 32, "wall"),
        "W4": Workload("W4", (Prompt(tokens(1024), 1),), 1, "prefill"),
    }


def figure(workload: Workload, timing: Timing) -> float:
    """The workload's one number."""
    match workload.figure:
        case "decode":
            return (timing.new_tokens - 1) / (timing.last - timing.first)
        case "output":
            return timing.new_tokens / timing.last
        case "wall":
            return timing.last
        case _:
            return timing.prompt_tokens / timing.first
