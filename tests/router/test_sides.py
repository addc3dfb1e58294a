"""Who meets which revision of a canary: by header, by user, by session."""

import asyncio

from bench.scripted_engine import Engine, byte_model
from shoal.api.routes import Pin


def engine(revision):
    return Engine(model=byte_model(revision, max_num_seqs=512))


PIN = Pin(header="x-team", value="search", revision="new")


def test_an_audience_goes_to_its_revision_whatever_the_weight(stage, run):
    """The header's value counts to the letter; without a replica of that revision nobody is held
    to it, and another header says nothing."""

    async def body():
        async with stage([engine("old"), engine("new")], weights={"old": 100}, pins=[PIN]) as s:
            headers = {b"x-team": b"search", b"x-other": b"search"}
            assert s.core.pinned("chat", headers.get) == "new"
            assert s.core.pinned("chat", {b"x-team": b"Search"}.get) is None
            assert s.core.pinned("chat", {}.get) is None
            await s.kill(1)
            await s.until(lambda: s.admitted == 1)
            assert s.core.pinned("chat", headers.get) is None

    run(body())


def test_users_and_sessions_keep_their_side(stage, run):
    """Whoever comes again meets the same revision; many share it by the weights."""

    async def body():
        async with stage([engine("old"), engine("new")], weights={"old": 70, "new": 30}) as s:
            sides = {}
            for who in range(40):
                for field in ("tenant", "session"):
                    asked = [s.ask([1, 2, who], **{field: f"{who}"}) for _ in range(3)]
                    await asyncio.gather(*(s.answer(generation) for generation in asked))
                    sides.setdefault(who, set()).update(g.revision for g in asked)
            assert all(len(side) == 1 for side in sides.values())
            new = sum(side == {"new"} for side in sides.values())
            assert 3 <= new <= 22

    run(body())
