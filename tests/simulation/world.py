"""Virtual time, machines, processes, threads: one OS thread runs them all, a seed decides who goes next."""

from __future__ import annotations

import math
import random
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet

_MOST_SWITCHES = 40_000
EPOCH = 1_800_000_000  # where true time begins, in seconds since 1970


class InterruptError(Exception):
    """What a signal handler raises in a caller's thread, as Celery's SoftTimeLimitExceeded."""


class Event:
    """Something that threads wait for: what `Runtime.event` makes."""

    def __init__(self, world: World) -> None:
        self.world, self.happened = world, False

    def set(self) -> None:
        self.happened, self.world.others_due = True, -math.inf

    def is_set(self) -> bool:
        return self.happened


class Task(greenlet):
    """A thread of a simulated process, or (without one) something that the outside world does."""

    def __init__(self, world: World, process: Process | None, name: str, work: Callable[[], object], daemon: bool):
        super().__init__(self._run, world.main)
        self.world, self.process, self.name, self.work, self.daemon = world, process, name, work, daemon
        self.due, self.event = world.time, None
        self.in_call: Any = None  # the call that it is in the middle of: see clients.py
        self.pending: BaseException | None = None  # what is to be raised in it, once it goes on

    def _run(self) -> None:
        try:
            self.work()
        except GreenletExit:
            raise
        except BaseException as error:
            self.world.say(traceback.format_exc())
            self.world.violated("a thread died", f"{self.name}: {type(error).__name__}: {error}")


