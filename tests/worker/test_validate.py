"""Requests that are wrong are refused with field, value and limit; right ones pass."""

import argparse
import math
from dataclasses import replace

import pytest

from shoal.worker.config import EngineConfig, ParallelConfig
from shoal.worker.flags import (
    add_engine_flags,
    add_parallel_flags,
    engine_config,
    parallel_config,
)
from shoal.worker.request import EngineRequest, InvalidRequest, SamplingParams
from shoal.worker.validate import check_config, validate_request, validate_sampling

VOCAB = 100


def request(**fields: object) -> EngineRequest:
    base = EngineRequest("id", (1, 2, 3), 3, SamplingParams())
    return replace(base, **fields)


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("temperature", -0.1, "[0, 100]"),
        ("temperature", math.nan, "[0, 100]"),
        ("temperature", math.inf, "[0, 100]"),
        ("temperature", "hot", "[0, 100]"),
        ("temperature", True, "[0, 100]"),
        ("top_p", 0.0, "(0, 1]"),
        ("top_p", 1.5, "(0, 1]"),
        ("top_p", math.nan, "(0, 1]"),
        ("top_k", -1, "from 0 to"),
        ("top_k", 1.5, "from 0 to"),
        ("min_p", -0.5, "[0, 1]"),
        ("min_p", 1.01, "[0, 1]"),
        ("typical_p", 0, "(0, 1]"),
        ("presence_penalty", 2.1, "[-2, 2]"),
        ("frequency_penalty", -2.1, "[-2, 2]"),
        ("repetition_penalty", 0.0, "(0, 100]"),
        ("repetition_penalty", -1.0, "(0, 100]"),
        ("seed", 1 << 64, "from -9223372036854775808 to 18446744073709551615"),
        ("seed", 1.0, "an integer"),
        ("min_tokens", -1, "from 0 to"),
        ("max_tokens", 0, "from 1 to"),
        ("logprobs", 21, "from 0 to 20"),
        ("logprobs", -1, "from 0 to 20"),
        ("prompt_logprobs", 21, "from 0 to 20"),
        ("ignore_eos", 1, "true or false"),
    ],
)
def test_a_parameter_out_of_range_is_named(name: str, value: object, limit: str) -> None:
    """The message holds the field, the range and the value."""
    with pytest.raises(InvalidRequest) as refused:
        validate_sampling(replace(SamplingParams(), **{name: value}), vocab_size=VOCAB)
    assert refused.value.field == f"sampling.{name}"
    message = str(refused.value)
    assert message.startswith(f"{name} must be") and limit in message and repr(value) in message


@pytest.mark.parametrize("n", [0, 129, -1, 2.0])
def test_the_number_of_samples_is_bounded(n: object) -> None:
    """`n` is a field of its own on the wire."""
    with pytest.raises(InvalidRequest, match="n must be an integer from 1 to 128") as refused:
        validate_sampling(replace(SamplingParams(), n=n), vocab_size=VOCAB)
    assert refused.value.field == "n"


@pytest.mark.parametrize(
    ("field", "sampling"),
    [
        ("sampling.logit_bias[0]", SamplingParams(logit_bias={VOCAB: 1.0})),
        ("sampling.logit_bias[5]", SamplingParams(logit_bias={5: 100.5})),
        ("sampling.logit_bias[5]", SamplingParams(logit_bias={5: math.nan})),
        ("sampling.stop_token_ids[1]", SamplingParams(stop_token_ids=(1, -1))),
        ("sampling.min_tokens", SamplingParams(min_tokens=5, max_tokens=4)),
    ],
)
def test_collections_name_the_culprit(field: str, sampling: SamplingParams) -> None:
    """Out of many entries the wrong one is said."""
    with pytest.raises(InvalidRequest) as refused:
        validate_sampling(sampling, vocab_size=VOCAB)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("id", {"request_id": ""}),
        ("token_ids", {"token_ids": (), "prompt_len": 0}),
        ("token_ids", {"token_ids": (1,) * 50}),
        ("token_ids[1]", {"token_ids": (1, VOCAB, 3)}),
        ("token_ids[0]", {"token_ids": (-1, 1, 3)}),
        ("token_ids[2]", {"token_ids": (1, 1, 3.0)}),
        ("prompt_tokens", {"prompt_len": 4}),
        ("prompt_tokens", {"prompt_len": 0}),
        ("priority", {"priority": 1 << 31}),
        ("sample_index", {"first_index": -1}),
        ("deadline_seconds", {"deadline_seconds": 0.0}),
        ("deadline_seconds", {"deadline_seconds": math.nan}),
        ("deadline_seconds", {"deadline_seconds": math.inf}),
    ],
)
def test_a_wrong_request_is_refused(field: str, fields: dict[str, object]) -> None:
    """Fields go by their name on the wire."""
    with pytest.raises(InvalidRequest) as refused:
        validate_request(request(**fields), vocab_size=VOCAB, max_model_len=50)
    assert refused.value.field == field


