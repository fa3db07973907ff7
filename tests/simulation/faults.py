"""What goes wrong, and when: each seed draws a few kinds of faults, and how many there may be."""

from __future__ import annotations

import math
import random

from .world import InterruptError, Process, Task, World

_STORE = (
    *(
        "store fails once",
        "store loses an answer",
        "store is down",
        "store is read-only",
        "store is full",
        "store hangs",
    ),
    *("store is flushed", "store evicts", "store is mixed up"),
)
_FOR_ONE = "store is down", "store hangs"  # which it may do for one process alone
_AT_SEND = ("service is down", "service is unreachable", "service is slow to connect", "service is busy")
_AT_DEPARTURE = (
    *("reply lost", "reply late", "request lost", "request acts late", "request doubled"),
    *("request refused", "request fails"),
)
KINDS = ("kill", "suspend", "interrupt", "end", "clock is set", "reboot", *_STORE, *_AT_SEND, *_AT_DEPARTURE)
# How much likelier than at a read of the store a fault is at the other effects, where more is at stake.
_WEIGHTS = {
    "get": 1,
    "wait": 3,
    "sleep": 5,
    "set": 15,
    "acquire": 8,
    "release": 8,
    "start": 15,
    "started": 15,
    "send": 20,
    "depart": 20,
    "answer": 20,
}


