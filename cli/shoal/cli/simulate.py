"""`shoal simulate`: what a service would do under a load, on a virtual clock."""

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shoal.cli.errors import UsageError
from shoal.cli.options import Duration, file_option
from shoal.cli.output import format_data, output_option

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shoal.api.types import InferenceService
    from shoal.cli.simulation.arrivals import Arrival

DEFAULT_DURATION = 600.0


@click.command()
@file_option()
@click.option(
    "--arrivals",
    metavar="PROCESS",
    help="Draw requests: poisson:RATE, steps:RATExSECONDS,..., wave:MEAN,SWING,PERIOD or "
    "bursts:RATE,SIZE,GAP; rates per second.",
)
@click.option(
    "--trace",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Read requests from a CSV file with a time, prompt tokens and output tokens.",
)
@click.option(
    "--speed",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Play the trace so many times as fast.",
)
@click.option(
    "--duration",
    type=Duration(),
    help="Time that is simulated, such as 90s or 1h. Default: the length of the trace or of the "
    "steps, else 10m.",
)
@click.option(
    "--prompt-tokens",
    default="64-512",
    show_default=True,
    help="Prompt tokens of drawn requests: a number, or a range that is drawn from evenly.",
)
@click.option(
    "--output-tokens",
    default="32-256",
    show_default=True,
    help="Generated tokens of drawn requests: a number or a range.",
)
@click.option(
    "--replicas-max",
    type=click.IntRange(1, 100_000),
    help="Use this in place of spec.autoscaling.maxReplicas.",
)
@click.option(
    "--start-seconds",
    type=Duration(),
    default="20s",
    show_default=True,
    help="Time from the decision for a replica to its first request.",
)
@click.option(
    "--step-model",
    default="smollm2-cpu",
    show_default=True,
    help="How long an engine's step takes: a preset's name, or a JSON file as bench.step_model "
    "writes it.",
)
@click.option(
    "--kv-tokens",
    type=click.IntRange(1),
    help="Tokens that the KV cache of a replica holds. Default: as kvCacheBlocks says, else "
    "enough for maxNumSeqs sequences.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="For all that is drawn.")
@click.option(
    "--plot",
    "picture",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write replicas, queue and TTFT over time to this image. Needs matplotlib.",
)
@output_option("json", "yaml")
def command(
    filenames: tuple[str, ...],
    arrivals: str | None,
    trace: Path | None,
    speed: float,
    duration: float | None,
    prompt_tokens: str,
    output_tokens: str,
    replicas_max: int | None,
    start_seconds: float,
    step_model: str,
    kv_tokens: int | None,
    seed: int,
    picture: Path | None,
    output: str | None,
) -> None:
    """Play a load against the service of a YAML file, on a virtual clock.

    The autoscaler, the queue and the choice of replicas are those that serve; the engine's steps
    take the time that a model of them says. Prints replicas, queue, TTFT and cost over time.
    """
    from shoal.cli.manifests import load
    from shoal.cli.simulation.arrivals import drawn, length_of, parse_tokens, read_trace
    from shoal.cli.simulation.replica import ReplicaSettings
    from shoal.cli.simulation.report import (
        Price,
        as_text,
        over_time,
        plot,
        sample_data,
        summary,
    )
    from shoal.cli.simulation.step_model import parse_step_model
    from shoal.cli.simulation.world import Settings, Simulation

    service = _the_service(load(filenames), replicas_max)
    engine = service.spec.engine
    rng = random.Random(seed)
    if (arrivals is None) == (trace is None):
        raise UsageError("give either --arrivals PROCESS or --trace FILE")
    requests: Iterator[Arrival]
    if trace is not None:
        read = read_trace(trace, speed)
        if not read:
            raise UsageError(f"--trace {trace}: has no requests")
        length = duration if duration is not None else read[-1].at
        requests = (arrival for arrival in read if arrival.at <= length)
    else:
        assert arrivals is not None
        length = duration if duration is not None else length_of(arrivals) or DEFAULT_DURATION
        prompt = parse_tokens("--prompt-tokens", prompt_tokens)
        generated = parse_tokens("--output-tokens", output_tokens)
        requests = drawn(arrivals, length, prompt, generated, rng)
    if kv_tokens is None:
        sequence = engine.max_model_len or 2048
        blocks = engine.kv_cache_blocks
        kv_tokens = blocks * engine.block_size if blocks else engine.max_num_seqs * sequence
    replica = ReplicaSettings(
        model=parse_step_model(step_model),
        slots=min(engine.max_num_seqs, engine.max_batched_tokens),
        budget=engine.max_batched_tokens,
        kv_tokens=kv_tokens,
    )
    outcome = Simulation(service, Settings(replica, start_seconds, length), rng).run(requests)

    price = Price(service.spec.resources.gpus_per_node, service.spec.cost)
    figures = summary(outcome, price)
    if picture is not None:
        plot(outcome, f"{service.name}: {arrivals or trace}", picture)
    if output is not None:
        data = {"summary": figures, "samples": [sample_data(s) for s in outcome.samples]}
        click.echo(format_data(data, output))
        return
    click.echo(over_time(outcome))
    click.echo("")
    click.echo(as_text(figures))
    if service.spec.autoscaling is None:
        click.echo("replicas   are fixed: the service has no spec.autoscaling")


def _the_service(
    services: "list[InferenceService]", replicas_max: int | None
) -> "InferenceService":
    """The one service of the files, with another greatest number of replicas where given."""
    if len(services) != 1:
        names = ", ".join(service.name for service in services)
        raise UsageError(f"simulates one service at a time; the files have {names or 'none'}")
    (service,) = services
    if replicas_max is None:
        return service
    autoscaling = service.spec.autoscaling
    if autoscaling is None:
        raise UsageError("--replicas-max: the service has no spec.autoscaling; add it to the YAML")
    if replicas_max < autoscaling.min_replicas:
        raise UsageError(
            f"--replicas-max {replicas_max}: is less than spec.autoscaling.minReplicas, "
            f"{autoscaling.min_replicas}"
        )
    changes: dict[str, Any] = {"max_replicas": replicas_max}
    spec = service.spec.model_copy(update={"autoscaling": autoscaling.model_copy(update=changes)})
    return service.model_copy(update={"spec": spec})
