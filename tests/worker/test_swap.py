"""Hot swaps: two sets of weights in one engine, and the call that brings them there."""

import asyncio
import copy
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shoal.api.v1 import engine_pb2, engine_pb2_grpc
from shoal.kernels.native import unavailable
from shoal.worker.config import EngineConfig
from shoal.worker.engine import Engine
from shoal.worker.errand import errand
from shoal.worker.model.fingerprint import tensors_of
from shoal.worker.request import EngineRequest, SamplingParams
from shoal.worker.runner import InProcessExecutor, create_executor
from shoal.worker.served import Served
from shoal.worker.server import EngineServer, ServerSettings
from shoal.worker.sources import ModelFiles, ModelNotFound
from shoal.worker.step import Row, SlotInit, StepPlan
from shoal.worker.swap import Swapper, Text
from shoal.worker.weight_sets import RevisionGone, WeightSet

LENGTH = 40
BLOCK = 16
PROMPTS = [tuple(range(3 + 7 * i, 3 + 7 * i + 18 + i)) for i in range(5)]
Progress = engine_pb2.SwapProgress
GREEDY = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Leaves torch's number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclass
class World:
    """Models by name: three revisions of one, and some that do not go with them."""

    folders: dict[str, Path]
    models: dict[str, Any]

    def resolve(self, uri: str, revision: str | None) -> ModelFiles:
        if uri not in self.folders:
            raise ModelNotFound(f"{uri}: there is no such model")
        return ModelFiles(self.folders[uri], uri)

    def answer(self, name: str, prompt: Sequence[int]) -> tuple[int, ...]:
        """The greedy answer of one revision, by transformers."""
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            out = self.models[name].generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=LENGTH,
                max_new_tokens=LENGTH,
                eos_token_id=None,
                pad_token_id=0,
            )
        return tuple(out[0, len(prompt) :].tolist())


def _random(seed: int, **sizes: int) -> Any:
    values = {
        "vocab_size": 192,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**values, **sizes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.25 if "norm" in name else 0.15)
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Sizes that suit the native library, too."""
    made = {"a": _random(1), "b": _random(2), "c": _random(3), "wide": _random(4, hidden_size=96)}
    made["broken"] = copy.deepcopy(made["b"])
    made["broken"].model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    folders = {name: tmp_path_factory.mktemp(name) for name in made}
    for name, model in made.items():
        model.save_pretrained(folders[name])
    return World(folders, made)


def build(world: World, **settings: object) -> tuple[InProcessExecutor, EngineConfig]:
    values = {"max_num_seqs": 8, "block_size": BLOCK, "kv_cache_blocks": 60, "threads": 1}
    config = EngineConfig(**{**values, "dtype": "float32", **settings})
    return create_executor(world.folders["a"], config, lambda phase, seconds: None), config


def load(executor: InProcessExecutor, number: int, folder: Path) -> None:
    assert executor.standby is not None
    stop = threading.Event()
    sha256 = executor.standby.read(folder, "", stop)
    executor.standby.load(number, folder, sha256, stop, lambda share: None)
    executor.standby.probe(number)


class Story:
    """An engine that a test steps by hand."""

    def __init__(self, world: World, **settings: object) -> None:
        self.world = world
        self.executor, config = build(world, **settings)
        self.engine = Engine(self.executor, config, revision="a")
        self.tokens: dict[str, list[int]] = {}
        self.moved: dict[str, str] = {}
        self.cached: dict[str, int] = {}

    def add(self, name: str, prompt: Sequence[int], revision: str = "", **fields: Any) -> None:
        ids = tuple(prompt)
        request = EngineRequest(
            name, ids, fields.pop("prompt_len", len(ids)), GREEDY, revision=revision, **fields
        )
        self.engine.add(request)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            for delta in self.engine.step().deltas:
                assert delta.error is None
                known = self.tokens.setdefault(delta.key.request_id, [])
                if not known:
                    self.cached[delta.key.request_id] = delta.cached_tokens
                known += delta.token_ids
                if delta.revision:
                    self.moved[delta.key.request_id] = delta.revision

    def finish(self) -> None:
        while self.engine.has_work:
            self.step()

    def load(self, number: int, name: str) -> None:
        load(self.executor, number, self.world.folders[name])

    def check(self, name: str, revision: str, prompt: Sequence[int]) -> None:
        assert tuple(self.tokens[name]) == self.world.answer(revision, prompt), name


def test_requests_finish_on_the_weights_they_began_with(world: World) -> None:
    """Old and new requests run side by side; who names the old revision still gets it; after the
    way back, too, every answer is one revision's from its start."""
    story = Story(world)
    for name, prompt in zip("pqr", PROMPTS, strict=False):
        story.add(name, prompt)
    story.step(7)
    story.load(1, "b")
    assert story.engine.activate(WeightSet(1, "b"), recompute=False) == 0
    story.add("s", PROMPTS[0])
    story.add("t", PROMPTS[3], revision="a")
    story.step(9)
    story.add("u", PROMPTS[1], revision="b")
    previous = story.engine.weights.previous
    assert previous == WeightSet(0, "a")
    story.engine.activate(previous, recompute=False)
    story.add("v", PROMPTS[4])
    assert story.engine.running_on(0) == 5 and story.engine.running_on(1) == 2
    story.finish()
    for name, revision, place in (
        *(("p", "a", 0), ("q", "a", 1), ("r", "a", 2), ("t", "a", 3), ("v", "a", 4)),
        *(("s", "b", 0), ("u", "b", 1)),
    ):
        story.check(name, revision, PROMPTS[place])
    assert not story.moved


