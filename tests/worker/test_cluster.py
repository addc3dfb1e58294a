"""The pods of a group: who they are, and what is refused before anything is loaded."""

import sys

import pytest

from shoal.worker.cluster.__main__ import main
from shoal.worker.cluster.group import BadGroup, read_group

GROUP = {
    "SHOAL_GROUP_SIZE": "2",
    "SHOAL_GROUP_MEMBER": "0",
    "SHOAL_LEADER_ADDRESS": "chat-abc12-0.chat-workers.team.svc",
    "SHOAL_TENSOR_PARALLEL": "1",
    "SHOAL_PIPELINE_PARALLEL": "1",
}


class Became(Exception):
    """The process is another one now."""


def become(program: str, arguments: list[str]) -> None:
    raise Became(arguments)


def test_a_leader_of_one_rank_becomes_the_worker() -> None:
    """The worker's flags go on as they are."""
    with pytest.raises(Became) as caught:
        main(["leader", "--model", "py://m", "--threads", "2"], GROUP, become)
    command = [sys.executable, "-m", "shoal.worker", "--model", "py://m", "--threads", "2"]
    assert caught.value.args[0] == command


@pytest.mark.parametrize("role", ["leader", "follower"])
def test_more_ranks_than_the_engine_has_are_refused(
    role: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both roles end with the sentence that names field, value and way out."""
    environ = GROUP | {"SHOAL_TENSOR_PARALLEL": "2", "SHOAL_PIPELINE_PARALLEL": "3"}
    environ["SHOAL_GROUP_MEMBER"] = "0" if role == "leader" else "1"
    assert main([role], environ, become) == 2
    said = capsys.readouterr().err
    assert "6 ranks (tensor 2 x pipeline 3)" in said
    assert "set tensor and pipeline to 1" in said


@pytest.mark.parametrize(
    ("role", "changes", "words"),
    [
        ("leader", {"SHOAL_GROUP_MEMBER": "1"}, "member 1 cannot be the leader"),
        ("follower", {}, "member 0 cannot be the follower"),
        ("leader", {"SHOAL_GROUP_MEMBER": "2"}, "not in a group of SHOAL_GROUP_SIZE=2"),
        ("leader", {"SHOAL_GROUP_SIZE": "two"}, "SHOAL_GROUP_SIZE='two'"),
        ("leader", {"SHOAL_TENSOR_PARALLEL": "0"}, "from 1"),
        (
            "follower",
            {"SHOAL_GROUP_MEMBER": "1", "SHOAL_LEADER_ADDRESS": ""},
            "SHOAL_LEADER_ADDRESS",
        ),
    ],
)
def test_a_contradictory_environment_is_named(
    role: str, changes: dict[str, str], words: str
) -> None:
    """The sentence says which variable."""
    with pytest.raises(BadGroup, match=words):
        read_group(GROUP | changes, role)


@pytest.mark.parametrize("arguments", [[], ["head"], ["follower", "--model", "m"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2 and the two ways to call it."""
    assert main(arguments, GROUP, become) == 2
    assert "usage:" in capsys.readouterr().err
