"""
Uses a MemoryStore while exceptions come out of a signal handler, at any moment.

This has a process of its own, since logging and coverage break under it.
"""

from __future__ import annotations

import contextlib
import logging
import random
import signal
import sys
import time

from refresher.stores import MemoryStore


class Interrupted(Exception):  # noqa: N818
    """Comes out of the signal handler."""


def interrupt(*_):
    raise Interrupted


logging.getLogger("refresher").disabled = True
sys.unraisablehook = lambda _: None  # an interrupt of a callback
signal.signal(signal.SIGVTALRM, interrupt)
store = MemoryStore(maxsize=40)
count = 0
deadline = time.process_time() + 3  # however busy the machine is
while time.process_time() < deadline:
    with contextlib.suppress(Interrupted):
        signal.setitimer(signal.ITIMER_VIRTUAL, random.uniform(1e-6, 1e-4))
        for number in range(50_000):  # one that came in a callback is lost
            store.set(f"{number % 60}", "value", 60)
            store.get(f"{number % 60}")
            store.delete(f"{number % 7}")
    count += 1

for number in range(200):
    store.set(f"new-{number}", f"{number}", 60)
    assert store.get(f"new-{number}") == f"{number}"
part = store._sessions
assert {entry.key for entry in part.living()} == set(part._shelf) == set(store.keys())
assert len(part._shelf) == 40
assert not part._queue
print(count)