def test_every_limit_is_inside() -> None:
    """The ends of the ranges are accepted."""
    for sampling in (
        SamplingParams(),
        SamplingParams(
            temperature=0,
            top_p=1,
            top_k=0,
            min_p=1,
            typical_p=1e-6,
            presence_penalty=-2,
            frequency_penalty=2.0,
            repetition_penalty=1e-3,
            logit_bias={0: -100, VOCAB - 1: 100},
            seed=-(1 << 63),
            stop_token_ids=(0, VOCAB - 1),
            min_tokens=3,
            max_tokens=3,
            logprobs=20,
            prompt_logprobs=0,
            n=128,
        ),
        SamplingParams(temperature=100.0, seed=(1 << 64) - 1, logprobs=0),
    ):
        validate_request(
            request(token_ids=(0,) * 49, prompt_len=49, sampling=sampling, deadline_seconds=1e-3),
            vocab_size=VOCAB,
            max_model_len=50,
        )


def test_a_long_value_is_shown_in_short() -> None:
    """A megabyte of garbage does not come back in the error."""
    with pytest.raises(InvalidRequest) as refused:
        validate_sampling(replace(SamplingParams(), top_p="x" * 10**6), vocab_size=VOCAB)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("setting", "low"),
    [
        ("max_num_seqs", 1),
        ("max_batched_tokens", 1),
        ("max_prefill_tokens", 1),
        ("max_model_len", 2),
    ],
)
def test_settings_that_serve_nobody_are_refused(setting: str, low: int) -> None:
    """The error names the setting, its limit and its value; the limit itself passes."""
    with pytest.raises(ValueError, match=f"{setting} must be at least {low}, got {low - 1}"):
        check_config(replace(EngineConfig(), **{setting: low - 1}))
    check_config(replace(EngineConfig(), **{setting: low}))


def test_a_flag_below_its_least_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Before a model is loaded that nobody could ask anything: the flag, its limit, its value."""
    parser = argparse.ArgumentParser()
    add_engine_flags(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--max-model-len", "1"])
    assert "--max-model-len: must be at least 2, got 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser.parse_args(["--max-num-seqs", "many"])
    assert "--max-num-seqs: invalid integer value: 'many'" in capsys.readouterr().err
    assert engine_config(parser.parse_args(["--max-model-len", "2"])).max_model_len == 2


def test_flags_of_parallelism() -> None:
    """What is not said is one rank in the engine's process; an address without Ray is refused."""
    parser = argparse.ArgumentParser()
    add_parallel_flags(parser)
    assert parallel_config(parser.parse_args([])) == ParallelConfig()
    assert ParallelConfig().in_process
    several = parallel_config(parser.parse_args(["--tensor", "2", "--pipeline", "3"]))
    assert (several.ranks, several.in_process) == (6, False)
    assert not parallel_config(parser.parse_args(["--executor", "ray"])).in_process
    with pytest.raises(ValueError, match="--ray-address needs --executor ray, not auto"):
        parallel_config(parser.parse_args(["--ray-address", "10.0.0.1:6379"]))
