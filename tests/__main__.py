"""
What CI runs on one Python, in less than five minutes: ``python -m tests``.

It lints, checks types for three platforms and runs the quick tests, side by side where pytest-xdist is installed. It
names the slow ones that it leaves out. ``pytest`` runs those too, and ``.ci/run`` also builds, installs and so on.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT = 300.0

# What waits for leases, kills processes, or starts servers and shells: a minute each, or nearly so.
SLOW = (
    "test_commands.py",
    "test_django.py",
    "test_faults.py",
    "test_processes.py",
    "test_real.py",
    "test_simulation.py",
    "test_stores.py",
)


def steps() -> dict[str, list[str]]:
    """List what is run, by name."""
    side_by_side = ["-n", str(min(os.cpu_count() or 1, 4))] if importlib.util.find_spec("xdist") else []
    left_out = [f"--ignore=tests/{name}" for name in SLOW]
    return {
        "lint": ["ruff", "check", "--quiet"],
        "format": ["ruff", "format", "--check", "--quiet"],
        **{f"types on {platform}": ["mypy", "--platform", platform] for platform in ("linux", "darwin", "win32")},
        "quick tests": ["pytest", "-q", "-r", "fE", *side_by_side, *left_out],
    }


def run(arguments: list[str], limit: float) -> str:
    """Run a module of this Python. Return what went wrong, after its output."""
    command = [sys.executable, "-m", *arguments]
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=limit
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        return f"{output.decode(errors='replace')}\nnot done in time"
    return "" if done.returncode == 0 else f"{done.stdout}\nexit status {done.returncode}"


def main(what: dict[str, list[str]]) -> int:
    """Run all steps, also after one that failed. Return 1 if any did."""
    start, failed = time.monotonic(), []
    for number, (name, arguments) in enumerate(what.items(), 1):
        print(f"[{number}/{len(what)}] {name} ... ", end="", flush=True)
        began = time.monotonic()
        trouble = run(arguments, max(1.0, LIMIT - (began - start)))
        print(f"{'FAILED' if trouble else 'ok'}, {time.monotonic() - began:.0f} s", flush=True)
        if trouble:
            failed.append(name)
            print(trouble, flush=True)
    print(f"Left out, as they are slow: {', '.join(SLOW)}. To run all tests: pytest")
    print(f"Failed: {', '.join(failed)}" if failed else f"All well, in {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(steps()))
