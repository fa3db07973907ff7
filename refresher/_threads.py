"""Threads that are used again: where refreshes come in a row, starting them takes as long as all the rest."""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

Work = Callable[[], object]

# How many seconds a thread waits for more work, by whether it's a daemon. If not, a process that ends waits as long.
_IDLE = {True: 5.0, False: 0.02}
# How many seconds more, if somebody is about to give it some.
_PROMISED = 1.0


class _Crew:
    """
    Threads that have nothing to do at the moment.

    No lock guards it, so a signal handler, a ``__del__`` or an exception at any point leaves it usable.
    """

    def __init__(self, daemon: bool) -> None:
        self._daemon, self._idle, self._process = daemon, list[SimpleQueue[Work]](), os.getpid()

    def do(self, work: Work) -> None:
        if self._process != os.getpid():  # a forked child has none of its parent's threads
            self._idle, self._process = [], os.getpid()
        try:
            self._idle.pop().put(work)
        except IndexError:
            threading.Thread(target=self._run, args=(work,), name="refresher", daemon=self._daemon).start()

    def _run(self, work: Work | None) -> None:
        queue: SimpleQueue[Work] = SimpleQueue()
        while work is not None:
            work()
            work = None  # which may refer to a secret
            self._idle.append(queue)
            work = self._next(queue)

    def _next(self, queue: SimpleQueue[Work]) -> Work | None:
        with contextlib.suppress(Empty):
            return queue.get(timeout=_IDLE[self._daemon])
        with contextlib.suppress(ValueError):
            self._idle.remove(queue)
            return None
        with contextlib.suppress(Empty):  # unless whoever took it was interrupted
            return queue.get(timeout=_PROMISED)
        return None


_CREWS = {daemon: _Crew(daemon) for daemon in (False, True)}


def in_thread(work: Work, *, daemon: bool) -> None:
    """
    Do something in another thread. A process that ends waits for it, unless it is a daemon.

    Raises:
        RuntimeError: There are too many threads, or the interpreter is shutting down.
    """
    context = contextvars.copy_context()  # traces and request ids flow along
    _CREWS[daemon].do(lambda: context.run(work))