class World:
    """What a seed makes: time, tasks, and what goes wrong."""

    def __init__(self, seed: int, *, keep_trace: bool = False) -> None:
        self.seed, self.random = seed, random.Random(seed)
        self.main = getcurrent()
        self.time = 0.0
        self.epoch = EPOCH + self.random.random()
        self.tasks: list[Task] = []
        self.buried: list[Task] = []  # their stacks must not be unwound while the others run
        self.processes: list[Process] = []
        self.sessions: list[Any] = []
        self.servers: dict[str, Any] = {}  # by origin
        self.store: Any = None
        self.faults: Any = None
        self.trace: list[str] = []
        self.keep_trace = keep_trace
        self.violation: tuple[str, str] | None = None
        self.counts: Counter[str] = Counter()
        self.jolted = Event(self)  # the next time that something goes wrong
        self.closing = Event(self)  # happens when servers are to end
        self.until = -math.inf  # when the run ends
        self.others_due = -math.inf  # before that, none of the others can run
        self.looks = 0  # at the clock, since something last happened
        self.reading = False  # whether the core is in a function that must not switch

    def wall(self) -> float:
        """Tell the true time, which is that of the services."""
        return self.epoch + self.time

    def say(self, what: str) -> None:
        """Write a line of the trace."""
        if self.keep_trace:
            task = getcurrent()
            who = f"{task.process.name if task.process else ''}/{task.name}" if isinstance(task, Task) else ""
            self.trace.append(f"{self.time:10.3f}  {who:20} {what}")

    def violated(self, kind: str, what: str) -> None:
        """An invariant does not hold: the world ends, and the seed tells how."""
        if self.violation is None:
            self.say(f"VIOLATION {kind}: {what}")
            self.violation = (kind, what)

    def jolt(self) -> None:
        """Something has gone wrong just now."""
        self.jolted.set()
        self.jolted = Event(self)

    def spawn(self, process: Process | None, name: str, work: Callable[[], object], *, daemon: bool = False) -> Task:
        """Start a task."""
        task = Task(self, process, name, work, daemon)
        self.tasks.append(task)
        self.others_due = -math.inf
        return task

    def park(self, seconds: float, event: Event | None = None) -> bool:
        """Let the others run, for so long or until something happens. Tells whether it did."""
        task = getcurrent()
        if self.reading:
            raise AssertionError("an effect within a reading")
        process = task.process
        if process is not None and not process.alive:
            raise GreenletExit
        task.due, task.event = self.time + max(0.0, seconds), event
        self.looks = 0
        if not self._goes_on(task):
            self.main.switch()
        if process is not None and not process.alive:
            raise GreenletExit
        if task.pending is not None:
            error, task.pending = task.pending, None
            raise error
        return event is not None and event.happened

    def _goes_on(self, task: Task) -> bool:
        """Let time pass for a task, without a switch, if no other can run before it."""
        due = self._due(task)
        if not due < self.others_due or due > self.until or self.violation is not None:
            return False
        self.time = max(self.time, due)
        self.counts["switches"] += 1
        return self.counts["switches"] < _MOST_SWITCHES

    def _due(self, task: Task) -> float:
        """Tell when a task can run."""
        due = self.time if task.event is not None and task.event.happened else task.due
        process = task.process
        return process.asleep_until if process is not None and process.asleep_until > due else due

    def step(self, kind: str, detail: str = "") -> None:
        """Come by here before every effect: others may run first, and something may go wrong."""
        task = getcurrent()
        if task.process is not None and not task.process.alive:
            raise GreenletExit
        if self.reading:
            raise AssertionError("an effect within a reading")
        self.counts["steps"] += 1
        if task.process is not None and task.process.nap[0] == kind and not self.faults.healed:
            self.faults.happened.append("suspend")
            self.say(f"*** suspend, before: {kind} {detail[:8]}")
            (_, seconds), task.process.nap = task.process.nap, ("", 0.0)
            task.process.suspend(seconds)
            self.park(0)
        if self.faults.left:
            self.faults.strike(task, kind, detail)
        if self.random.random() < 0.5:
            self.park(0)

    def run(self, until: float) -> None:
        """Run what can be run till then."""
        self.until = until
        while self.violation is None:
            ready, soonest, now = [], math.inf, self.time
            for task in self.tasks:  # as `_due` does, many thousands of times
                due = now if task.event is not None and task.event.happened else task.due
                if task.process is not None and task.process.asleep_until > due:
                    due = task.process.asleep_until
                if due <= now:
                    ready.append(task)
                elif due < soonest:
                    soonest = due
            if not ready:
                if soonest > until:
                    self.time = max(self.time, until)
                    return
                self.time = soonest
                continue
            task = ready[0] if len(ready) == 1 else ready[int(self.random.random() * len(ready))]
            self.others_due = soonest if len(ready) == 1 else -math.inf
            self.counts["switches"] += 1
            if self.counts["switches"] > _MOST_SWITCHES:
                self.violated("never comes to rest", f"{task.name} of {task.process and task.process.name}")
            task.switch()
            if task.dead and task in self.tasks:
                self.tasks.remove(task)
                if task.process is not None:
                    task.process.end_if_done()

    def end(self) -> None:
        """Unwind all stacks. Whatever they try has no effect any more."""
        for process in self.processes:
            process.alive = False
        for task in [*self.tasks, *self.buried]:
            if not task.dead:
                task.process = task.process or Process(self, "nobody", Machine(self, "nowhere", 0.0), alive=False)
                task.throw(GreenletExit)


class Machine:
    """A computer: its clocks, which all of its processes share."""

    def __init__(self, world: World, name: str, offset: float) -> None:
        self.world, self.name, self.offset = world, name, offset
        self.boots, self.booted_at = 1, -world.random.uniform(100.0, 1e6)
        self.boot = f"{name}, boot 1"

    def reboot(self) -> None:
        """Start again: what ran is gone, and the steady clock starts anew."""
        for process in self.world.processes:
            if process.machine is self and process.alive:
                process.end("killed")
        self.boots, self.booted_at = self.boots + 1, self.world.time
        self.boot = f"{self.name}, boot {self.boots}"


