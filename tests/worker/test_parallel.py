"""Greedy tokens of a group of ranks are those of one rank, whatever the model and the layout."""

import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bench.parallel import random_checkpoint, soak
from shoal.kernels.native import unavailable as no_programs
from shoal.kernels.shared import unavailable
from shoal.worker.config import EngineConfig
from shoal.worker.engine import Engine
from shoal.worker.model.loader import open_checkpoint
from shoal.worker.parallel.layout import CannotSplit, Place
from shoal.worker.parallel.shard import ShardedSource, part_of, share_of
from shoal.worker.request import EngineRequest, FinishReason, SamplingParams
from shoal.worker.runner import create_executor

# Ranks that are threads have no other way to each other.
pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

LAYOUTS = ((2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (2, 2))
LENGTHS = (3, 17, 30, 8, 41)
Tokens = tuple[int, ...]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Leaves torch's number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def prompts(vocab: int, *lengths: int, seed: int = 0) -> list[Tokens]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(vocab, (n,), generator=generator).tolist()) for n in lengths]


def alone(
    groups: ModuleType, path: Path, config: EngineConfig, asked: list[Tokens], count: int
) -> list[Tokens]:
    """What one rank answers."""
    executor = create_executor(path, config, lambda phase, seconds: None)
    found: list[Tokens] = groups.generate(executor, config, asked, count)
    executor.close()
    return found


@pytest.fixture
def llama(models: ModuleType, tmp_path: Path) -> Path:
    """Six query heads on two key heads, an odd vocabulary, an inner size of five vectors."""
    path: Path = models.save(models.tiny("llama"), tmp_path)
    return path


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_layouts(tensor: int, pipeline: int, llama: Path, groups: ModuleType) -> None:
    """Uneven heads, replicated key heads, padded vocabulary, uneven stages; prompts in chunks
    beside sequences that decode."""
    config = groups.settings(max_batched_tokens=16)
    asked = prompts(199, *LENGTHS)
    wanted = alone(groups, llama, config, asked, 12)
    with groups.group(llama, tensor, pipeline, config) as executor:
        assert groups.generate(executor, config, asked, 12) == wanted
        # The same again from cached prefixes.
        assert groups.generate(executor, config, asked, 12) == wanted


def test_every_family(
    families: ModuleType, models: ModuleType, groups: ModuleType, tmp_path: Path
) -> None:
    """Two lanes in two stages, and four lanes, of which two share each key head."""
    for case in families.CASES:
        path = models.save(families.tiny(case), tmp_path / case)
        config = groups.settings(max_batched_tokens=24, kv_cache_blocks=80)
        asked = [tuple(tokens) for tokens in families.prompts(5, 30, 9)]
        wanted = alone(groups, path, config, asked, 8)
        for tensor, pipeline in ((2, 2), (4, 1)):
            with groups.group(path, tensor, pipeline, config) as executor:
                assert groups.generate(executor, config, asked, 8) == wanted, (case, tensor)


@pytest.mark.slow
def test_the_real_model(models: ModuleType, groups: ModuleType) -> None:
    """SmolLM2 with its nine heads on three key heads, in every layout; prompts in chunks."""
    path = models.smollm2_path()
    config = groups.settings(
        block_size=16, max_model_len=512, max_batched_tokens=64, kv_cache_blocks=100
    )
    asked = prompts(49152, 5, 90, 40)
    wanted = alone(groups, path, config, asked, 8)
    for tensor, pipeline in LAYOUTS:
        with groups.group(path, tensor, pipeline, config) as executor:
            assert groups.generate(executor, config, asked, 8) == wanted, (tensor, pipeline)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (3, 2)])
@pytest.mark.parametrize("family", ["tied", "biased", "one-kv-head", "mistral-window"])
def test_variants_of_llama(
    family: str, tensor: int, pipeline: int, models: ModuleType, groups: ModuleType, tmp_path: Path
) -> None:
    """Tied embeddings, biases that are added once, one key head for all lanes, windows."""
    path = models.save(models.tiny(family), tmp_path)
    config = groups.settings()
    asked = prompts(199, 40, 9)
    wanted = alone(groups, path, config, asked, 8)
    with groups.group(path, tensor, pipeline, config) as executor:
        assert groups.generate(executor, config, asked, 8) == wanted


