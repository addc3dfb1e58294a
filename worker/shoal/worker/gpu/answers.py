"""What a step's copies to the host mean, once they are there."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from shoal.kernels.gpu.sampling import Status
from shoal.worker.step import PromptLogprobs, Sampled, StepResult, TokenLogprobs

_ERRORS = {
    Status.NOT_FINITE: "the model's logits are not finite",
    Status.NOTHING_LEFT: (
        "no token is left to draw: logit_bias, stop_token_ids and min_tokens forbid all"
    ),
}


@dataclass(frozen=True, slots=True)
class Likeliest:
    """Logprobs of some rows, on their way to the host."""

    owners: Sequence[int]  # rows of the step's draws, or the slot of a prompt's part
    wanted: Sequence[int]  # how many of the likeliest, by row
    chosen: Tensor  # [rows] int64
    logprobs: Tensor  # [rows] float32, of the chosen
    ranks: Tensor  # [rows] int64
    ids: Tensor  # [rows, most] int64
    values: Tensor  # [rows, most] float32
    start: int = 0  # of a prompt's part: the position of its first token

    def entries(self) -> list[TokenLogprobs]:
        rows = zip(
            self.wanted,
            self.chosen.tolist(),
            self.logprobs.tolist(),
            self.ranks.tolist(),
            self.ids.tolist(),
            self.values.tolist(),
            strict=True,
        )
        return [
            TokenLogprobs((token, *ids[:count]), (logprob, *values[:count]), rank)
            for count, token, logprob, rank, ids, values in rows
        ]


@dataclass(frozen=True, slots=True)
class Answer:
    """A step's result, in host memory that the device writes to."""

    slots: Sequence[int] = ()
    ids: Tensor | None = None  # [slots] int64; none where no row draws
    how: Tensor | None = None  # [slots] int32, each a Status
    likeliest: Likeliest | None = None
    prompts: tuple[Likeliest, ...] = ()


def result_of(answer: Answer) -> StepResult:
    """The result of a step whose copies have come."""
    ids = [] if answer.ids is None else answer.ids.tolist()
    how = [] if answer.how is None else answer.how.tolist()
    sampled = [Sampled(slot, token) for slot, token in zip(answer.slots, ids, strict=True)]
    if answer.likeliest is not None:
        entries = answer.likeliest.entries()
        for row, entry in zip(answer.likeliest.owners, entries, strict=True):
            sampled[row] = sampled[row]._replace(logprobs=entry)
    if any(how):
        for row, status in enumerate(how):
            if status != Status.OK:
                sampled[row] = Sampled(answer.slots[row], 0, error=_ERRORS[Status(status)])
    prompts = tuple(
        PromptLogprobs(part.owners[0], part.start, tuple(part.entries())) for part in answer.prompts
    )
    return StepResult(tuple(sampled), prompts)
