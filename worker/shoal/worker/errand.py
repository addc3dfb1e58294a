"""Calls that another thread makes for the event loop."""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


def errand(
    call: Callable[[], T], clock: Callable[[], float] = time.perf_counter
) -> tuple[Callable[[], None], "asyncio.Future[tuple[T, float]]"]:
    """What another thread is to run (it does not raise), and what the running loop then has: the
    call's result, and the seconds that it took. The future raises what the call raises; once it is
    cancelled, the call is not made any more."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[tuple[T, float]] = loop.create_future()

    def settle(result: tuple[T, float] | Exception) -> None:
        if answer.done():
            return
        if isinstance(result, Exception):
            answer.set_exception(result)
        else:
            answer.set_result(result)

    def run() -> None:
        if answer.cancelled():
            return
        began = clock()
        result: tuple[T, float] | Exception
        try:
            result = call(), clock() - began
        except Exception as error:
            result = error
        with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            loop.call_soon_threadsafe(settle, result)

    return run, answer


async def in_own_thread(call: Callable[[], T], name: str) -> T:
    """The result of a call that may do to its thread what it likes, as none other ever uses it.
    The thread does not keep the process from ending."""
    run, answer = errand(call)
    threading.Thread(target=run, name=name, daemon=True).start()
    return (await answer)[0]
