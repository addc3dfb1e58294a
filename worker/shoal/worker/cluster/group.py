"""What a pod knows of its group, from its environment; pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from shoal.api import names


class BadGroup(Exception):
    """The environment contradicts itself."""


@dataclass(frozen=True, slots=True)
class Group:
    """The pods that serve as one replica."""

    size: int  # pods
    member: int  # this pod; 0 leads
    leader: str  # its DNS name
    tensor: int
    pipeline: int
    gpus: int  # of each pod

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline

    @property
    def own_ranks(self) -> int:
        """Ranks that this pod takes: one a GPU, or one on its processors."""
        return max(1, self.gpus)


def read_group(environ: Mapping[str, str], role: str) -> Group:
    """The group of a pod that was started as `role`. Raises BadGroup."""
    group = Group(
        size=_number(environ, names.ENV_GROUP_SIZE, 1),
        member=_number(environ, names.ENV_GROUP_MEMBER, 0),
        leader=environ.get(names.ENV_LEADER_ADDRESS, ""),
        tensor=_number(environ, names.ENV_TENSOR_PARALLEL, 1),
        pipeline=_number(environ, names.ENV_PIPELINE_PARALLEL, 1),
        gpus=_number(environ, names.ENV_GPUS_PER_NODE, 0),
    )
    if group.member >= group.size:
        raise BadGroup(
            f"{names.ENV_GROUP_MEMBER}={group.member} is not in a group of "
            f"{names.ENV_GROUP_SIZE}={group.size} pods, which count from 0"
        )
    if (role == names.ROLE_LEADER) != (group.member == 0):
        raise BadGroup(f"member {group.member} cannot be the {role}: member 0 leads, others follow")
    if role == names.ROLE_FOLLOWER and not group.leader:
        raise BadGroup(f"a follower needs {names.ENV_LEADER_ADDRESS}, the leader's DNS name")
    if group.size > group.ranks:
        raise BadGroup(
            f"{names.ENV_GROUP_SIZE}={group.size} pods are more than the {group.ranks} ranks of "
            f"{names.ENV_TENSOR_PARALLEL}={group.tensor} x "
            f"{names.ENV_PIPELINE_PARALLEL}={group.pipeline}"
        )
    return group


def _number(environ: Mapping[str, str], name: str, least: int) -> int:
    text = environ.get(name, str(least))
    if not text.isdecimal() or int(text) < least:
        raise BadGroup(f"{name}={text!r} must be a whole number from {least}")
    return int(text)