class Process:
    """A simulated process. It is the core's `Runtime`: see refresher/_runtime.py for what is what."""

    def __init__(self, world: World, name: str, machine: Machine, *, alive: bool = True) -> None:
        self.world, self.name, self.machine, self.alive = world, name, machine, alive
        self.cache: Any = None
        self.ahead = 0.0  # how much earlier than usual it refreshes
        self.began_at, self.ended_at, self.how = world.time, math.inf, ""
        self.asleep_until, self.asleep_for = 0.0, 0.0
        self.cut_off_until = -math.inf  # it cannot reach any service
        self.nap = "", 0.0  # before which effect it is to be suspended, and for how long
        self.returned_at: float | None = None  # when the last of its callers had what it wanted
        self.groups: list[set[str]] = []  # tokens that it knows to be of one session
        self.leaving = Event(world)  # happens when it is to end, as soon as its calls have
        self.first_use: dict[str, float] = {}  # when each token was the newest for the first time in a call of it
        self.departures = 0  # how many requests it has sent
        self.gone = Event(world)
        self.heard: dict[str, float] = {}  # since when it knows the time of which services
        self.told: set[str] = set()  # and for certain, by a token of theirs
        self.wrote_at = -math.inf  # when it last wrote something into the store
        self.not_before: dict[Any, float] = {}  # Retry-After, by what it is about
        self.number = len(world.processes)
        self._threads = 0
        world.processes.append(self)

    # Readings

    @property
    def boot(self) -> str:
        return self.machine.boot

    def now(self) -> float:
        return self.world.wall() + self.machine.offset

    def steady(self) -> float:
        self.world.looks += 1
        self.world.time += 1e-7  # to look takes a moment
        if self.world.looks > 5_000:
            raise AssertionError("spins: it looks at the clock again and again, and waits for nothing")
        return self.world.time - self.machine.booted_at

    def pick(self, least: float, most: float) -> float:
        return self.world.random.uniform(least, most)

    def new_name(self) -> str:
        return f"{self.world.random.getrandbits(128):032x}"

    def process(self) -> int:
        return self.number

    def event(self) -> Event:
        return Event(self.world)

    def caller(self) -> Callable[[], bool]:
        return lambda: True  # a process that ends waits for all of its threads

    # Effects

    def sleep(self, seconds: float) -> None:
        self.world.step("sleep")
        self.world.park(seconds)

    def wait(self, event: Event, seconds: float) -> bool:
        self.world.step("wait")
        return event.happened or self.world.park(seconds, event)

    def start(self, work: Callable[[], None], *, daemon: bool = False) -> None:
        self.world.step("start")
        self._threads += 1
        self.world.spawn(self, f"{'helper' if daemon else 'flight'} {self._threads}", work, daemon=daemon)
        self.world.step("started")

    def send(self, request: Any, *, session: Any, caller: Any) -> Any:
        return self.world.network.send(self, request, caller)

    # What happens to it

    def end(self, how: str) -> None:
        """End, however: what it remembered is gone, and none of its tasks runs again."""
        world = self.world
        self.alive, self.ended_at, self.how = False, world.time, how
        self.gone.set()
        world.buried += [task for task in world.tasks if task.process is self]
        world.tasks = [task for task in world.tasks if task.process is not self]

    def suspend(self, seconds: float) -> None:
        """Do nothing for a while."""
        self.asleep_until = self.world.time + seconds
        self.asleep_for += seconds

    def link(self, *tokens: Any) -> None:
        """Let it know that tokens are of one session."""
        linked = {getattr(token, "refresh_token", token) for token in tokens}
        others = [group for group in self.groups if not group & linked]
        self.groups = [*others, linked.union(*(group for group in self.groups if group & linked))]

    def links(self, *tokens: Any) -> bool:
        """Tell whether it knows that."""
        linked = {getattr(token, "refresh_token", token) for token in tokens}
        return len(linked) == 1 or any(linked <= group for group in self.groups)

    def woke(self, seconds: float) -> bool:
        """Tell whether it was suspended so many seconds ago."""
        return self.asleep_until > self.world.time - seconds

    def end_if_done(self) -> None:
        """End when the last thread that is no daemon has."""
        world = self.world
        if not self.alive or any(task.process is self and not task.daemon for task in world.tasks):
            return
        self.end("normally")
        world.say(f"process {self.name} has ended")
        took = world.time - (self.returned_at or world.time) - self.asleep_for
        hangs = 60.0 if any(kind.startswith("store") for kind in world.faults.happened) else 0.0
        # What was sent is waited for, and what came is written down.
        if took > (70.0 if self.departures else 5.0) + hangs:
            world.violated("cannot end", f"{self.name} had its answer, and ended {took:.0f} s later")
