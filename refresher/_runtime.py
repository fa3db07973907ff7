"""What comes from outside: clocks, chance, threads and the network. A simulation hands over another."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import random
import threading
import time
import uuid
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Generic, NoReturn, TypeVar

from ._system import find_clock, read_boot, start_thread
from .errors import UnavailableError

if TYPE_CHECKING:
    import requests

    from .services import Caller, Reply, Request


V = TypeVar("V")
HALF_A_DAY = 43_200.0
MOST = 262_144  # of a kind are remembered


class Memo(Generic[V]):
    """
    A dictionary that forgets what was not used for half a day, or while many others were put.

    No lock guards it: a signal handler, a ``__del__`` or another thread at any point leaves it usable.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._new: dict[str, V] = {}
        self._old: dict[str, V] = {}
        self._turned_at = clock()

    def get(self, key: str) -> V | None:
        """Return what is remembered, if anything is."""
        found = self._new.get(key)
        if found is None and (found := self._old.get(key)) is not None:
            found = self._new.setdefault(key, found)  # another thread may have put something newer there
        return found

    def put(self, key: str, value: V) -> None:
        """Remember something."""
        now = self._clock()
        if now - self._turned_at > HALF_A_DAY or len(self._new) >= MOST:
            self._old, self._new, self._turned_at = self._new, {}, now
        self._new[key] = value

    def drop(self, key: str) -> None:
        """Forget something."""
        self._new.pop(key, None)
        self._old.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        self._new, self._old = {}, {}

    def keys(self) -> set[str]:
        """List what is remembered."""
        return {*self._new, *self._old}


class Event:
    """Something that threads wait for. A signal handler may, too, in the middle of waiting for it."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[None] = SimpleQueue()
        self._has_happened = False

    def set(self) -> None:
        """Let it happen. Again changes nothing."""
        self._has_happened = True
        self._queue.put(None)

    def wait(self, seconds: float) -> bool:
        """Wait for it, for some seconds at most. Return whether it has happened."""
        if not self._has_happened:
            with contextlib.suppress(Empty):
                self._queue.get(timeout=seconds)
                self._queue.put(None)  # for whoever else waits
        return self._has_happened


_STEADY = find_clock()
# How long a thread that ends with its process waits for that, in seconds: about as long as a refresh goes on.
_LONGEST_WAIT = 60.0


def _is_ending(caller: threading.Thread) -> bool:
    """
    Whether a thread ends with its process, soon: a daemon does, if only our own threads keep that running, or none.

    Greenlets of gevent are not asked: one that is killed just then would leave the main thread for dead.
    """
    main = threading.main_thread()
    if not caller.daemon or type(caller).__module__ == "gevent.threading" or main.is_alive():
        return False
    return all(one is main or one.daemon or one.name == "refresher" for one in threading.enumerate())


class EndingError(UnavailableError):
    """The process is ending."""


class Runtime:
    """
    What the library needs of its surroundings: the operating system's clocks, threads and sockets.

    *Readings* never let another thread run. *Effects* may, may take their time, and anything may happen meanwhile.
    """

    def __init__(self) -> None:
        # Names what `steady` counts from: readings of one boot can be compared, also between processes.
        self.boot = read_boot() or str(uuid.uuid4())
        self._running: dict[object, int] = {}  # in which process: a forked child has none of its parent's threads
        self._over_at: float | None = None  # when nobody waits for anything any more
        atexit.register(self._end)

    def _end(self) -> None:
        """Wait for what was begun after Python had waited for its threads: a token may be on its way."""
        self._over_at = _STEADY()
        while os.getpid() in list(self._running.values()):
            time.sleep(0.01)

    # Readings

    def now(self) -> float:
        """Seconds since 1970, by a clock that may be wrong and may be set."""
        return time.time()  # looked up each time: freezegun and others replace it

    def steady(self) -> float:
        """Seconds by a clock that nobody sets."""
        return _STEADY()

    def pick(self, least: float, most: float) -> float:
        """Draw a number."""
        return random.uniform(least, most)  # noqa: S311 - no secret

    def new_name(self) -> str:
        """Make a name that nobody else has."""
        return os.urandom(8).hex()

    def process(self) -> int:
        """Return what tells this process from a child that it forked."""
        return os.getpid()

    def event(self) -> Event:
        """Make an event."""
        return Event()

    def caller(self) -> Callable[[], bool]:
        """Return what tells whether the calling thread is still there: daemon threads end with the process."""
        me = threading.current_thread()
        return lambda: not _is_ending(me)

    # Effects

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        time.sleep(seconds)

    def wait(self, event: Event, seconds: float) -> bool:
        """Wait for an event, for some seconds at most. Return whether it has happened."""
        return event.wait(max(0.0, min(seconds, threading.TIMEOUT_MAX)))

    def start(self, work: Callable[[], None], *, daemon: bool = False) -> None:
        """
        Run *work* in a thread of its own. A process that ends waits for it, unless it is a daemon.

        Raises:
            EndingError: The calling thread is a daemon whose process is ending: that may not wait for what begins now.
        """
        if daemon:
            start_thread(work, daemon=True)
        elif _is_ending(threading.current_thread()):
            self._wait_for_the_end()
        elif self._over_at is not None or not start_thread(functools.partial(self._wait_for, work), daemon=False):
            work()

    def _wait_for_the_end(self) -> NoReturn:
        """Wait until this thread ends with its process. If it does not, a handler of atexit may be waiting for it."""
        until = _STEADY() + _LONGEST_WAIT  # one of the others may wait for this one
        # A child of multiprocessing runs no handlers: it ends as soon as these have.
        while _STEADY() < until and any(one.is_alive() and not one.daemon for one in threading.enumerate()):
            time.sleep(0.05)
        self._over_at = self._over_at or _STEADY()
        time.sleep(max(0.0, self._over_at + 1.0 - _STEADY()))
        raise EndingError("The process is ending, so nothing was sent", spent=False)

    def _wait_for(self, work: Callable[[], None]) -> None:
        """Do something that the process waits for, also if Python has waited for its threads already."""
        if threading.main_thread().is_alive():
            return work()
        mark = object()
        try:
            self._running[mark] = os.getpid()
            if self._over_at is None:
                work()
        finally:
            self._running.pop(mark, None)

    def send(self, request: Request, *, session: requests.Session | None, caller: Caller) -> Reply:
        """
        Send a request once and read the reply.

        Args:
            request: What to send.
            session: Whose connections to use. None for our own.
            caller: Who waits for the reply.

        Raises:
            UnavailableError: Nothing was sent.
            OutcomeUnknownError: Something was sent, and no complete answer came.
        """
        from ._http import send

        return send(request, session=session, caller=caller, steady=self.steady)


REAL = Runtime()
