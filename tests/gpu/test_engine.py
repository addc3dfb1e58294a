"""The engine over the device's decoder, graphs and sampler: in Triton's interpreter a few tiny
families, on a GPU every family, bfloat16 and the real SmolLM2.

The interpreter's device runs a recorded graph as the function that was recorded, and counts what
the host waits for.
"""

import importlib.util
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.kernels.gpu.linear4 import Linear4
from shoal.worker.config import EngineConfig
from shoal.worker.engine import Engine, SequenceDelta
from shoal.worker.gpu.choose import device_precision
from shoal.worker.gpu.create import executor_of, linear_maker
from shoal.worker.gpu.device import CudaDevice, Device, HostDevice
from shoal.worker.gpu.executor import GpuExecutor
from shoal.worker.in_process import create_in_process
from shoal.worker.model.loader import open_checkpoint
from shoal.worker.request import EngineRequest, FinishReason, SamplingParams
from shoal.worker.runner import create_executor
from shoal.worker.sources import SourceError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FOLDER = Path(__file__).resolve().parents[1] / "worker"
FEW = ("llama", "qwen3", "gemma2", "mixtral")
SETTINGS: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_batched_tokens": 24,
    "max_model_len": 96,
    "block_size": 16,
    "kv_cache_blocks": 20,
}
# What would make the host wait for a CUDA device, of the operations that torch has.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"}


def worker_tests(name: str) -> ModuleType:
    """A module of the worker's tests; test folders are no packages."""
    full_name = f"shoal_tests_worker_{name}"
    if full_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(full_name, FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full_name] = module
        spec.loader.exec_module(module)
    return sys.modules[full_name]


families = worker_tests("test_families")
CASES = FEW if INTERPRETED else tuple(families.CASES)


@cache
def small() -> Any:
    """A Llama of one layer, where what is tested is not the model."""
    torch.manual_seed(11)
    config = transformers.LlamaConfig(**{**families.BASE, "num_hidden_layers": 1})
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.25)
    return model


@cache
def home() -> Device:
    return HostDevice(1 << 30) if INTERPRETED else CudaDevice()


def config(**changes: Any) -> EngineConfig:
    return EngineConfig(**{**SETTINGS, **changes})


def executor(path: Path, device: Device, dtype: str = "float32", **changes: Any) -> GpuExecutor:
    settings = config(**changes)
    kind = "interpreter" if INTERPRETED else "cuda"
    assert settings.max_model_len is not None
    return executor_of(
        open_checkpoint(path),
        settings,
        device_precision(dtype, kind),
        device,
        settings.max_model_len,
        lambda phase, seconds: None,
        time.perf_counter,
    )


def request(name: str, prompt: list[int], max_tokens: int, **sampling: Any) -> EngineRequest:
    sampling = {"temperature": 0.0, "ignore_eos": True, **sampling}
    return EngineRequest(
        name, tuple(prompt), len(prompt), SamplingParams(max_tokens=max_tokens, **sampling)
    )


def run(engine: Engine, requests: list[EngineRequest]) -> dict[str, list[SequenceDelta]]:
    """All deltas of each request."""
    found: dict[str, list[SequenceDelta]] = {each.request_id: [] for each in requests}
    for each in requests:
        engine.add(each)
    while engine.has_work:
        for delta in engine.step().deltas:
            assert delta.error is None, delta.error
            found[delta.key.request_id].append(delta)
    return found


