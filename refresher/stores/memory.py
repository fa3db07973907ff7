"""Entries in the memory of this process."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from weakref import WeakValueDictionary

from cachetools import TLRUCache

from ..errors import InvalidArgumentError

_log = logging.getLogger("refresher")
# How many entries that were read lately are passed over before one of them is dropped after all.
_CHANCES = 16
# The endings of keys whose entries never push out valid sessions.
_ASIDE = ("-alias", "-attempt", "-ended")


class _Entry:
    """A text, and when it expires."""

    __slots__ = ("__weakref__", "expires", "key", "used", "value")

    def __init__(self, key: str, value: str, expires: float) -> None:
        self.key = key
        self.value = value
        self.expires = expires
        self.used = False


class _Shelf(TLRUCache[str, _Entry]):
    """Keeps entries until they expire or have to make room."""

    def __init__(self, maxsize: int, timer: Callable[[], float]) -> None:
        super().__init__(maxsize, lambda _key, entry, _now: entry.expires, timer)
        self.dropped: list[str] = []

    def popitem(self) -> tuple[str, _Entry]:
        """Make room: drop an entry that was not used for long."""
        key, entry = super().popitem()
        for _ in range(_CHANCES):
            if not entry.used:
                break
            entry.used = False
            self[key] = entry
            key, entry = super().popitem()
        self.dropped.append(key)
        return key, entry


class _Part:
    """
    Entries of one kind. No method ever waits, so all may be called from a signal handler or a ``__del__``.

    Reading, writing or deleting an entry is one step on a dictionary with weak references. The shelf has the strong
    ones. Changes to the shelf are queued and made by a generator: Python does not resume one that is running, so two
    threads never change the shelf at once. If a generator was interrupted, another one puts all on a new shelf.
    """

    def __init__(self, maxsize: int, timer: Callable[[], float]) -> None:
        self._maxsize = maxsize
        self._timer = timer
        self._found: WeakValueDictionary[str, _Entry] = WeakValueDictionary()
        # An entry that is not on the shelf yet lives in here.
        self._queue: deque[tuple[str, _Entry | None]] = deque()
        self._shelf = _Shelf(maxsize, timer)
        # Which generator follows an interrupted one, or is the first one of a process.
        self._followers: dict[object, Iterator[list[str]]] = {}
        self._follow(os.getpid())

    def living(self) -> list[_Entry]:
        now = self._timer()
        entries = [reference() for reference in self._found.valuerefs()]
        return [entry for entry in entries if entry is not None and entry.expires > now]

    def get(self, key: str) -> str | None:
        entry = self._found.get(key)
        if entry is None or entry.expires <= self._timer():
            return None
        entry.used = True
        return entry.value

    def set(self, key: str, value: str, seconds: float) -> list[str]:
        """Write an entry. Returns the keys of valid ones that had to make room."""
        entry = _Entry(key, value, self._timer() + seconds)
        self._found[key] = entry
        self._queue.append((key, entry))
        return self._tidy()

    def delete(self, key: str) -> None:
        self._found.pop(key, None)
        self._queue.append((key, None))
        self._tidy()

    def _tidy(self) -> list[str]:
        dropped: list[str] = []
        while self._queue:
            process, tidier = self._current
            try:
                if process == os.getpid():
                    dropped += next(tidier)
                else:
                    self._follow(os.getpid())  # the thread that ran it may not exist in this child
            except StopIteration:
                self._follow(tidier)
            except ValueError:
                break  # it runs in another thread, or further up in this one, and will find the queue
        return dropped

    def _follow(self, last: object) -> None:
        self._current = os.getpid(), self._followers.setdefault(last, self._tidying())

    def _tidying(self) -> Iterator[list[str]]:
        """Work off the queue, each time. Yields the keys of valid entries that were dropped."""
        self._shelf = self._full_shelf()
        while True:
            while self._queue:
                self._put(self._queue[0][0])
                self._queue.popleft()
            dropped, self._shelf.dropped = self._shelf.dropped, []
            yield dropped

    def _full_shelf(self) -> _Shelf:
        shelf = _Shelf(self._maxsize, self._timer)
        for entry in self.living():
            shelf[entry.key] = entry
        return shelf

    def _put(self, key: str) -> None:
        entry = self._found.get(key)
        if entry is None or entry.expires <= self._timer():
            self._shelf.pop(key, None)
        else:
            self._shelf[key] = entry


class _Hold:
    """Who holds a lock, and until when."""

    def __init__(self, owner: str, ends: float) -> None:
        self.owner = owner
        self.ends = ends
        self._tickets = [None]

    def draw(self) -> bool:
        """Draw the right to replace this, which is given once."""
        try:
            return self._tickets.pop() is None
        except IndexError:
            return False


class MemoryStore:
    """
    Entries in the memory of this process. They are gone when it ends, and no other process sees them.

    A child that is forked starts with what its parent had. A pickled store is empty.

    Args:
        maxsize: How many sessions it holds. Beyond that, it drops those that have not been used for long, and
            logs each to ``refresher``. It holds as many entries again for spent tokens.
        timer: The clock, in seconds.

    Raises:
        InvalidArgumentError: *maxsize* is no integer or less than one, or *timer* no function.

    Example:
        >>> store = MemoryStore()
        >>> store.set("key", "value", 60)
        >>> store.get("key")
        'value'
    """

    def __init__(self, maxsize: int = 262_144, timer: Callable[[], float] = time.monotonic) -> None:
        if not isinstance(maxsize, int) or maxsize < 1:
            raise InvalidArgumentError("maxsize must be an integer, one or more")
        if not callable(timer):
            raise InvalidArgumentError("timer must be a function")
        self._arguments = maxsize, timer
        self._timer = timer
        self._sessions = _Part(maxsize, timer)
        self._others = _Part(maxsize, timer)
        self._locks: dict[str, _Hold] = {}
        self._process = os.getpid()

    def __repr__(self) -> str:
        return f"MemoryStore(maxsize={getattr(self, '_arguments', [None])[0]})"  # also in the middle of a complaint

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), self._arguments

    def _part(self, key: str) -> _Part:
        return self._others if key.endswith(_ASIDE) else self._sessions

    def get(self, key: str, /) -> str | None:
        """Return an entry. None if there is none, or it has expired."""
        return self._part(key).get(key)

    def set(self, key: str, value: str, seconds: int, /) -> None:
        """Write an entry that expires after *seconds*."""
        dropped_keys = self._part(key).set(key, value, seconds)
        del value  # who keeps the stack of a log line keeps what its frames have
        for dropped in dropped_keys:
            if not dropped.endswith(_ASIDE):
                _log.warning(
                    "MemoryStore is full: %s... was dropped before it expired. Raise maxsize, which is %d.",
                    dropped[:8],
                    self._arguments[0],
                )

    def delete(self, key: str, /) -> None:
        """Remove an entry, if it is there."""
        self._part(key).delete(key)

    def keys(self) -> list[str]:
        """List the keys of all entries that have not expired."""
        return [entry.key for part in (self._sessions, self._others) for entry in part.living()]

    def acquire(self, key: str, owner: str, lease: float, /) -> float:
        """Take a lock: 0.0 if *owner* has it now, otherwise the seconds that another's lease has left."""
        if self._process != os.getpid():
            self._process, self._locks = os.getpid(), {}  # who held them is not in this child
        now = self._timer()
        mine = _Hold(owner, now + lease)
        hold = self._locks.setdefault(key, mine)
        if hold is mine:
            return 0.0
        if hold.owner != owner and hold.ends > now:
            return hold.ends - now
        if not hold.draw():
            return 0.001  # somebody else is about to replace it
        self._locks[key] = mine
        return 0.0

    def renew(self, key: str, owner: str, lease: float, /) -> bool:
        """Restart a lock's lease. False if *owner* does not hold it any more."""
        now = self._timer()
        hold = self._locks.get(key)
        if hold is None or hold.owner != owner or hold.ends <= now or not hold.draw():
            return False
        self._locks[key] = _Hold(owner, now + lease)
        return True

    def release(self, key: str, owner: str, /) -> None:
        """Let others take a lock, if *owner* holds it."""
        hold = self._locks.get(key)
        if hold is not None and hold.owner == owner and hold.draw():
            del self._locks[key]
