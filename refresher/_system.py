"""What Python and the operating system have: the clock that nobody sets, what it counts from, threads."""

from __future__ import annotations

import contextvars
import functools
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")

#: Whether this context makes do without threads.
threadless: contextvars.ContextVar[bool] = contextvars.ContextVar("threadless", default=False)


def find_clock() -> Callable[[], float]:
    """Find a clock that nobody sets. On Linux, there is one that goes on while the machine sleeps."""
    read, boottime = getattr(time, "clock_gettime", None), getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic if read is None or boottime is None else functools.partial(read, boottime)


def read_boot() -> str | None:
    """Name what that clock counts from. None if processes can't compare it on this system."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return None


def start_thread(work: Callable[[], None], *, daemon: bool) -> bool:
    """Run *work* in a thread, in the context of this one. Return whether there is one: there may be too many."""
    if threadless.get():
        return False
    outer, thread = sys.exception(), None
    try:
        thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), name="refresher", daemon=daemon)
        thread.start()
    except (RuntimeError, KeyError) as error:
        if is_of_signal(error):
            raise
        if (thread is None or thread.ident is None) and "thread" in str(error):
            return False
        # An interrupt of `start` is hidden by what that complains about then: a lock, or that the thread has begun.
        hidden = error.__context__
        raise (error if hidden is None or hidden is outer else hidden) from None
    return True


def is_of_signal(error: BaseException) -> bool:
    """Whether a signal handler of Python's raised an error, whatever that looks like."""
    handlers = filter(callable, map(signal.getsignal, signal.valid_signals()))
    functions: list[Any] = [getattr(each, "func", each) for each in handlers]  # of a functools.partial
    codes = [getattr(each, "__code__", None) or getattr(type(each).__call__, "__code__", None) for each in functions]
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


def fill(outcome: Future[_T], work: Callable[[], _T]) -> None:
    """Do *work*, and put down what comes of it."""
    try:
        outcome.set_result(work())
    except BaseException as error:
        outcome.set_exception(error)


def work_aside(work: Callable[[], _T], *, daemon: bool) -> Future[_T]:
    """Run *work* in a thread, or here if there are too many. Return what comes of it."""
    outcome = Future[_T]()
    run = functools.partial(fill, outcome, work)
    if not start_thread(run, daemon=daemon):
        run()
    return outcome
