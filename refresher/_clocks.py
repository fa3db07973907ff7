"""The clock that nobody sets, and what it counts from."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path


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
