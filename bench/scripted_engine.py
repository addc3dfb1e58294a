"""An engine without a model: the real gRPC service with answers from a script.

The router's tests and benchmark talk to it through real sockets. The next token is a function of
all tokens before it (and of seed and sample index where the request is not greedy), so an answer
that was continued on another replica equals the undisturbed one, and `expected` tells both.

    python -m bench.scripted_engine --port 9000 --tokens 16 --step-seconds 0.02
"""

import argparse
import asyncio
import json
import sys
from array import array
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from zlib import crc32

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from shoal.api.blocks import block_hashes, root_hash, wire_id
from shoal.api.v1 import engine_pb2, engine_pb2_grpc
from shoal.worker.cache_watch import Watcher

EOS = 256
SERVER_OPTIONS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.so_reuseport", 0)]


def byte_tokenizer() -> bytes:
    """A tokenizer.json whose token ids are the bytes of the text, and 256 the end."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable}
    names |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    end = {"id": EOS, "content": "<|end|>", "special": True, "normalized": False}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**end, "single_word": False, "lstrip": False, "rstrip": False}],
        "normalizer": None,
        "pre_tokenizer": {**level, "use_regex": False},
        "post_processor": None,
        "decoder": {**level, "use_regex": False},
        "model": {
            "type": "BPE",
            "vocab": {name: byte for byte, name in names.items()} | {"<|end|>": EOS},
            "merges": [],
        },
    }
    return json.dumps(document).encode()


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_model(revision: str = "", **changes: int) -> engine_pb2.Model:
    """What `GetModel` says by default; `changes` are fields of Model."""
    fields: dict[str, int] = {
        "max_model_len": 4096,
        "block_size": 16,
        "num_blocks": 4096,
        "max_num_seqs": 64,
    }
    fields |= changes
    return engine_pb2.Model(
        name="scripted",
        revision=revision,
        hash_seed=revision,
        architecture="ScriptedForCausalLM",
        vocab_size=257,
        eos_token_ids=[EOS],
        dtype="float32",
        tokenizer=engine_pb2.Tokenizer(
            tokenizer_json=byte_tokenizer(), chat_template=TEMPLATE, eos_token="<|end|>"
        ),
        **fields,
    )


@dataclass
class Script:
    """How the engine behaves. May be changed while it runs; requests read it at every step."""

    tokens: int = 16  # of an answer whose request sets no max_tokens; ends with EOS
    step_seconds: float = 0.0  # between steps
    tokens_per_step: int = 1  # of each sequence
    die_after: int | None = None  # breaks the stream once it has sent this many tokens
    refuse: int | None = None  # every request ends with this Error.Code
    fail_after: int | None = None  # every sequence ends with INTERNAL after this many tokens
    junk: bool = False  # sends deltas that nobody asked for along with the real ones
    silent: bool = False  # takes requests, answers nothing, sends no heartbeat
    heartbeat_seconds: float = 1.0
    prefill_tokens_per_second: float = 100_000.0
    waiting: int = 0  # what Load claims
    queued_prefill_tokens: int = 0  # likewise


def expected(
    token_ids: Sequence[int], count: int, *, seed: int | None = None, index: int = 0
) -> list[int]:
    """The next `count` tokens after `token_ids`. `seed` None: the request is greedy."""
    state = crc32(array("I", token_ids).tobytes())
    flavour = 0 if seed is None else crc32(f"{seed}/{index}".encode())
    tokens = []
    for _ in range(count):
        token = 97 + (state ^ flavour) % 26
        tokens.append(token)
        state = crc32(token.to_bytes(4, sys.byteorder), state)
    return tokens


@dataclass
class _Sequence:
    id: str
    index: int
    tokens: list[int]  # to come, in order
    finish: int  # after the last of them
    cached: int
    first: bool = True
    sent: int = 0


@dataclass
class Engine(engine_pb2_grpc.EngineServicer):
    """The servicer. `starts` and `cancels` record what came in, for tests to read."""

    model: engine_pb2.Model = field(default_factory=byte_model)
    previous: engine_pb2.Model | None = None  # the one before the last swap, served too
    script: Script = field(default_factory=Script)
    starts: list[engine_pb2.Start] = field(default_factory=list)
    cancels: list[tuple[str, int | None]] = field(default_factory=list)
    messages: int = 0  # GenerateRequest messages received
    draining: bool = False
    record: bool = True  # False: a benchmark, which would only fill memory
    status: health.aio.HealthServicer | None = None  # set by `serve`

    def __post_init__(self) -> None:
        self._cached: dict[int, None] = {}  # wire ids, oldest first
        self._watchers: list[Watcher] = []
        self._running = 0

    async def GetModel(
        self, request: engine_pb2.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.Model:
        if self.previous is not None and request.revision == self.previous.revision:
            return self.previous
        return self.model

    async def SwapWeights(
        self, request: engine_pb2.SwapWeightsRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[engine_pb2.SwapProgress]:
        if request.revision != self.model.revision:
            self.previous = self.model
            self.model = engine_pb2.Model()
            self.model.CopyFrom(self.previous)
            self.model.name = request.uri
            self.model.revision = self.model.hash_seed = request.revision
        yield engine_pb2.SwapProgress(phase=engine_pb2.SwapProgress.DONE, pause_seconds=0.01)

    def serves(self, revision: str) -> bool:
        """Whether a Start may name this revision."""
        served = [model.revision for model in (self.model, self.previous) if model is not None]
        return not revision or revision in served

    async def Drain(
        self, request: engine_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.DrainResponse:
        self.draining = True
        for _ in range(int(request.deadline_seconds * 100)):
            if not self._running:
                break
            await asyncio.sleep(0.01)
        return engine_pb2.DrainResponse(unfinished=self._running)

    async def WatchCache(
        self, request: engine_pb2.WatchCacheRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[engine_pb2.CacheEvents]:
        watcher = Watcher(0, lambda: None, max_pending=1 << 20)
        watcher.reset(list(self._cached))
        self._watchers.append(watcher)
        try:
            while True:
                for events in await watcher.next_events():
                    yield events
        finally:
            self._watchers.remove(watcher)

    async def Generate(
        self,
        request_iterator: AsyncIterator[engine_pb2.GenerateRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[engine_pb2.GenerateBatch]:
        stream = _Stream(self)
        reader = asyncio.create_task(stream.read(request_iterator))
        try:
            async for batch in stream.batches():
                yield batch
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the script says die")
        finally:
            reader.cancel()
            self._running -= len(stream.active)

    async def say_alive(self, alive: bool) -> None:
        """What the health service answers from now on."""
        answers = health_pb2.HealthCheckResponse
        assert self.status is not None, "the engine is not served"
        for name in ("", "live"):
            await self.status.set(name, answers.SERVING if alive else answers.NOT_SERVING)

    def load(self) -> engine_pb2.Load:
        return engine_pb2.Load(
            running=self._running,
            waiting=self.script.waiting,
            blocks_used=len(self._cached),
            blocks_total=self.model.num_blocks,
            queued_prefill_tokens=self.script.queued_prefill_tokens,
            step_seconds=max(self.script.step_seconds, 0.001),
            prefill_tokens_per_second=self.script.prefill_tokens_per_second,
            draining=self.draining,
        )

    def admit(self, start: engine_pb2.Start) -> list[_Sequence]:
        """The sequences that a Start becomes, with everything they will say."""
        self._running += max(1, start.n)
        prompt = list(start.token_ids)
        sampling = start.sampling
        generated = len(prompt) - start.prompt_tokens if start.prompt_tokens else 0
        count = self.script.tokens - generated
        finish = engine_pb2.FINISH_REASON_STOP
        if sampling.HasField("max_tokens"):
            count, finish = sampling.max_tokens, engine_pb2.FINISH_REASON_LENGTH
        greedy = sampling.HasField("temperature") and not sampling.temperature
        cached = self._cache(prompt, start.salt)
        sequences = []
        for index in range(start.sample_index, start.sample_index + max(1, start.n)):
            tokens = expected(prompt, count, seed=None if greedy else sampling.seed, index=index)
            if finish == engine_pb2.FINISH_REASON_STOP:
                tokens[-1:] = [EOS]
            sequences.append(_Sequence(start.id, index, tokens, finish, cached))
        return sequences

    def end(self, count: int) -> None:
        self._running -= count

    def _cache(self, prompt: list[int], salt: str) -> int:
        """Stores the prompt's blocks, tells watchers, returns the tokens found."""
        size = self.model.block_size
        hashes = block_hashes(root_hash(self.model.hash_seed, salt), prompt, size)
        blocks = [wire_id(block) for block in hashes]
        hit = next(
            (at for at, block in enumerate(blocks) if block not in self._cached), len(blocks)
        )
        stored = [block for block in blocks if block not in self._cached]
        self._cached.update(dict.fromkeys(blocks))
        excess = max(0, len(self._cached) - self.model.num_blocks)
        removed = [block for block, _ in zip(self._cached, range(excess), strict=False)]
        for block in removed:
            del self._cached[block]
        if stored or removed:
            for watcher in self._watchers:
                watcher.apply(stored, removed)
        return min(hit, (len(prompt) - 1) // size) * size


class _Stream:
    """One router's stream: what it asked for, and a step at a time of answers."""

    def __init__(self, engine: Engine) -> None:
        self.active: list[_Sequence] = []
        self._engine = engine
        self._answers: list[engine_pb2.Delta] = []
        self._news = asyncio.Event()
        self._sent = 0

    async def read(self, requests: AsyncIterator[engine_pb2.GenerateRequest]) -> None:
        async for request in requests:
            self._engine.messages += 1
            for start in request.start:
                self._start(start)
            for cancel in request.cancel:
                self._cancel(cancel)
            self._news.set()

    def _start(self, start: engine_pb2.Start) -> None:
        engine = self._engine
        if engine.record:
            engine.starts.append(start)
        refusal = engine.script.refuse
        if engine.draining or not engine.serves(start.revision):
            refusal = engine_pb2.Error.UNAVAILABLE
        if refusal is None:
            self.active += engine.admit(start)
            return
        error = engine_pb2.Error(
            code=refusal,
            message="refused by the script",
            field="sampling.top_p" if refusal == engine_pb2.Error.INVALID_ARGUMENT else "",
        )
        self._answers.append(
            engine_pb2.Delta(
                id=start.id,
                index=start.sample_index,
                finish_reason=engine_pb2.FINISH_REASON_ERROR,
                error=error,
            )
        )

    def _cancel(self, cancel: engine_pb2.Cancel) -> None:
        index = cancel.index if cancel.HasField("index") else None
        if self._engine.record:
            self._engine.cancels.append((cancel.id, index))
        keep = [
            s for s in self.active if s.id != cancel.id or (index is not None and s.index != index)
        ]
        self._engine.end(len(self.active) - len(keep))
        self.active = keep

    async def batches(self) -> AsyncIterator[engine_pb2.GenerateBatch]:
        """Ends only where the script lets the stream die."""
        script = self._engine.script
        yield engine_pb2.GenerateBatch(load=self._engine.load())
        while True:
            if script.silent or not (self.active or self._answers):
                try:
                    await asyncio.wait_for(self._news.wait(), script.heartbeat_seconds)
                except TimeoutError:
                    if not script.silent:
                        yield engine_pb2.GenerateBatch(load=self._engine.load())
                    continue
            self._news.clear()
            if script.silent:
                continue
            batch = engine_pb2.GenerateBatch(deltas=self._answers, load=self._engine.load())
            self._answers.clear()
            self._step(batch)
            yield batch
            if script.die_after is not None and self._sent >= script.die_after:
                return
            if self.active and script.step_seconds:
                await asyncio.sleep(script.step_seconds)

    def _step(self, batch: engine_pb2.GenerateBatch) -> None:
        script = self._engine.script
        if script.junk:
            batch.deltas.add(id="nobody", token_ids=[1, 2])
            batch.deltas.add(id="", finish_reason=engine_pb2.FINISH_REASON_STOP)
        left = []
        for sequence in self.active:
            delta = batch.deltas.add(id=sequence.id, index=sequence.index)
            if sequence.first:
                delta.cached_tokens = sequence.cached
                sequence.first = False
            tokens = sequence.tokens[sequence.sent : sequence.sent + script.tokens_per_step]
            delta.token_ids.extend(tokens)
            sequence.sent += len(tokens)
            self._sent += len(tokens)
            if script.fail_after is not None and sequence.sent >= script.fail_after:
                delta.finish_reason = engine_pb2.FINISH_REASON_ERROR
                delta.error.code = engine_pb2.Error.INTERNAL
                delta.error.message = "failed by the script"
            elif sequence.sent >= len(sequence.tokens):
                delta.finish_reason = sequence.finish
            else:
                left.append(sequence)
        self._engine.end(len(self.active) - len(left))
        self.active = left


async def serve(engine: Engine, address: str = "127.0.0.1:0") -> tuple[grpc.aio.Server, int]:
    """Starts the service with health beside it; returns the server and its port."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    engine_pb2_grpc.add_EngineServicer_to_server(engine, server)
    state = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    port = server.add_insecure_port(address)
    await server.start()
    engine.status = state
    await engine.say_alive(True)
    return server, port


async def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--tokens-per-step", type=int, default=1)
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--revision", default="")
    parser.add_argument("--tokenizer", help="a tokenizer.json; default: bytes")
    options = parser.parse_args()
    model = byte_model(
        options.revision, max_num_seqs=options.max_num_seqs, max_model_len=1 << 16, num_blocks=65536
    )
    if options.tokenizer:
        with open(options.tokenizer, "rb") as file:  # noqa: ASYNC230, PTH123 - before it serves
            model.tokenizer.tokenizer_json = file.read()
    script = Script(
        tokens=options.tokens,
        tokens_per_step=options.tokens_per_step,
        step_seconds=options.step_seconds,
    )
    engine = Engine(model=model, script=script, record=False)
    server, port = await serve(engine, f"{options.host}:{options.port}")
    print(f"listening on {options.host}:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_main())
