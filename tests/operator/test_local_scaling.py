"""Autoscaling on this machine: real processes, a router that reports what a test wants."""

import asyncio

ZERO = {"minReplicas": 0, "maxReplicas": 3, "scaleToZero": {"idleSeconds": 3}}
QUICK = {"scaleDown": {"stabilizationWindowSeconds": 0}}


def say(machine, name, figure):
    """What the router reports of the service from now on."""
    path = machine.store.routes_dir / f"chat.{name}"
    path.write_text(str(figure))


def ready(machine, count):
    records = machine.store.pods("chat")
    return len(records) == count and all(record.ready for record in records)


def test_replicas_follow_the_queue_to_zero_and_back(machine, local_service):
    """A queue starts replicas, an idle service ends all, the first request starts one again."""

    async def story():
        machine.store.apply(local_service(autoscaling={**ZERO, "behavior": QUICK}))
        async with machine.running():
            await machine.until(lambda: ready(machine, 1), "the first replica")
            say(machine, "queued", 12)
            await machine.until(lambda: ready(machine, 3), "three replicas")
            status = machine.store.status("chat")["autoscaling"]
            assert (status["desired"], status["reason"]) == (3, "QueueDepthAboveTarget")
            say(machine, "queued", 0)
            say(machine, "idle", 61)
            await machine.until(lambda: ready(machine, 0), "no replica")
            condition = await machine.until_condition("chat", "Ready", "False")
            assert condition["reason"] == "ScaledToZero"
            assert "the next one starts a replica" in condition["message"]
            await machine.until_condition("chat", "ScalingActive")
            say(machine, "queued", 1)
            await machine.until(lambda: ready(machine, 1), "one replica for one request")
            await machine.until_condition("chat", "Ready")
        assert not [update for update in machine.updates if "Degraded=True" in update.message]

    asyncio.run(story())


def test_the_number_of_the_spec_is_the_first_one_only(machine, local_service):
    """Another one there later moves nothing: the load decides."""

    async def story():
        machine.store.apply(local_service(autoscaling={"maxReplicas": 3}))
        async with machine.running():
            await machine.until(lambda: ready(machine, 1), "the first replica")
            say(machine, "queued", 12)
            await machine.until(lambda: ready(machine, 3), "three replicas")
            machine.store.apply(local_service(replicas=2, autoscaling={"maxReplicas": 3}))
            generation = machine.store.get("chat").metadata.generation
            await machine.until(
                lambda: machine.store.status("chat")["observedGeneration"] == generation,
                "a plan for it",
            )
            assert ready(machine, 3)

    asyncio.run(story())


def test_replicas_zero_switches_it_off(machine, local_service):
    """spec.replicas 0 stands above the autoscaler, and another number hands over to it again."""

    async def story():
        machine.store.apply(local_service(autoscaling={"maxReplicas": 3}))
        async with machine.running():
            await machine.until(lambda: ready(machine, 1), "the first replica")
            machine.store.scale("chat", 0)
            await machine.until(lambda: ready(machine, 0), "no replica")
            condition = await machine.until_condition("chat", "ScalingActive", "False")
            assert condition["reason"] == "ScalingDisabled"
            machine.store.scale("chat", 1)
            await machine.until(lambda: ready(machine, 1), "a replica again")

    asyncio.run(story())
