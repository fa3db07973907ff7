"""``python tests/simulation --schedules 1000`` looks for faults, ``--seed 7`` shows one schedule."""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time
from collections import Counter
from pathlib import Path

_HERE = Path(__file__).resolve().parent
sys.path[0] = str(_HERE.parent)
sys.path.append(str(_HERE.parent.parent))  # the working tree, if the library is not installed

from greenlet import getcurrent  # noqa: E402

from simulation.scenario import play  # noqa: E402
from simulation.world import Task  # noqa: E402


class _ToTrace(logging.Handler):
    """Puts what the core logs into the trace of its world."""

    def emit(self, record: logging.LogRecord) -> None:
        task = getcurrent()
        if isinstance(task, Task):
            task.world.say(f"    log: {record.getMessage()}")


def show(seed: int, last: int) -> int:
    """Play one schedule, and print what happens in it."""
    logger = logging.getLogger("refresher")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(_ToTrace())
    world = play(seed, keep_trace=True)
    print("\n".join([world.trace[0], *world.trace[1:][-last:]] if last else world.trace))
    return 1 if world.violation else 0


def search(first: int, schedules: int, *, stop: bool) -> int:
    """Play many schedules, and print what is wrong in them."""
    logging.getLogger("refresher").setLevel(logging.CRITICAL + 1)
    gc.disable()  # collected between schedules: what is collected must not run in the middle of one
    gc.freeze()
    started, counts, played = time.perf_counter(), Counter[str](), 0
    found: dict[str, list[tuple[int, int, int, str, str]]] = {}
    for seed in range(first, first + schedules):
        world = play(seed)
        played += 1
        counts += world.counts
        counts["faults"] += len(world.faults.happened)
        if world.violation is not None:
            kind, what = world.violation
            faults = " + ".join(sorted(set(world.faults.happened))) or "no fault"
            steps = world.counts["steps"]
            found.setdefault(kind, []).append((len(world.faults.happened), steps, seed, faults, what))
            if stop:
                break
        if seed % 20 == 0:
            gc.collect()
    took = time.perf_counter() - started
    for kind, cases in sorted(found.items(), key=lambda item: -len(item[1])):
        print(f"{len(cases):6} x {kind}")
        simplest: dict[str, tuple[int, int, int, str, str]] = {}
        for case in sorted(cases):
            simplest.setdefault(case[3], case)
        for _, steps, seed, faults, what in list(simplest.values())[:4]:
            print(f"         --seed {seed:6} ({steps} steps, {faults}): {what}")
    violations = sum(map(len, found.values()))
    print(
        f"{played} schedules, {counts['faults']} faults injected, {counts['exchanges']} exchanges, "
        f"{violations} sessions lost or rules broken, {played / took:.0f} schedules/s"
    )
    return 1 if found else 0


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python tests/simulation", description=__doc__)
    parser.add_argument("--schedules", type=int, default=1000, help="how many seeds to play")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--stop", action="store_true", help="stop at the first violation")
    parser.add_argument("--seed", type=int, help="play this one, and show it")
    parser.add_argument("--last", type=int, default=0, help="show only so many lines of it")
    parser.add_argument("--mutants", action="store_true", help="put known faults into the core, and look for them")
    parser.add_argument("--only", default="", help="only mutants whose name has this in it")
    given = parser.parse_args()
    if given.mutants:
        from simulation.mutants import hunt

        return hunt(given.schedules if given.schedules != 1000 else 20_000, given.only)
    if given.seed is not None:
        return show(given.seed, given.last)
    return search(given.first, given.schedules, stop=given.stop)


if __name__ == "__main__":
    raise SystemExit(main())
