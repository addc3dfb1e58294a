"""Carries out what a look decided, as far as it goes.

First the plan's actions in their order, up to the first that fails: any prefix of a plan is safe.
The children come with the look that finds no action left, or none but what is only written down,
each by itself: neither a monitor that a webhook refuses nor a budget whose name is taken holds up a
drain, a route table or a replacement.
"""

import logging
from collections.abc import Awaitable, Collection
from typing import Final

from shoal.api.types import InferenceService
from shoal.operator.actions import (
    Action,
    CreatePod,
    ForgetRevision,
    SaveRevision,
    WriteRoutes,
)
from shoal.operator.kube.applier import Applier, Json, NotYet, Refused
from shoal.operator.kube.errors import ApiError
from shoal.operator.kube.outcome import Outcome

log: Final = logging.getLogger(__name__)

# They leave every pod as it is, and children are made for pods.
_RECORDS: Final = (WriteRoutes, SaveRevision, ForgetRevision)


class _Troubles:
    """What went wrong so far."""

    def __init__(self) -> None:
        self.refused: list[str] = []
        self.again: float | None = None
        self.error: ApiError | None = None

    async def survive(self, work: Awaitable[object]) -> bool:
        """Waits for the work; whether it went well."""
        try:
            await work
        except Refused as error:
            self.refused.append(str(error))
        except NotYet as error:
            log.info("%s", error)
            self.again = error.seconds
        except ApiError as error:
            self.error = self.error or error
        else:
            return True
        return False

    @property
    def unreachable(self) -> bool:
        return self.error is not None and self.error.status == 0


async def carry_out(
    applier: Applier,
    service: InferenceService,
    actions: Collection[Action],
    children: Collection[Json],
    *,
    group_token: bool,
) -> Outcome:
    """Performs `actions`; brings about `children` where these were no more than records.
    `group_token`: pods of a group share one, which is there before they are."""
    troubles, done = _Troubles(), 0
    adopted = False
    try:
        adopted = await applier.adopt(service)
    except ApiError as error:
        troubles.error = error
    if adopted or troubles.error is not None:
        # Nothing of the plan is done yet: the next look, over what is ours now, does it at once.
        return Outcome(acted=adopted, again=0.0 if adopted else None, error=troubles.error)
    groups = group_token and any(map(_joins_a_group, actions))
    if not groups or await troubles.survive(applier.ensure_group_token(service)):
        for action in actions:
            if not await troubles.survive(applier.perform(service, action)):
                break
            done += 1
    rejected = "; ".join(troubles.refused) or None
    recorded = done == len(actions) and all(isinstance(action, _RECORDS) for action in actions)
    if done and not recorded:
        return Outcome(True, rejected, again=troubles.again, error=troubles.error)
    troubles.refused.clear()
    for child in children:
        if troubles.unreachable:
            break
        await troubles.survive(applier.ensure(child))
    if not troubles.unreachable:
        await troubles.survive(applier.prune(service, children))
    missing = "; ".join(troubles.refused) or None
    return Outcome(bool(done), rejected, missing, troubles.again, troubles.error, recorded=done > 0)


def _joins_a_group(action: Action) -> bool:
    return isinstance(action, CreatePod) and action.pod.group_size > 1
