"""One seed: who runs, for how long, what goes wrong, and whether all is well in the end."""

from __future__ import annotations

from typing import Any

from . import clients, judge
from .faults import Faults
from .service import CIRCLE, KUZZLES, Network, Server
from .store import SharedStore
from .world import Machine, Process, World

# For how many seconds tokens live.
_LIVES = {"": (2, 4, 8, 8, 16, 30, 60, 120, 3600), "late": (30, 120, 300, 3600), "scripts": (300, 3600)}


def play(seed: int, *, keep_trace: bool = False) -> World:
    """Play one schedule. What was found is in the world's *violation*."""
    world = World(seed, keep_trace=keep_trace)
    world.faults = Faults(world)
    world.store = SharedStore(world, world.random.choice(("redis",) * 4 + ("file",) * 3 + ("add",) + ("memory",) * 2))
    world.network = Network(world)
    world.say(f"seed {seed}, store {world.store.kind}, faults {world.faults.kinds}, at most {world.faults.left}")
    try:
        _play(world)
    finally:
        world.end()
    return world


def _machines(world: World) -> list[Machine]:
    """Make the machines. Most clocks are right, others are off by up to hours."""
    rng = world.random
    number = 1 if world.store.kind in ("file", "memory") else rng.randint(1, 2)
    offsets = (*(0.0,) * 8, 3.0, -3.0, 90.0, -90.0, 7200.0, -7200.0)
    return [Machine(world, f"machine {n + 1}", rng.choice(offsets)) for n in range(number)]


def _sign_in(world: World, scripts: bool) -> None:
    rng = world.random
    urls = rng.choice(((KUZZLES[0],), (KUZZLES[0],), KUZZLES, (CIRCLE,), (KUZZLES[0], CIRCLE)))
    is_circle = world.faults.lose_pairs or (world.faults.cut_off and rng.random() < 0.7)
    servers = [Server(world, url) for url in ((CIRCLE,) if is_circle else urls)]
    for number in range(1 if scripts else max(len(servers), rng.randint(1, 3))):
        server = servers[number % len(servers)]
        ttl = (
            3600
            if server.url == CIRCLE
            else rng.choice(_LIVES["scripts" if scripts else "late" if world.faults.are_late else ""])
        )
        ago = rng.uniform(0, ttl / 2) if ttl < 3600 else rng.uniform(3480, 3590)
        session = server.sign_in(f"user-{number}", ttl, rng.choice((ago, ago, 0.0)))
        session.by_user_id = 0.0 if not session.is_circle else 0.5 if world.faults.lose_pairs else rng.random() < 0.3


def _play(world: World) -> None:
    rng = world.random
    if rng.random() < 0.01:
        _play_long(world)
        _close(world)
        return
    machines = _machines(world)
    scripts = world.store.kind in ("file", "redis") and rng.random() < 0.4
    _sign_in(world, scripts)
    sessions = world.sessions
    longest = max(session.ttl for session in sessions)
    until = 2.5 * longest
    if scripts:
        period = rng.choice((60.0, 300.0)) if longest == 300 else rng.choice((300.0, 600.0, 1500.0))
        period = min(period, longest / 3)
        until = rng.randint(4, 14) * period
        world.spawn(None, "cron", lambda: clients.cron(world, machines[0], sessions[0], period, until))
    else:
        _start_servers(world, machines, until)
    if rng.random() < 0.3:
        _start_leaver(world, machines, until)
    world.run(until)
    world.faults.heal()
    _check_all(world, machines)
    _close(world)


def _start_servers(world: World, machines: list[Machine], until: float) -> None:
    rng, memory = world.random, world.store.kind == "memory"
    for number in range(1 if memory else rng.randint(1, 3)):
        _start_server(world, f"server {number + 1}", rng.choice(machines), until)
    if world.faults.cut_off and not memory:
        process, session = clients.start(world, "cut off", rng.choice(machines)), rng.choice(world.sessions)
        for number in range(3):
            world.spawn(process, f"insistent {number}", lambda: clients.insist(process, session, until))