def tokens_of(deltas: list[SequenceDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_equal_transformers(case: str, tmp_path: Path) -> None:
    """Prompts in chunks, beside one another and beside decodes; each token is the argmax of
    transformers' logits on the same text."""
    model = families.tiny(case)
    model.save_pretrained(tmp_path)
    ours = executor(tmp_path, home())
    prompts = families.prompts(2, 18, 9) if INTERPRETED else families.prompts(2, 50, 17)
    count = 3 if INTERPRETED else 40
    requests = [request(f"{n}", prompt, count) for n, prompt in enumerate(prompts)]
    found = run(Engine(ours, config()), requests)
    for number, prompt in enumerate(prompts):
        tokens = tokens_of(found[f"{number}"])
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0]
        assert len(tokens) == count
        assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == tokens
    ours.close()


def test_draws_and_logprobs_equal_the_cpus(tmp_path: Path) -> None:
    """Seeded draws under every parameter, lists of ids, min_tokens and logprobs, a prompt's among
    them: the tokens of the CPU's executor, and its logprobs."""
    small().save_pretrained(tmp_path)
    prompts = families.prompts(5, 20, 9, 12, 7)
    drawn = {"temperature": 0.9, "logprobs": 2}
    count = 5 if INTERPRETED else 24
    requests = [
        request("filtered", prompts[0], count, seed=1, top_k=20, top_p=0.9, min_p=0.01, **drawn),
        request(
            "penalised",
            prompts[1],
            count,
            seed=2,
            repetition_penalty=1.3,
            frequency_penalty=0.4,
            presence_penalty=0.2,
            typical_p=0.95,
            prompt_logprobs=3,
            **drawn,
        ),
        request(
            "listed",
            prompts[2],
            count,
            seed=2**64 - 3,
            logit_bias={5: 3.0, 7: -50.0},
            min_tokens=3,
            stop_token_ids=(5, 9),
            **drawn,
        ),
        request("greedy", prompts[3], count, logprobs=0),
    ]
    ours = executor(tmp_path, home())
    found = run(Engine(ours, config(), rng=random.Random(0)), requests)
    ours.close()
    cpu_config = config(dtype="float32", backend="torch", threads=1)
    cpu = create_executor(tmp_path, cpu_config, lambda phase, seconds: None)
    wanted = run(Engine(cpu, cpu_config, rng=random.Random(0)), requests)
    cpu.close()
    for name, deltas in wanted.items():
        assert tokens_of(found[name]) == tokens_of(deltas), name
        assert found[name][-1].finish == deltas[-1].finish
        for mine, theirs in zip(found[name], deltas, strict=True):
            for entry, other in zip(mine.logprobs, theirs.logprobs, strict=True):
                assert (entry.token_ids, entry.rank) == (other.token_ids, other.rank)
                assert entry.logprobs == pytest.approx(other.logprobs, abs=1e-3)
    prompt, other = (each["penalised"][0].prompt_logprobs for each in (found, wanted))
    assert prompt is not None and other is not None and prompt[0] is None
    for mine_entry, theirs_entry in zip(prompt[1:], other[1:], strict=True):
        assert mine_entry is not None and theirs_entry is not None
        assert mine_entry.token_ids == theirs_entry.token_ids
        assert mine_entry.logprobs == pytest.approx(theirs_entry.logprobs, abs=1e-3)


class _NoWaiting(TorchDispatchMode):
    """Fails on what would make the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's signature
        assert func.overloadpacket.__name__ not in WAITING, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@contextmanager
def nobody_waits() -> Iterator[None]:
    """On a GPU torch itself tells."""
    if INTERPRETED:
        with _NoWaiting():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def allocations() -> int:
    """On the GPU, ever."""
    return 0 if INTERPRETED else torch.cuda.memory_stats()["allocation.all.allocated"]


def test_a_steady_step_waits_for_its_tokens_alone(tmp_path: Path) -> None:
    """Two sequences decode: each step is replayed, two are under way, and the host waits once a
    step, for an event; a sequence that ends, and one that takes its slot, change nothing."""
    model = small()
    model.save_pretrained(tmp_path)
    device = HostDevice(1 << 30) if INTERPRETED else CudaDevice()
    ours = executor(tmp_path, device)
    engine = Engine(ours, config())
    prompts = families.prompts(7, 12, 9)
    requests = [request("a", prompts[0], 9), request("b", prompts[1], 8)]
    found: dict[str, list[int]] = {"a": [], "b": [], "c": []}

    def step() -> None:
        for delta in engine.step().deltas:
            found[delta.key.request_id] += delta.token_ids

    for each in requests:
        engine.add(each)
    for _ in range(3):
        step()
    known = (device.waits, device.captures, device.replays) if INTERPRETED else (0, 0, 0)
    allocated = allocations()
    with nobody_waits():
        for _ in range(3):
            step()
    assert allocations() == allocated, "a steady step allocates nothing on the device"
    if INTERPRETED:
        assert isinstance(device, HostDevice)
        assert device.waits - known[0] == 3, "one wait a step"
        assert device.captures == known[1], "nothing is recorded twice"
        assert device.replays - known[2] == 6, "the model and the draw"
    assert len(ours._flights) == 1, "the next step was under way before this one's tokens came"
    while len(found["b"]) < 8:
        step()
    engine.add(request("c", [*prompts[1], *found["b"]], 2))
    while engine.has_work:
        step()
    for name, prompt in (("a", prompts[0]), ("b", prompts[1])):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *found[name]]])).logits[0]
        assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == found[name]
    longer = [*prompts[1], *found["b"], *found["c"]]
    with torch.inference_mode():
        logits = model(torch.tensor([longer])).logits[0]
    assert logits.argmax(-1)[-3:-1].tolist() == found["c"]
    ours.close()


def test_a_stop_token_ends_a_sequence_whose_next_step_runs(tmp_path: Path) -> None:
    """The row that was for nothing draws a token nobody sees, and its blocks are free. The
    executor is what the engine's settings choose."""
    model = small()
    model.save_pretrained(tmp_path)
    chosen = config(backend="triton", dtype="float32")
    phases: list[str] = []
    ours = create_in_process(tmp_path, chosen, lambda phase, seconds: phases.append(phase))
    assert isinstance(ours, GpuExecutor) and phases == ["load", "kv", "warm-up"]
    ours.warm_up(5)
    assert ours.warm_up_rate > 0
    engine = Engine(ours, chosen)
    prompt = families.prompts(3, 14)[0]
    free = tokens_of(run(engine, [request("free", prompt, 5)])["free"])
    stop = free[2]
    deltas = run(engine, [request("stopped", prompt, 5, stop_token_ids=(stop,))])["stopped"]
    assert tokens_of(deltas) == free[: free.index(stop) + 1]
    assert deltas[-1].finish is FinishReason.STOP
    assert engine.load().blocks_used == 0
    ours.close()
    ours.close()  # a second time is fine


class _WithoutGraphs(HostDevice):
    """A device that records nothing."""

    def capture(self, run: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.skipif(not INTERPRETED, reason="the fake device")
def test_what_cannot_be_recorded_is_computed_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Kernel by kernel, with a line in the log for each that is not, and the same tokens."""
    model = small()
    model.save_pretrained(tmp_path)
    ours = executor(tmp_path, _WithoutGraphs(1 << 30))
    prompt = families.prompts(6, 7)[0]
    tokens = tokens_of(run(Engine(ours, config()), [request("a", prompt, 3)])["a"])
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0]
    assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == tokens
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 2 and "forward pass of 1 rows is not recorded: operation" in said[0]
    ours.close()


@pytest.mark.parametrize(
    "changes",
    [{"kv_cache_dtype": "int8"}, {"kv_cache_dtype": "fp8"}, {"quantization": "int8"}],
    ids=str,
)
def test_rounded_weights_and_caches_stay_near(changes: dict[str, str], tmp_path: Path) -> None:
    """Every token's logit in transformers is near the best one's."""
    model = small()
    model.save_pretrained(tmp_path)
    ours = executor(tmp_path, home(), **changes)
    prompt, count = families.prompts(4, 20)[0], 3 if INTERPRETED else 24
    tokens = tokens_of(run(Engine(ours, config()), [request("a", prompt, count)])["a"])
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0][len(prompt) - 1 : -1]
    mine = logits.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
    assert (logits.amax(-1) - mine).max() < 0.5 * logits.std()
    ours.close()


@pytest.mark.parametrize("name", ["gptq-4-act-order", "awq", "compressed-w4a16-zeros"])
def test_four_bit_checkpoints_stay_codes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of queries, keys and values joined and paired as codes, gate and up as well: the tokens
    of transformers with the values that they stand for, in a fraction of the bytes."""
    formats = worker_tests("test_quantized")
    monkeypatch.setattr(formats, "GROUP", 32)
    shape = {**families.BASE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    torch.manual_seed(11)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    saved = SimpleNamespace(save=lambda model, folder: model.save_pretrained(folder) or folder)
    exact = formats.quantized(model, tmp_path, name, saved)
    ours = executor(tmp_path, home())
    layers = ours._model.decoder.layers
    assert isinstance(layers[0].heads.qkv, Linear4) and isinstance(layers[0].output, Linear4)
    assert isinstance(layers[0].mlp.gate_up, Linear4) and isinstance(layers[0].mlp.down, Linear4)
    prompt, count = families.prompts(4, 20)[0], 3 if INTERPRETED else 24
    tokens = tokens_of(run(Engine(ours, config()), [request("a", prompt, count)])["a"])
    with torch.inference_mode():
        logits = exact(torch.tensor([[*prompt, *tokens]])).logits[0]
    assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == tokens
    ours.close()


def test_a_quantization_that_gpus_do_not_have_is_refused() -> None:
    """The message lists those that they have."""
    with pytest.raises(ValueError, match="quantization is 'int3', expected auto, none, int8"):
        linear_maker(config(quantization="int3"))


@pytest.mark.skipif(INTERPRETED, reason="hours in the interpreter")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2_on_the_device(dtype: str) -> None:
    """The real weights, 32 prompts at once: in float32 transformers' tokens; in bfloat16 tokens
    whose logits are near the best ones in float32."""
    pytest.importorskip("gguf")
    zoo = worker_tests("model_zoo")
    try:
        path = zoo.smollm2_path()
    except (SourceError, OSError) as error:
        pytest.skip(f"the weights are not here: {error}")
    model = zoo.smollm2().to("cuda")
    settings = {"max_num_seqs": 32, "max_batched_tokens": 512, "max_model_len": 256}
    ours = executor(path, home(), dtype, **settings, kv_cache_blocks=None)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 49152, (40,), generator=generator).tolist() for _ in range(32)]
    requests = [request(f"{n}", prompt, 24) for n, prompt in enumerate(prompts)]
    found = run(Engine(ours, config(**settings)), requests)
    for number, prompt in enumerate(prompts):
        tokens = tokens_of(found[f"{number}"])
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *tokens]], device="cuda")).logits[0].float()
        logits = logits[len(prompt) - 1 : -1]
        mine = logits.gather(1, torch.tensor(tokens, device="cuda").unsqueeze(1)).squeeze(1)
        behind = (logits.amax(-1) - mine).max()
        assert behind < (1e-3 if dtype == "float32" else 0.7)
    ours.close()