def test_gguf(models: ModuleType, groups: ModuleType, tmp_path: Path) -> None:
    """Rows and blocks of a GGUF file."""
    path = models.save_gguf(models.tiny("llama"), tmp_path / "model.gguf")
    config = groups.settings()
    asked = prompts(199, 20, 7)
    wanted = alone(groups, path, config, asked, 8)
    with groups.group(path, 2, 2, config) as executor:
        assert groups.generate(executor, config, asked, 8) == wanted


def test_preemption_and_cancels_in_mid_flight(llama: Path, groups: ModuleType) -> None:
    """More sequences than blocks, three plans under way, some cancelled between steps: the others
    get what they get alone, and all blocks come back."""
    config = groups.settings(kv_cache_blocks=30, max_batched_tokens=16)
    asked = prompts(199, 20, 25, 9, 30, 14, 22, 17, 28, seed=4)
    wanted = alone(groups, llama, groups.settings(), asked, 24)
    sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    rng = random.Random(3)
    with groups.group(llama, 2, 2, config) as executor:
        assert executor.depth == 3
        engine = Engine(executor, config)
        found: dict[str, Tokens] = {}
        ends = {}
        for number, prompt in enumerate(asked):
            engine.add(EngineRequest(str(number), prompt, len(prompt), sampling))
        cancelled = {"1", "4"}
        while engine.has_work:
            for delta in engine.step().deltas:
                name = delta.key.request_id
                found[name] = found.get(name, ()) + delta.token_ids
                ends[name] = delta.finish
            for name in cancelled:
                if len(found.get(name, ())) > 5 + rng.randrange(5):
                    engine.cancel(name)
        assert engine.stats().preemptions > 0
        assert engine.load().blocks_used == 0
        engine._scheduler.check_integrity()
    for number, tokens in enumerate(wanted):
        name = str(number)
        if name in cancelled:
            assert ends[name] is FinishReason.CANCELLED
            assert found[name] == tokens[: len(found[name])]
        else:
            assert found[name] == tokens


def test_a_short_soak(groups: ModuleType, tmp_path: Path) -> None:
    """Random requests and cancels under shortage of blocks: none is lost, no block is held, and
    the block tables of all ranks are the same in the end."""
    config = groups.settings(max_num_seqs=16, max_batched_tokens=64, kv_cache_blocks=70)
    with groups.group(random_checkpoint(tmp_path), 2, 2, config) as executor:
        soak(executor, config, [], 150, seed=1)


def test_draws_and_logprobs(llama: Path, groups: ModuleType) -> None:
    """Seeded draws with penalties, logprobs of prompt and answer: the same numbers, though the
    logits come from several ranks."""
    config = groups.settings(max_batched_tokens=16)
    sampling = SamplingParams(
        temperature=0.8,
        top_p=0.9,
        seed=5,
        repetition_penalty=1.2,
        logprobs=3,
        prompt_logprobs=2,
        max_tokens=10,
        ignore_eos=True,
    )
    prompt = prompts(199, 37)[0]

    def answers(engine: Engine) -> tuple[Tokens, list[float]]:
        engine.add(EngineRequest("a", prompt, len(prompt), sampling))
        tokens: Tokens = ()
        values: list[float] = []
        while engine.has_work:
            for delta in engine.step().deltas:
                tokens += delta.token_ids
                entries = [*(delta.prompt_logprobs or ()), *delta.logprobs]
                values += [value for entry in entries if entry for value in entry.logprobs]
        return tokens, values

    executor = create_executor(llama, config, lambda phase, seconds: None)
    tokens, values = answers(Engine(executor, config))
    with groups.group(llama, 3, 2, config) as group:
        found, numbers = answers(Engine(group, config))
    assert found == tokens
    assert numbers == pytest.approx(values, abs=1e-4)
    assert len(values) == 36 * 3 + 10 * 4