def _start_leaver(world: World, machines: list[Machine], until: float) -> None:
    """Let somebody sign out, in one of the processes or in another."""
    rng = world.random
    session, at = rng.choice(world.sessions), rng.uniform(0.1, 0.8) * until

    def leave() -> None:
        world.park(at)
        if rng.random() < 0.2:  # when others are about to refresh it
            world.park(max(0.0, session.left() - rng.uniform(0.0, judge.window(session.newest) / 4)))
        elif rng.random() < 0.7 and world.park(until / 4, session.exchanged) and session.on_the_way is not None:
            holder, _ = session.on_the_way  # in the middle of a refresh
            if world.time < until and rng.random() < 0.5:
                holder.nap = rng.choice(("get", "set", "set", "wait")), rng.choice((1.0, 6.0, 20.0, 70.0, 90.0))
        alive = [process for process in world.processes if process.alive and not process.leaving.happened]
        process = rng.choice(alive) if alive and (world.store.kind == "memory" or rng.random() < 0.4) else None
        if world.time < until and (process or world.store.kind != "memory"):
            process = process or clients.start(world, "leaver", rng.choice(machines))
            world.spawn(process, "leaver", lambda: clients.leave(process, session))

    world.spawn(None, "user", leave)


def _start_server(world: World, name: str, machine: Machine, until: float) -> None:
    """Start a server, and another in its place when it has ended."""
    rng = world.random
    process = clients.start(world, name, machine, rng.choice((None, None, None, 5.0, 120.0)))
    for thread in range(rng.randint(1, 3)):
        how = rng.choice(("function", "function", "function", "auth", "cookie"))
        name_ = "main" if thread == 0 else f"thread {thread}"
        world.spawn(process, name_, lambda how=how: clients.serve(process, world.sessions, until, how))

    if world.faults.hurry:
        world.spawn(process, "hurried", lambda: clients.hurry(process, world.sessions, until))

    def replace() -> None:
        world.park(1e9, process.gone)
        world.park(rng.uniform(0.1, 5.0))
        if world.time < until:
            _start_server(world, name + "'", machine, until)

    if world.store.kind != "memory":
        world.spawn(None, "supervisor", replace)


def _play_long(world: World) -> None:
    """Let one server refresh one session for days, so that all that is kept for a day comes and goes."""
    [machine] = _machines(world)[:1]
    session = Server(world, world.random.choice((KUZZLES[0], CIRCLE))).sign_in("user-0", 3600, 0.0)
    process = clients.start(world, "server 1", machine)
    footprints: list[int] = []
    world.spawn(process, "main", lambda: clients.serve_long(process, session, 96, footprints))
    world.run(106 * 3600.0)
    if (process.returned_at or 0.0) > 86 * 3500.0:  # it was not refused again and again
        judge.growth(world, process, footprints)
    if session.is_circle and world.store.kind != "memory":  # Circle leads through all pairs to the newest one
        world.faults.heal()
        world.store.flush()
        newcomer, results = clients.start(world, "newcomer", machine), []
        world.spawn(newcomer, "main", lambda: clients.run_once(newcomer, session, 60.0, results))
        world.run(world.time + 61.0)
        # After a refused request, the key of the next one is known to the store alone.
        if results in ([], [None]) and "request refused" not in world.faults.happened:
            world.violated("does not work after a flush", session.user)


def _check_all(world: World, machines: list[Machine]) -> None:
    """See whether every session that is alive works in survivors, and for a newcomer."""
    survivors = [process for process in world.processes if process.alive and process.cache is not None]
    waits = [until for process in survivors for until in process.not_before.values()]
    hanging = min(world.store.hung_until, world.time + 12.0)  # no command hangs longer
    world.run(max(world.time + 0.1, world.network.late_until, hanging, *waits))
    for process in survivors[:3]:
        _check(world, process)
    if world.store.kind != "memory":
        _check(world, clients.start(world, "newcomer", machines[-1]))


def _check(world: World, process: Process) -> None:
    for session in world.sessions:
        if world.violation or not process.alive or not session.is_alive(3.0):
            continue
        results: list[Any] = []
        began = world.time
        excuse = judge.excuse(world, process, session, session.first)
        world.spawn(process, "check", lambda s=session, r=results: clients.run_once(process, s, 30.0, r))
        world.run(world.time + 31.0)
        if results in ([], [None]) and not excuse and session.disturbed_at <= began and not session.signed_out:
            world.violated("does not work after healing", f"{session.user} in {process.name}: {session.why}")


def _close(world: World) -> None:
    """Let all processes end."""
    world.closing.set()
    for process in world.processes:
        process.leaving.set()
    world.jolt()
    world.run(world.time + 95.0)  # the latest answer comes after 91
    for process in world.processes:
        left = [task for task in world.tasks if task.process is process and not task.daemon]
        if left:
            calling = any(task.in_call for task in left)
            world.violated("a call never returns" if calling else "cannot end", f"{process.name}, 95 s after it should")
