"""What Python and the operating system have: the clock that nobody sets, what it counts from, threads."""

from __future__ import annotations

import contextvars
import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")


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
    thread = None
    try:
        thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), name="refresher", daemon=daemon)
        thread.start()
    except (RuntimeError, KeyError) as error:
        if (thread is None or thread.ident is None) and type(error) is RuntimeError and "thread" in str(error):
            return False
        # An interrupt of `start` is hidden by what that complains about then: a lock, or that the thread has begun.
        is_hidden = isinstance(error, KeyError) or "lock" in str(error)
        raise ((error.__context__ if is_hidden else None) or error) from None
    return True


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