@pytest.mark.skipif(no_programs() is not None, reason=str(no_programs()))
@pytest.mark.parametrize("quantization", ["auto", "int8"])
def test_step_programs_process_the_parts_of_ranks(
    quantization: str, models: ModuleType, groups: ModuleType, tmp_path: Path
) -> None:
    """In bfloat16: stages give the very tokens of one rank, since they compute the same sums;
    lanes add in another order, and agree in the logprobs."""
    path = models.save(models.tiny("groups-of-64"), tmp_path)
    config = groups.settings(dtype="bfloat16", block_size=16, quantization=quantization)
    asked = prompts(199, 37, 9)
    reference = create_executor(path, config, lambda phase, seconds: None)
    wanted = groups.generate(reference, config, asked, 12)
    values = prompt_logprobs(Engine(reference, config), asked[0])
    reference.close()
    with groups.group(path, 1, 3, config) as executor:
        assert groups.generate(executor, config, asked, 12) == wanted
    for tensor, pipeline in ((2, 1), (2, 2)):
        with groups.group(path, tensor, pipeline, config) as executor:
            found = prompt_logprobs(Engine(executor, config), asked[0])
            assert found == pytest.approx(values, abs=0.1)


def prompt_logprobs(engine: Engine, prompt: Tokens) -> list[float]:
    """Of each token of the prompt."""
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    engine.add(EngineRequest("logprobs", prompt, len(prompt), sampling))
    values = []
    while engine.has_work:
        for delta in engine.step().deltas:
            values += [entry.logprobs[0] for entry in delta.prompt_logprobs or () if entry]
    assert len(values) == len(prompt) - 1
    return values


def test_what_cannot_be_served_is_refused_with_its_own_words(
    llama: Path, groups: ModuleType
) -> None:
    """A rank says why, the driver raises it, and the other ranks end in peace."""
    for tensor, pipeline, changes, words in (
        (7, 1, {}, "tensor is 7, but the model has 6 attention heads"),
        (1, 4, {}, "pipeline is 4, but the model has 3 layers"),
        (2, 1, {"max_model_len": 4096}, "max_model_len is 4096, the model's limit is 512"),
        (2, 1, {"quantization": "int8"}, "the inner size of an MLP of 80 cannot"),
    ):
        with (
            pytest.raises(ValueError, match=words),
            groups.group(llama, tensor, pipeline, groups.settings(**changes)),
        ):
            pass


def test_int8_groups(models: ModuleType, groups: ModuleType, tmp_path: Path) -> None:
    """Quantized matrices are cut between groups, so that every rank has the codes of the whole;
    what cannot be cut so is refused by name."""
    path = models.save(models.tiny("groups-of-64"), tmp_path)
    config = groups.settings(quantization="int8")
    asked = prompts(199, 20, 7)
    wanted = alone(groups, path, config, asked, 8)
    with groups.group(path, 2, 1, config) as executor:
        assert groups.generate(executor, config, asked, 8) == wanted
    with pytest.raises(CannotSplit, match="tensor is 4, but the inner size of an MLP of 192"):
        part_of(
            open_checkpoint(path).spec,
            share_of(open_checkpoint(path).spec, Place.of(0, 4, 1), (64,)),
        )


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (3, 1), (1, 3), (2, 2)])
def test_each_rank_reads_its_own_slices(
    kind: str, tensor: int, pipeline: int, models: ModuleType, tmp_path: Path
) -> None:
    """Bytes of the file, counted: all ranks together read every divided tensor once, and what all
    of them need once each."""
    model = models.tiny("llama")
    path = (
        models.save(model, tmp_path / "m")
        if kind == "safetensors"
        else models.save_gguf(model, tmp_path / "m.gguf")
    )
    whole = open_checkpoint(path)
    every = {name: whole.source.read(name) for name in whole.source.shapes}
    total = whole.source.bytes_read
    norms = sum(value.nbytes for name, value in every.items() if "norm" in name)
    read, keys = 0, 0
    for rank in range(tensor * pipeline):
        checkpoint = open_checkpoint(path, whole=False)
        own = share_of(checkpoint.spec, Place.of(rank, tensor, pipeline))
        source = ShardedSource(checkpoint.source, checkpoint.spec, own)
        before = source.bytes_read
        layers = [name for name in source.shapes if ".layers." in name]
        for name in layers:
            assert tuple(source.read(name).shape) == source.shapes[name]
        if own.place.first:
            source.read("model.embed_tokens.weight")
        if own.place.last:
            source.read("lm_head.weight")
            source.read("model.norm.weight")
        read += source.bytes_read - before
        if tensor > 2:  # of two key heads one is in two lanes
            keys = every["model.layers.0.self_attn.k_proj.weight"].nbytes
    replicated_keys = keys * whole.spec.num_layers
    final = every["model.norm.weight"].nbytes
    assert read == total + (tensor - 1) * (norms) + replicated_keys, (read, total, final)
