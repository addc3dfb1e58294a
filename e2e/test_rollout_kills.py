"""SIGKILL of the supervisor at fifty random moments of a canary: it always ends right."""

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster.command import attached
from e2e.conftest import wait_until
from shoal.operator.local.store import Store
from shoal.operator.platform import LOCAL
from shoal.operator.revision import revision_of
from tests.operator.local_machine import service_of

KILLS = 50
CANARY = {
    "steps": [{"weight": w, "pauseSeconds": s} for w, s in ((20, 4), (60, 4), (100, 2))],
    "analysis": {"intervalSeconds": 1, "minRequests": 20, "maxFailures": 2},
}


class Watcher:
    """Looks at table and status all the time, and counts requests as a router would."""

    def __init__(self, store: Store) -> None:
        self.actives: list[str] = []
        self.wrong: list[dict[str, int]] = []
        self.bad = ""
        self._store, self._counts = store, dict[str, list[int]]()
        self._stop = threading.Event()

    @contextmanager
    def running(self) -> Iterator["Watcher"]:
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            table = self._store.routes("chat")
            status: dict[str, Any] = self._store.status("chat") or {}
            active = status.get("activeRevision")
            if active is not None and self.actives[-1:] != [active]:
                self.actives.append(active)
            if table is None:
                continue
            if table.weights and sum(table.weights.values()) != 100:
                self.wrong.append(table.weights)
            for revision, weight in table.weights.items():
                count = self._counts.setdefault(revision, [0, 0])
                count[0] += weight // 10
                count[1] += weight // 10 if revision == self.bad else 0
            new = self._store.routes_dir / "chat.new"
            if self._store.routes_dir.exists():
                try:
                    new.write_text(json.dumps(self._counts))
                    new.replace(new.with_suffix(".counts"))
                except OSError:
                    continue  # a supervisor that starts empties the folder


@pytest.mark.parametrize("good", [True, False], ids=["good", "failing"])
def test_killed_at_fifty_moments_of_a_canary(tmp_path: Path, good: bool) -> None:
    """A good revision is promoted once, a failing one never; weights always add up to 100."""
    store, rng = Store(tmp_path / "state"), random.Random(7)
    rollout = {"canary": CANARY, "drainSeconds": 5}
    old = service_of(model="good", replicas=2, rollout=rollout)
    new = service_of(model="better", replicas=2, rollout=rollout)
    first, second = (revision_of(one.spec, LOCAL.pods) for one in (old, new))
    store.apply(old)
    watcher = Watcher(store)
    watcher.bad = "" if good else second

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(attached(sys.executable, "-m", "e2e.supervised", str(tmp_path)))

    process = start()
    try:
        with watcher.running():
            wait_until(lambda: watcher.actives == [first], 60, "the first revision")
            store.apply(new)
            for _ in range(KILLS):
                time.sleep(rng.uniform(0.05, 4.0))
                process.kill()
                process.wait()
                process = start()

            def ended() -> bool:
                status: dict[str, Any] = store.status("chat") or {}
                table, active = store.routes("chat"), str(status.get("activeRevision"))
                canary = status.get("canary") or {}
                over = active == second if good else bool(canary.get("abortedTime"))
                ready = sum(p.ready and p.revision == active for p in store.pods("chat"))
                return over and ready == 2 and table is not None and table.weights[active] == 100

            wait_until(ended, 120, "one revision at full strength")
        assert watcher.wrong == []
        assert watcher.actives == ([first, second] if good else [first])
    finally:
        process.terminate()
        process.wait()
