"""A worker whose device keeps the time of a step model: everything else is the real one.

    python -m bench.paced_worker --step-model FILE_OR_PRESET --max-num-seqs 8

The real gRPC server, engine loop, scheduler and KV blocks run around an executor that waits for as
long as the model says and then draws the same token everywhere. With it, what is calibrated against a
simulation does not depend on what else the machine has to do.
"""  # noqa: E501

import argparse
import asyncio
import time
from collections.abc import Callable

from bench.scripted_engine import byte_model
from shoal.cli.simulation.step_model import StepModel, parse_step_model
from shoal.worker.config import EngineConfig
from shoal.worker.engine import Engine
from shoal.worker.executor import ModelInfo, SerialExecutor
from shoal.worker.server import EngineServer, ServerSettings
from shoal.worker.step import Sampled, StepPlan, StepResult

TOKEN = ord("a")
BLOCKS, BLOCK_SIZE = 1 << 16, 16


class PacedExecutor(SerialExecutor):
    """Takes as long as a step model says."""

    def __init__(
        self,
        model: StepModel,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.info = ModelInfo("PacedForCausalLM", 257, 1 << 16, (256,), None, "float32")
        self.num_blocks = BLOCKS
        self.block_size = BLOCK_SIZE
        self._model = model
        self._clock = clock
        self._sleep = sleep

    def execute(self, plan: StepPlan) -> StepResult:
        until = self._clock()
        decodes = [row for row in plan.rows if row.count == 1]
        context = sum(row.start for row in decodes)
        tokens = plan.num_tokens - len(decodes)
        until += self._model.seconds(len(decodes), tokens, context)
        result = StepResult(tuple(Sampled(row.slot, TOKEN) for row in plan.rows if row.sample))
        self._sleep(max(0.0, until - self._clock()))
        return result

    def close(self) -> None:
        pass


async def _main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--step-model", required=True)
    parser.add_argument("--max-num-seqs", type=int, default=8)
    args = parser.parse_args()
    config = EngineConfig(max_num_seqs=args.max_num_seqs, enable_prefix_caching=False)
    engine = Engine(PacedExecutor(parse_step_model(args.step_model)), config)
    server = EngineServer(ServerSettings())
    await server.start()
    model = byte_model(
        max_model_len=engine.max_model_len, num_blocks=BLOCKS, max_num_seqs=engine.max_num_seqs
    )
    server.serve(engine, model)
    print(f"listening on {server.address}", flush=True)
    await server.failed.wait()
    raise SystemExit(server.failure)


if __name__ == "__main__":
    asyncio.run(_main())
