"""Canaries, blue and green, and swaps on this machine: real processes, fake engines, a router that
reports what a test wants."""

import asyncio
import json

from shoal.operator.platform import LOCAL
from shoal.operator.revision import revision_of

STEPS = [{"weight": 20, "pauseSeconds": 1}, {"weight": 100}]
ANALYSIS = {"intervalSeconds": 1, "minRequests": 20, "maxFailures": 2}


class Chat:
    """The service on a machine: its revisions, its table, what clients met."""

    def __init__(self, machine, local_service, **rollout):
        self.machine, self.make, self.rollout = machine, local_service, rollout
        self.counts = {}

    def apply(self, model, replicas=1):
        service = self.make(model=model, replicas=replicas, rollout=self.rollout)
        self.machine.store.apply(service)
        return revision_of(service.spec, LOCAL.pods)

    @property
    def status(self):
        return self.machine.store.status("chat") or {}

    @property
    def table(self):
        return self.machine.store.routes("chat")

    def ask(self, failing=()):
        """Requests by the table's weights."""
        for revision, weight in self.table.weights.items():
            requests, failed = self.counts.get(revision, (0, 0))
            bad = weight if revision in failing else 0
            self.counts[revision] = requests + weight, failed + bad
        path = self.machine.store.routes_dir / "chat.counts"
        new = path.with_suffix(".new")
        new.write_text(json.dumps(self.counts))
        new.replace(path)

    async def serves(self, revision):
        await self.machine.until(
            lambda: self.status.get("activeRevision") == revision, f"{revision} serves"
        )


async def asking(chat, failing=()):
    while True:
        chat.ask(failing)
        await asyncio.sleep(0.1)


def test_a_canary_is_judged_and_promoted_or_given_up(machine, local_service):
    """The analysis reads what the router counts; conditions and news tell of it."""

    async def story():
        chat = Chat(machine, local_service, canary={"steps": STEPS, "analysis": ANALYSIS})
        old = chat.apply("good")
        async with machine.running():
            await chat.serves(old)
            new = chat.apply("better")
            await machine.until(lambda: chat.table.weights == {new: 20, old: 80}, "the step")
            clients = asyncio.create_task(asking(chat))
            await chat.serves(new)
            clients.cancel()
            await machine.until(lambda: chat.table.weights == {new: 100}, "the old one is gone")
            bad = chat.apply("parent")
            await machine.until(lambda: chat.table.weights.get(bad) == 20, "the step")
            clients = asyncio.create_task(asking(chat, failing=(bad,)))
            await machine.until(lambda: chat.table.weights == {bad: 0, new: 100}, "weight 0")
            clients.cancel()
            await machine.until_condition("chat", "CanaryHealthy", "False")
            condition = await machine.until_condition("chat", "Progressing", "False")
            assert condition["reason"] == "CanaryFailed"
            assert "requests failed" in condition["message"]
            assert chat.status["activeRevision"] == new
            assert chat.status["canary"]["abortedTime"]

    asyncio.run(story())


def test_a_supervisor_that_is_killed_leaves_the_canary_where_it_was(machine, local_service):
    """The next one goes on from the status: the revision on trial is not promoted by a restart."""

    async def story():
        steps = [{"weight": 20, "untilPromoted": True}, {"weight": 100}]
        chat = Chat(machine, local_service, canary={"steps": steps})
        old = chat.apply("good")
        async with machine.running():
            await chat.serves(old)
            new = chat.apply("better")
            await machine.until(lambda: chat.status.get("canary", {}).get("stepTime"), "the step")
            status = chat.status
            revisions = machine.store.revisions("chat")
        # An orderly end forgets; what a killed one leaves is put back.
        machine.store.write_status("chat", status)
        machine.store.write_revisions("chat", revisions)
        async with machine.running():
            await machine.until(
                lambda: (
                    chat.table is not None
                    and {e.revision for e in chat.table.endpoints} == {old, new}
                ),
                "both revisions",
            )
            assert chat.table.weights == {new: 20, old: 80}
            assert chat.status["activeRevision"] == old

    asyncio.run(story())


def test_blue_and_green_switch_forth_and_back(machine, local_service):
    """A full second set, one switch; the way back starts no process."""

    async def story():
        chat = Chat(machine, local_service, strategy="BlueGreen", blueGreen={"keepSeconds": 600})
        old = chat.apply("good", replicas=2)
        async with machine.running():
            await chat.serves(old)
            new = chat.apply("better", replicas=2)
            await chat.serves(new)
            assert chat.table.weights == {new: 100, old: 0}
            names = {record.name for record in machine.store.pods("chat")}
            assert len(names) == 4
            wish = {"revision": old, "insteadOf": chat.status["specRevision"]}
            machine.store.patch("chat", {"spec": {"rollout": {"rollbackTo": wish}}})
            await chat.serves(old)
            assert {record.name for record in machine.store.pods("chat")} == names
            assert chat.table.weights == {new: 0, old: 100}

    asyncio.run(story())


def test_weights_are_swapped_in_running_processes(machine, local_service):
    """The same process serves the new revision; one that cannot is replaced, and it says why."""

    async def story():
        chat = Chat(machine, local_service, strategy="InPlace")
        old = chat.apply("good", replicas=2)
        async with machine.running():
            await chat.serves(old)
            before = {record.name: record.pid for record in machine.store.pods("chat")}
            new = chat.apply("better", replicas=2)
            await chat.serves(new)
            assert {r.name: r.pid for r in machine.store.pods("chat")} == before
            assert {e.revision for e in chat.table.endpoints} == {new}
            last = chat.apply("wide", replicas=2)
            await chat.serves(last)
            assert not {r.name for r in machine.store.pods("chat")} & before.keys()
            condition = await machine.until_condition("chat", "Progressing")
            assert "not in place: wide has other shapes" in condition["message"]

    asyncio.run(story())
