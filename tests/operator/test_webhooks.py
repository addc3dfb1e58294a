"""Somebody else's judgement of a canary: asked beside the looks, and what it changes."""

import asyncio
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from shoal.api.rollout import CanaryAnalysis
from shoal.operator.analysis import Analysis, Look, Opinion, Verdict, with_opinion
from shoal.operator.webhooks import Webhooks, post_question

QUESTION = {"service": "chat", "revision": "new", "stable": "old", "step": 0, "weight": 5}


def spec(url="http://judge/", **fields):
    return CanaryAnalysis.model_validate({"webhook": {"url": url, "timeoutSeconds": 1}, **fields})


@pytest.mark.parametrize(
    "verdict, opinion, after",
    [
        (Verdict.HEALTHY, Opinion(True), Verdict.HEALTHY),
        (Verdict.HEALTHY, None, Verdict.WAITING),
        (Verdict.HEALTHY, Opinion(False, "cold answers"), Verdict.FAILING),
        (Verdict.FAILING, Opinion(True), Verdict.FAILING),
        (Verdict.FAILING, None, Verdict.FAILING),
        (Verdict.FAILED, Opinion(True), Verdict.FAILED),
        (Verdict.WAITING, Opinion(False), Verdict.WAITING),
    ],
)
def test_an_opinion_can_hold_and_fail_and_never_promote(verdict, opinion, after):
    """The figures stand; a no fails a look, silence holds the step."""
    found = with_opinion(spec(), Analysis(), Look(verdict, "figures", Analysis()), opinion)
    assert found.verdict is after
    assert "figures" in found.message


def test_noes_in_a_row_end_the_canary():
    """maxFailures of them, as many as of the figures' own."""
    before = Analysis()
    for number in range(3):
        look = Look(Verdict.HEALTHY, "figures", Analysis())
        found = with_opinion(spec(maxFailures=3), before, look, Opinion(False, "wrong"))
        assert found.verdict is (Verdict.FAILED if number == 2 else Verdict.FAILING)
        assert found.message == "the webhook says no: wrong; figures"
        before = found.analysis


@contextmanager
def judge(status, body):
    """A server that answers so; yields its URL and what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    "status, body, opinion",
    [
        (200, b'{"healthy": true}', Opinion(True)),
        (200, b'{"healthy": false, "message": "cold"}', Opinion(False, "cold")),
        (200, b'{"healthy": "yes"}', None),
        (200, b"no json", None),
        (503, b'{"healthy": true}', None),
    ],
)
def test_an_answer_is_status_200_and_a_boolean(status, body, opinion):
    """Everything else is no answer."""
    with judge(status, body) as (url, asked):
        assert asyncio.run(post_question(url, QUESTION, 5.0)) == opinion
    assert asked == [QUESTION]


def test_a_look_never_waits_and_old_answers_are_none():
    """The first look has no answer, the next has it; silence makes it old; another revision is
    asked about anew."""
    now, said = [0.0], [Opinion(True)]

    async def post(url, question, seconds):
        await asyncio.sleep(0)
        return said[0]

    async def story():
        hooks = Webhooks(lambda: now[0], post)
        assert hooks.opinion("chat", spec(), QUESTION) is None
        await asyncio.sleep(0.01)
        assert hooks.opinion("chat", spec(), QUESTION) == Opinion(True)
        said[0] = None
        now[0] = 15.0
        assert hooks.opinion("chat", spec(), QUESTION) == Opinion(True)
        now[0] = 30.0
        await asyncio.sleep(0.01)
        assert hooks.opinion("chat", spec(), QUESTION) is None
        said[0] = Opinion(False)
        await asyncio.sleep(0.01)
        now[0] = 45.0
        assert hooks.opinion("chat", spec(), QUESTION) == Opinion(False)
        other = {**QUESTION, "revision": "third"}
        assert hooks.opinion("chat", spec(), other) is None
        hooks.clear()

    asyncio.run(story())