def test_recomputed_requests_begin_anew_unless_they_spoke(world: World) -> None:
    """With `recompute`, who waited runs on the new weights and says so, with its prompt's blocks
    hashed anew; who has spoken, here or elsewhere before, finishes as it began."""
    story = Story(world, max_num_seqs=2)
    begun = world.answer("a", PROMPTS[2])[:3]
    story.add("spoke", PROMPTS[0])
    story.step(4)
    story.add("waits", PROMPTS[1])
    story.add("also waits", PROMPTS[1])
    story.add("migrated", (*PROMPTS[2], *begun), prompt_len=len(PROMPTS[2]))
    story.load(1, "b")
    assert story.engine.activate(WeightSet(1, "b"), recompute=True) == 2
    story.finish()
    story.check("spoke", "a", PROMPTS[0])
    story.check("waits", "b", PROMPTS[1])
    story.check("also waits", "b", PROMPTS[1])
    assert tuple(story.tokens["migrated"][: LENGTH - 3]) == world.answer("a", PROMPTS[2])[3:]
    assert story.moved == {"waits": "b", "also waits": "b"}
    story.engine._scheduler.check_integrity()


def test_a_prefill_under_way_begins_anew(world: World) -> None:
    """A long prompt that was computed in part is computed whole on the new weights."""
    story = Story(world, max_batched_tokens=16, max_prefill_tokens=8)
    story.add("long", PROMPTS[4])
    story.step(2)
    story.load(1, "b")
    assert story.engine.activate(WeightSet(1, "b"), recompute=True) == 1
    story.finish()
    story.check("long", "b", PROMPTS[4])


def test_prefix_blocks_die_by_salt_and_live_again_on_the_way_back(world: World) -> None:
    """No block of one revision is found by the other; the first one's are still there after."""
    story = Story(world)
    story.add("first", PROMPTS[0])
    story.finish()
    story.load(1, "b")
    story.engine.activate(WeightSet(1, "b"), recompute=False)
    story.add("second", PROMPTS[0])
    story.finish()
    previous = story.engine.weights.previous
    assert previous is not None
    story.engine.activate(previous, recompute=False)
    story.add("third", PROMPTS[0])
    story.finish()
    assert (story.cached["second"], story.cached["third"]) == (0, BLOCK)
    story.check("second", "b", PROMPTS[0])
    story.check("third", "a", PROMPTS[0])


def test_a_third_revision_takes_the_place_of_the_first(world: World) -> None:
    """Retired, the previous revision is refused; discarded, its set is gone, and the spec and the
    caches that it was made with stay."""
    story = Story(world)
    story.load(1, "b")
    story.engine.activate(WeightSet(1, "b"), recompute=False)
    story.add("old", PROMPTS[0], revision="a")
    story.engine.weights.retire()
    with pytest.raises(RevisionGone, match="revision a was asked for, b is served"):
        story.add("late", PROMPTS[0], revision="a")
    assert story.engine.running_on(0) == 1
    story.finish()
    assert story.engine.running_on(0) == 0
    assert story.executor.standby is not None
    story.executor.standby.discard(0)
    story.load(2, "c")
    story.engine.activate(WeightSet(2, "c"), recompute=False)
    story.add("new", PROMPTS[2])
    story.add("before", PROMPTS[2], revision="b")
    story.finish()
    story.check("old", "a", PROMPTS[0])
    story.check("new", "c", PROMPTS[2])
    story.check("before", "b", PROMPTS[2])


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_native_programs_over_one_cache(world: World, quantization: str) -> None:
    """Step programs of two sets in one step draw what each draws alone."""
    if (why := unavailable()) is not None:
        pytest.skip(why)
    settings = {"dtype": "bfloat16", "backend": "native", "quantization": quantization}
    alone = {}
    for name in "ab":
        other = World({"a": world.folders[name]}, {})
        executor, _ = build(other, **settings)
        alone[name] = _draw(executor, {0: 0})[0]
        executor.close()
    executor, _ = build(world, **settings)
    load(executor, 1, world.folders["b"])
    together = _draw(executor, {0: 0, 1: 1})
    assert (together[0], together[1]) == (alone["a"], alone["b"])
    assert alone["a"] != alone["b"]
    executor.close()


