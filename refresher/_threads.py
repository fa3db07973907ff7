"""Threads, used again and again: they go on when their callers don't."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypeVar

from .stores import mutex

_Answer = TypeVar("_Answer")

# How long a thread waits for more to do, by whether it's a daemon. If not, a process that ends waits as long.
_IDLE = {True: 5.0, False: 0.05}

_Run = Callable[[Callable[[], None]], None]

# Threads that have nothing to do at the moment, by whether they are daemons. A forked child has none of them.
_idle: dict[bool, list[SimpleQueue[_Run]]] = {True: [], False: []}
os.register_at_fork(after_in_child=lambda: _idle.update({True: [], False: []}))


def _work(run: _Run, *, daemon: bool) -> None:
    """Run what there is to run, until there has been nothing for a while."""
    runs: SimpleQueue[_Run] = SimpleQueue()

    def be_idle() -> None:
        with mutex:
            _idle[daemon].append(runs)

    while True:
        run(be_idle)
        del run  # what it held is not needed any more
        try:
            run = runs.get(timeout=_IDLE[daemon])
        except Empty:
            with mutex:
                if runs in _idle[daemon]:
                    _idle[daemon].remove(runs)
                    return
            run = runs.get()  # it's just being given


def in_thread(
    call: Callable[[], _Answer], tell: Callable[[_Answer | None, BaseException | None], object], *, daemon: bool
) -> None:
    """Call something in another thread, and *tell* what came of it: an answer, or an error."""

    def run(be_idle: Callable[[], None]) -> None:
        answer, failed = None, None
        try:
            answer = call()
        except BaseException as error:
            failed = error
        be_idle()  # now, because who is told may have more to do
        tell(answer, failed)

    with mutex:
        runs = _idle[daemon].pop() if _idle[daemon] else None
    if runs is not None:
        runs.put(run)
        return
    try:
        threading.Thread(
            target=_work, args=(run,), kwargs={"daemon": daemon}, name="refresher", daemon=daemon
        ).start()
    except RuntimeError:  # too many threads, or the interpreter is about to end
        run(lambda: None)


def within(seconds: float | None, call: Callable[[], _Answer]) -> _Answer:
    """
    Call something that may not keep to its time, in another thread. None: there is no hurry.

    Raises:
        TimeoutError: It isn't done. It goes on, and nobody is told.
    """
    if seconds is None:
        return call()
    told: SimpleQueue[tuple[_Answer | None, BaseException | None]] = SimpleQueue()
    in_thread(call, lambda *outcome: told.put(outcome), daemon=True)
    try:
        answer, error = told.get(timeout=seconds)
    except Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]  # without an error it is one