class Faults:
    """The faults of one world."""

    def __init__(self, world: World) -> None:
        self.world, self.random = world, random.Random(world.seed + 1_000_003)
        rng = self.random
        self.kinds = rng.sample(KINDS, rng.choice((0, 1, 1, 1, 1, 2, 2, 3)))
        if rng.random() < 0.1:  # who writes nothing down, and hears nothing
            self.kinds = [
                rng.choice(("store is down", "store is read-only", "store is full")),
                rng.choice(_AT_DEPARTURE),
            ]
        self.left = rng.randint(1, 4) if self.kinds else 0
        self.rate = rng.choice((0.003, 0.01, 0.03))
        # Half of all seeds aim: at one effect, at the end of a token's life, and then at whatever comes right after.
        self.aim, self.before, self.crowd, self.crowd_until = "", math.inf, 0.0, 0.0
        if self.kinds and rng.random() < 0.5:
            kind = self.kinds[0]
            self.aim = "send" if kind in _AT_SEND else "depart" if kind in _AT_DEPARTURE else rng.choice([*_WEIGHTS])
            self.before = rng.choice((math.inf, 60.0, 6.0, 3.0))
            self.rate, self.crowd = rng.choice((0.02, 0.1, 0.4)), rng.choice((0.0, 0.5, 5.0, 30.0))
        # Whether Circle's answers are lost one after another, and asked for when what they bring has expired.
        self.lose_pairs = random.Random(world.seed + 4_000_003).random() < 0.05
        if self.lose_pairs:
            self.kinds = ["reply lost", "reply lost", rng.choice(_AT_DEPARTURE), rng.choice(_AT_DEPARTURE + _STORE)]
            self.left, self.rate, self.aim, self.before = rng.randint(2, 12), 0.6, "depart", math.inf
        # Whether one process that is called all the time cannot reach any service for a while.
        self.cut_off = not self.lose_pairs and random.Random(world.seed + 5_000_003).random() < 0.03
        if self.cut_off:
            self.kinds, self.left = [], 0
        # It reaches them, and its requests are lost.
        self.swallowed = self.cut_off and random.Random(world.seed + 6_000_003).random() < 0.4
        # Whether the store is out of order for one process alone.
        self.partial = random.Random(world.seed + 7_000_003).random() < 0.4
        # Whether there are calls at once when something goes wrong.
        self.hurry = self.cut_off or random.Random(world.seed + 2_000_003).random() < 0.1
        self.happened: list[str] = []
        self.healed = False
        self._commands: dict[Process, str] = {}

    @property
    def are_late(self) -> bool:
        """Whether they strike in a token's last moments."""
        return self.before <= 6.0

    def heal(self) -> None:
        """Let nothing go wrong any more."""
        self.left, self.healed, self._commands = 0, True, {}
        world = self.world
        world.say("--- all is well from here on")
        world.network.next, world.store.trouble_until = "", 0.0
        for server in world.servers.values():
            server.trouble_until = 0.0
        for process in world.processes:
            process.asleep_until = min(process.asleep_until, world.time)

    def of_command(self, process: Process) -> str:
        """Tell what becomes of one command of the store."""
        return self._commands.pop(process, "")

    def strike(self, task: Task, effect: str, detail: str) -> None:
        """Maybe let something go wrong before an effect."""
        rate = self.rate if self.aim else self.rate * _WEIGHTS.get(effect, 2)
        if self.world.time < self.crowd_until:
            rate = 0.01 * _WEIGHTS.get(effect, 2)
        elif self.aim and self.aim != effect:
            return
        if task.process is None or self.random.random() >= rate:
            return
        if self.before < math.inf and not any(-1.0 < one.left() < self.before for one in self.world.sessions):
            return
        kind = self.random.choice(self.kinds)
        if (kind in _AT_SEND and effect != "send") or (kind in _AT_DEPARTURE and effect != "depart"):
            return
        if kind in _STORE and self.world.store.kind == "memory":
            return
        if kind in ("store is flushed", "store evicts") and self.world.store.kind == "file":
            return
        if kind == "reboot" and self.world.store.kind != "file":
            return
        callers = [task] if task.in_call else []
        if kind == "interrupt":
            callers = [one for one in self.world.tasks if one.in_call and one.name == "main" and not one.pending]
            if not callers:
                return
        self.left -= 1
        self.crowd_until = self.world.time + self.crowd
        self.happened.append(kind)
        self.world.say(f"*** {kind}, before: {effect} {detail[:8]}")
        self.world.jolt()
        self._blow(kind, task, callers)

    def _seconds(self) -> float:
        return self.random.choice((0.5, 3.0, 10.0, 40.0, 120.0)) * self.random.uniform(0.5, 1.5)

    def _blow(self, kind: str, task: Task, callers: list[Task]) -> None:
        """Do the damage."""
        world, rng, process = self.world, self.random, task.process
        assert process is not None
        server = rng.choice(list(world.servers.values()))
        if kind == "kill":
            process.end("killed")
            world.park(0)  # raises
        elif kind == "reboot":
            process.machine.reboot()
            world.park(0)  # raises
        elif kind == "suspend":
            process.suspend(self._seconds())
            world.park(0)
        elif kind == "end":
            process.leaving.set()
        elif kind == "interrupt":
            self._interrupt(task, rng.choice(callers))
        elif kind == "clock is set":
            process.machine.offset += rng.choice((-7200.0, -90.0, -5.0, 5.0, 90.0, 7200.0))
        elif kind in ("store fails once", "store loses an answer"):
            self._commands[process] = "fails" if kind == "store fails once" else "answer lost"
        elif kind == "store is flushed":
            world.store.flush()
        elif kind == "store evicts":
            world.store.evict()
        elif kind == "store is mixed up":
            world.store.swap()
        elif kind in _STORE:
            victim = process if self.partial and kind in _FOR_ONE else None
            world.store.suffer(kind.removeprefix("store "), self._seconds(), victim)
        elif kind == "service is busy":
            form = rng.choice(("busy", "busy, seconds", "busy, date"))
            server.suffer(form, min(60.0, self._seconds()))
        elif kind in _AT_SEND:
            server.suffer(kind.removeprefix("service is "), self._seconds())
        else:
            world.network.next = kind if kind.startswith("reply") or kind == "request lost" else kind[8:]

    def _interrupt(self, task: Task, caller: Task) -> None:
        error = self.random.choice((InterruptError, KeyboardInterrupt))()
        caller.in_call.interrupted = True
        if caller is task:
            raise error
        caller.pending, caller.due = error, self.world.time
        self.world.others_due = self.world.time