def _draw(executor: InProcessExecutor, weights: dict[int, int]) -> dict[int, list[int]]:
    """Ten greedy tokens of the same prompt in each slot, on the slot's set of weights."""
    prompt = PROMPTS[0]
    init = tuple(
        SlotInit(slot, prompt, len(prompt), GREEDY, 0, tuple(range(1 + 4 * slot, 5 + 4 * slot)), n)
        for slot, n in weights.items()
    )
    tokens: dict[int, list[int]] = {slot: [] for slot in weights}
    start, count = 0, len(prompt)
    for _ in range(10):
        rows = tuple(Row(slot, start, count, True) for slot in weights)
        for sampled in executor.execute(StepPlan(0, init, (), rows)).sampled:
            tokens[sampled.slot].append(sampled.token_id)
        init, start, count = (), start + count, 1
    return tokens


# The call.


class Caller:
    """A client of a server whose engine can swap."""

    def __init__(self, channel: grpc.aio.Channel, engine: Engine, executor: Any) -> None:
        self.stub: Any = engine_pb2_grpc.EngineStub(channel)
        self.engine = engine
        self.executor = executor

    async def swap(self, uri: str, revision: str, **fields: Any) -> list[Any]:
        request = engine_pb2.SwapWeightsRequest(uri=uri, revision=revision, **fields)
        return [message async for message in self.stub.SwapWeights(request)]

    async def refusal(self, uri: str, revision: str, **fields: Any) -> tuple[Any, str]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.swap(uri, revision, **fields)
        return caught.value.code(), str(caught.value.details())

    async def revision(self, wanted: str = "") -> str:
        model = await self.stub.GetModel(engine_pb2.GetModelRequest(revision=wanted))
        assert model.hash_seed == model.revision
        return str(model.revision)

    async def answer(self, prompt: Sequence[int], revision: str = "") -> tuple[int, ...]:
        call = self.stub.Generate()
        sampling = engine_pb2.Sampling(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
        start = engine_pb2.Start(id="x", token_ids=prompt, sampling=sampling, revision=revision)
        await call.write(engine_pb2.GenerateRequest(start=[start]))
        await call.done_writing()
        tokens: list[int] = []
        async for batch in call:
            for delta in batch.deltas:
                assert not delta.HasField("error"), delta.error.message
                tokens += delta.token_ids
        return tuple(tokens)


@asynccontextmanager
async def called(world: World, **settings: Any) -> AsyncIterator[Caller]:
    tokenizers = {"c": b"{}"} if settings.pop("other_tokenizer", False) else {}
    executor, config = build(world, **settings)
    engine = Engine(executor, config, revision="ra")

    def text(path: Path) -> Text:
        name = next(name for name, folder in world.folders.items() if folder == path)
        json = tokenizers.get(name, b"[]")
        tokenizer = engine_pb2.Tokenizer(tokenizer_json=json, chat_template=name)
        return Text(tokenizer, engine_pb2.Sampling(temperature=0.5))

    assert executor.standby is not None
    swapper = Swapper(engine, executor.standby, world.resolve, text)
    server = EngineServer(ServerSettings(stall_seconds=5.0, health_seconds=0.02))
    await server.start()
    tokenizer = text(world.folders["a"]).tokenizer
    model = engine_pb2.Model(name="a", revision="ra", hash_seed="ra", tokenizer=tokenizer)
    server.serve(engine, model, None, swapper)
    channel = grpc.aio.insecure_channel(server.address)
    try:
        yield Caller(channel, engine, executor)
    finally:
        await channel.close()
        await server.stop(0.0)


def run(world: World, story: Callable[[Caller], Any], **settings: Any) -> None:
    async def main() -> None:
        async with called(world, **settings) as caller:
            await asyncio.wait_for(story(caller), 60)

    asyncio.run(main())


def test_there_and_back_and_on(world: World) -> None:
    """A swap says its phases and its pause; asked for again, or back, it loads nothing; a third
    revision ends the first."""

    async def story(caller: Caller) -> None:
        there = await caller.swap("b", "rb")
        assert [m.phase for m in there][-1] == Progress.DONE
        assert 0 < there[-1].pause_seconds < 1 and len(there[-1].sha256) == 64
        assert (await caller.revision(), await caller.revision("ra")) == ("rb", "ra")
        model = await caller.stub.GetModel(engine_pb2.GetModelRequest())
        assert (model.name, model.tokenizer.chat_template) == ("b", "b")
        assert model.default_sampling.temperature == 0.5
        assert await caller.answer(PROMPTS[0]) == world.answer("b", PROMPTS[0])
        assert await caller.answer(PROMPTS[0], "ra") == world.answer("a", PROMPTS[0])
        again = await caller.swap("b", "rb")
        assert [m.phase for m in again] == [Progress.DONE] and again[0].pause_seconds == 0
        back = await caller.swap("", "ra")
        assert Progress.LOADING not in [m.phase for m in back[1:]]
        assert await caller.answer(PROMPTS[1]) == world.answer("a", PROMPTS[1])
        await caller.swap("c", "rc", sha256="")
        assert (await caller.revision(), await caller.revision("rb")) == ("rc", "rc")
        assert await caller.answer(PROMPTS[1]) == world.answer("c", PROMPTS[1])
        assert await caller.answer(PROMPTS[1], "ra") == world.answer("a", PROMPTS[1])

    run(world, story)


def test_what_does_not_fit_is_refused_in_words(world: World) -> None:
    """Each refusal has its status and names what was expected and found; nothing has changed."""

    async def story(caller: Caller) -> None:
        code = grpc.StatusCode
        status, words = await caller.refusal("wide", "r1")
        assert status == code.FAILED_PRECONDITION
        assert "model.embed_tokens.weight is [192, 96], expected [192, 64]" in words
        status, words = await caller.refusal("broken", "r1")
        assert (status, "layers.1.mlp.up_proj.weight" in words) == (code.DATA_LOSS, True), words
        status, words = await caller.refusal("b", "r1", sha256="0" * 64)
        assert (status, "expected 000" in words) == (code.DATA_LOSS, True)
        status, words = await caller.refusal("nowhere", "r1")
        assert status == code.NOT_FOUND
        assert (await caller.refusal("b", ""))[0] == code.INVALID_ARGUMENT
        assert (await caller.refusal("", "r1"))[0] == code.INVALID_ARGUMENT
        status, words = await caller.refusal("c", "rc")
        assert (status, "tokenizer" in words) == (code.FAILED_PRECONDITION, True)
        assert await caller.revision() == "ra"
        assert await caller.answer(PROMPTS[0]) == world.answer("a", PROMPTS[0])

    run(world, story, other_tokenizer=True)


def test_a_second_set_must_fit_the_limit(world: World) -> None:
    """Refused with the sum and the way out, before anything is loaded or let go."""

    async def story(caller: Caller) -> None:
        caller.executor.standby._limit = caller.executor.standby._memory.total + 1000
        status, words = await caller.refusal("b", "rb")
        assert status == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "a second set of weights needs" in words and "kvCacheMemoryFraction" in words

    run(world, story)


def test_corrupted_weights_do_not_come_back(world: World) -> None:
    """A tensor that changed in memory while it was kept is found before it serves again."""

    async def story(caller: Caller) -> None:
        await caller.swap("b", "rb")
        kept = dict(tensors_of(caller.executor.backend(0).weights()))
        name = next(name for name, tensor in kept.items() if tensor.dim() == 1)
        with torch.inference_mode():
            kept[name][3] += 0.25
        status, words = await caller.refusal("", "ra")
        assert status == grpc.StatusCode.DATA_LOSS and f"tensor {name} has the checksum" in words
        assert await caller.revision() == "rb"

    run(world, story)


def test_one_at_a_time_and_broken_off(world: World) -> None:
    """A second call is refused while one is under way; one that is broken off changes nothing and
    makes room for the next."""

    async def story(caller: Caller) -> None:
        request = engine_pb2.SwapWeightsRequest(uri="b", revision="rb")
        held = threading.Event()
        standby = caller.executor.standby
        inner = standby.load

        def slow(*args: Any) -> str:
            held.wait(10)
            return str(inner(*args))

        standby.load = slow
        call = caller.stub.SwapWeights(request)
        assert (await call.read()).phase == Progress.LOADING
        assert (await caller.refusal("c", "rc"))[0] == grpc.StatusCode.ABORTED
        call.cancel()
        await asyncio.sleep(0.05)
        held.set()
        standby.load = inner
        while True:
            try:
                await caller.swap("c", "rc")
                break
            except grpc.aio.AioRpcError as error:
                assert error.code() == grpc.StatusCode.ABORTED
                await asyncio.sleep(0.02)
        assert await caller.revision() == "rc"
        assert await caller.answer(PROMPTS[0], "ra") == world.answer("a", PROMPTS[0])
        assert caller.executor.backend(0) and 1 not in caller.executor._backends

    run(world, story)


def test_a_swap_broken_off_while_old_requests_run_leaks_nothing(world: World) -> None:
    """It had begun to let the previous weights go: the next swap does so first, and two sets are
    in memory after it."""

    async def story(caller: Caller) -> None:
        await caller.swap("b", "rb")
        caller.engine.running_on = lambda number: 1
        call = caller.stub.SwapWeights(engine_pb2.SwapWeightsRequest(uri="c", revision="rc"))
        while (await call.read()).phase != Progress.DRAINING:
            pass
        assert (await caller.refusal("c", "rc"))[0] == grpc.StatusCode.ABORTED
        call.cancel()
        del caller.engine.running_on
        while True:
            try:
                await caller.swap("c", "rc")
                break
            except grpc.aio.AioRpcError as error:
                assert error.code() == grpc.StatusCode.ABORTED
                await asyncio.sleep(0.02)
        assert len(caller.executor.standby.numbers) == len(caller.executor._backends) == 2
        assert await caller.answer(PROMPTS[0]) == world.answer("c", PROMPTS[0])
        assert await caller.answer(PROMPTS[0], "rb") == world.answer("b", PROMPTS[0])

    run(world, story)


def test_files_that_are_not_whole_cost_no_way_back(world: World) -> None:
    """The previous weights go only once the new file was read to its end."""

    async def story(caller: Caller) -> None:
        await caller.swap("b", "rb")
        assert (await caller.refusal("c", "rc", sha256="0" * 64))[0] == grpc.StatusCode.DATA_LOSS
        assert await caller.revision("ra") == "ra"
        await caller.swap("", "ra")
        assert await caller.answer(PROMPTS[0]) == world.answer("a", PROMPTS[0])

    run(world, story)


def test_progress_is_repeated_while_nothing_changes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who calls can tell a slow engine from a dead one."""
    monkeypatch.setattr("shoal.worker.swap.REPEAT_SECONDS", 0.0)
    monkeypatch.setattr("shoal.worker.swap.PROGRESS_SECONDS", 0.01)

    async def story(caller: Caller) -> None:
        inner = caller.executor.standby.read

        def slow(*args: Any) -> str:
            threading.Event().wait(0.3)
            return str(inner(*args))

        caller.executor.standby.read = slow
        said = await caller.swap("b", "rb")
        assert sum(m == Progress(phase=Progress.LOADING) for m in said) > 3

    run(world, story)


def test_a_call_nobody_waits_for_is_not_made() -> None:
    """An engine that comes to its next step too late does not swap behind everybody's back."""

    async def story() -> None:
        calls: list[int] = []
        act, answer = errand(lambda: calls.append(1))
        answer.cancel()
        act()
        assert not calls
        act, answer = errand(lambda: 7)
        act()
        assert (await answer)[0] == 7

    asyncio.run(story())


def test_what_routers_are_told_follows_the_engine() -> None:
    """The model of a revision that became active is there whoever made it so; what is no longer in
    memory is forgotten with the next that is expected."""
    in_memory = ["ra"]
    models = {name: engine_pb2.Model(revision=name) for name in ("ra", "rb", "rc")}
    served = Served(models["ra"], lambda: tuple(in_memory))
    served.expect(models["rb"])
    assert (served.active, served.find("rb")) == (models["ra"], models["ra"])
    in_memory[:] = ["rb", "ra"]
    assert (served.active, served.find("ra")) == (models["rb"], models["ra"])
    in_memory[:] = ["rb"]
    served.expect(models["rc"])
    in_memory[:] = ["rc", "rb"]
    assert (served.find("ra"), served.find("rb")) == (models["rc"], models["rb"])
