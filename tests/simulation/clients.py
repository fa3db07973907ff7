"""Those who call the library: servers of several threads, auth objects, scripts that cron starts."""

from __future__ import annotations

import json
import math
import traceback
from datetime import timedelta
from email.utils import formatdate
from types import SimpleNamespace
from typing import Any

import requests
from greenlet import GreenletExit, getcurrent

from refresher import CircleAuth, KuzzleAuth, TokenCache, _rules, refresh_kuzzle_token, refresh_user_token
from refresher.errors import (
    OutcomeUnknownError,
    RefreshError,
    RequestRefusedError,
    SignInRequiredError,
    UnavailableError,
)
from refresher.stores import MemoryStore
from refresher.tokens import UserToken

from . import judge
from .service import API_KEY, CIRCLE, Session
from .store import StoreClient
from .world import InterruptError, Machine, Process, World


def start(world: World, name: str, machine: Machine, ahead: float | None = None) -> Process:
    """Start a process that has a cache."""
    process = Process(world, name, machine)
    memory = world.store.kind == "memory"
    store: Any = MemoryStore(timer=process.steady) if memory else StoreClient(world.store, process)
    process.cache = TokenCache(store, ahead=ahead, runtime=process)
    process.ahead = ahead or 0.0
    world.say(f"process {name} starts on {machine.name}")
    return process


class Call:
    """
    One call, from its start to what came of it. It is judged when it ends.

    Args:
        token: What it is made with: a jwt, or a UserToken.
        asked: The lifetime that it asks for, in seconds. None: what its session always had.
        retry: Whether there may be more than one attempt.
    """

    def __init__(
        self,
        process: Process,
        session: Session,
        token: Any,
        *,
        timeout: float | None,
        retry: bool,
        asked: int | None,
    ) -> None:
        self.world, self.process, self.session, self.token = process.world, process, session, token
        self.timeout, self.retry, self.asked = timeout, retry, asked
        self.began, self.asleep = self.world.time, process.asleep_for
        self.interrupted, self.ended = False, math.inf
        self.offset = process.machine.offset
        # Whether whoever calls can know of the newest token, and since when.
        self.knows = token == session.newest or process in session.receipts
        self.knows_since = process.first_use.setdefault(session.newest_secret, self.began)
        # Whether it can know a token's age: the clock is right, or it has heard what time it is at the service.
        off = any(one.machine.offset for one in self.world.processes) or "clock is set" in self.world.faults.happened
        # What was heard just now does not change an answer that is remembered for half a second.
        self.knows_time = not off or process.heard.get(session.server.url, math.inf) < self.began - 0.6
        session.calls.append(self)

    def slept(self) -> bool:
        """Tell whether the process was suspended meanwhile."""
        return self.process.asleep_for > self.asleep

    def make(self, how: Any) -> Any:
        """Call. Gives the token, if there was one."""
        task, world, process, session = getcurrent(), self.world, self.process, self.session
        task.in_call = self
        token, error = None, None
        try:
            token = how(self)
        except (InterruptError, KeyboardInterrupt):
            world.say("the call was interrupted")
        except RefreshError as raised:
            error = raised
        except GreenletExit:
            raise
        except BaseException as raised:
            world.say(traceback.format_exc())
            world.violated("an exception that is none of ours", f"{type(raised).__name__}: {raised}")
        finally:
            task.in_call, task.pending, self.ended = None, None, world.time
            self.knows_time = self.knows_time and process.machine.offset == self.offset
        took = world.time - self.began - (process.asleep_for - self.asleep)
        if self.timeout is not None and took > self.timeout + judge.SLACK:
            world.violated("outlasts its timeout", f"timeout={self.timeout:.2f}, took {took:.2f} s")
        if isinstance(error, SignInRequiredError):
            world.say(f"{session.user}: told to sign in: {error}")
            judge.told_to_sign_in(world, self)
        elif error is not None:
            world.say(f"{session.user}: timeout={self.timeout}: {type(error).__name__}: {error}")
            self._judge(error, took)
        judge.death(world, session)
        if token is not None:
            judge.handed_out(world, self, token)
            process.link(self.token, token)
            self._judge_lifetime(token, took)
        return token

    def _judge(self, error: RefreshError, took: float) -> None:
        if isinstance(error, (UnavailableError, OutcomeUnknownError)):
            if isinstance(error, OutcomeUnknownError):
                judge.unknown(self.world, self, error)
            judge.gave_up(self.world, self, error, took)
        elif not isinstance(error, RequestRefusedError) or "request refused" not in self.world.faults.happened:
            self.world.violated("a strange error", f"{type(error).__name__}: {error}")

    def _judge_lifetime(self, token: Any, took: float) -> None:
        """A call that asks for longer than others did gets a token that lives longer, if that is to be had soon."""
        patient = self.timeout is None or self.timeout >= 5.0
        if self.asked is None or not patient or self.world.faults.happened or self.session.is_leaving:
            return
        if took >= _rules.BRIEFLY:
            return
        if judge.life(token) >= self.asked - 1 or not self.session.is_alive():
            return
        self.world.violated("a shorter life than asked for", f"{judge.life(token):.0f} s instead of {self.asked}")


# Ways to call


def _by_user_id(session: Session) -> bool:
    """Draw whether a call names the user, and not the user token."""
    return session.by_user_id == 1.0 or session.server.world.random.random() < session.by_user_id


def by_function(call: Call) -> Any:
    """Call the function for the service."""
    session, process, token = call.session, call.process, call.token
    if session.is_circle:
        named: Any = {"user_token": token.user_token}
        if token == session.first and _by_user_id(session):
            named = {"user_id": session.user}
        return refresh_user_token(
            refresh_token=token.refresh_token, device_id="device-1", **named, api_key=API_KEY, base_url=CIRCLE,
            retry=call.retry, timeout=call.timeout, cache=process.cache,
        )  # fmt: skip
    return refresh_kuzzle_token(
        session.server.url, token, expires_in=f"{call.asked or session.ttl}s", queuable=call.retry,
        timeout=call.timeout, cache=process.cache,
    ).jwt  # fmt: skip


class InCookieMode:
    """Calls with the token in a cookie jar."""

    def __init__(self) -> None:
        self._jar = requests.Session()

    def held(self) -> str | None:
        """Tell what is in the jar."""
        return next((cookie.value for cookie in self._jar.cookies if cookie.name == "authToken"), None)

    def __call__(self, call: Call) -> Any:
        session, held = call.session, self.held()
        refresh_kuzzle_token(
            session.server.url, None if held else call.token, cookie_auth=True,
            expires_in=f"{call.asked or session.ttl}s", queuable=call.retry, timeout=call.timeout,
            cache=call.process.cache, session=self._jar,
        )  # fmt: skip
        return self.held()


class ByAuth:
    """Calls an auth object as requests does, with a request to be sent."""

    def __init__(self, process: Process, session: Session, timeout: float | None = 30.0) -> None:
        token: Any = session.first
        self._session, self._auth = session, None
        if isinstance(token, UserToken):
            named = {"user_id": session.user} if _by_user_id(session) else {"user_token": token.user_token}
            self._auth = CircleAuth(
                refresh_token=token.refresh_token, device_id="device-1", **named, api_key=API_KEY,  # type: ignore
                timeout=timeout, cache=process.cache,
            )  # fmt: skip
        else:
            self._auth = KuzzleAuth(
                session.server.url,
                token,
                expires_in=f"{session.ttl}s",
                timeout=timeout,
                cache=process.cache,
            )

    def held(self) -> Any:
        """Tell what it was made with."""
        return self._session.first

    def __call__(self, call: Call) -> Any:
        request = _Sent(self._session, call, call.began)
        self._auth(request)  # type: ignore[arg-type]
        response = request.answer()
        for hook in request.hooks["response"]:
            call.process.heard.setdefault(call.session.server.url, call.world.time)
            response = hook(response)
        return response.request.token()

    def sign_out(self, call: Call) -> None:
        """Sign its user out."""
        self._auth.sign_out()  # type: ignore[union-attr]
        call.session.left_at = call.world.time
        judge.has_left(call.world, call)


class _Sent:
    """What stands in for requests' prepared request."""

    body = None

    def __init__(self, session: Session, call: Call, since: float) -> None:
        self.session, self.call, self.since, self.headers = session, call, since, {}
        self.hooks: dict[str, list[Any]] = {"response": []}
        self.url = session.server.url + ("/v1/w3s/user" if session.is_circle else "/_me")

    def copy(self) -> _Sent:
        other = _Sent(self.session, self.call, self.since)
        other.headers = dict(self.headers)
        return other

    def token(self) -> Any:
        """Tell which token it carries: Circle's with the refresh token that goes with it."""
        session = self.session
        if not session.is_circle:
            return self.headers["Authorization"].removeprefix("Bearer ")
        sent = self.headers["X-User-Token"]
        return session.pairs.get(sent, UserToken(sent, None, None, sent, session.first.expires_at))

    def answer(self, **_: Any) -> Any:
        """Let the service look at it."""
        session = self.session
        is_good = session.server.is_good(self.token())
        began, self.since = self.since, session.server.world.time
        if not is_good and self.call.timeout is not None:
            self.call.timeout += self.since - began  # it refreshes once more
        refusal: Any = {"code": 155104} if session.is_circle else {"error": {"id": "security.token.invalid"}}
        return SimpleNamespace(
            status_code=200 if is_good else 401, content=b"{}" if is_good else json.dumps(refusal).encode(),
            headers={"Date": formatdate(session.server.world.wall(), usegmt=True)}, url=self.url, request=self,
            is_redirect=False, history=[], elapsed=timedelta(), close=lambda: None,
            connection=SimpleNamespace(send=lambda sent, **_: sent.answer()),
        )  # fmt: skip


# Who calls


def serve(process: Process, sessions: list[Session], until: float, how: str) -> None:
    """Be one thread of a server: call now and then, most often when a token is about to expire."""
    world, rng = process.world, process.world.random
    own = {session.user: [session.first] for session in sessions}
    ways: dict[str, Any] = {}
    for session in sessions:
        if how == "auth":
            ways[session.user] = ByAuth(process, session)
        elif how == "cookie" and not session.is_circle:
            ways[session.user] = InCookieMode()
    for _ in range(rng.randint(3, 9)):
        session = rng.choice(sessions)
        due = judge.window(session.newest)
        left = session.left()
        skip = left - due * 1.1 if rng.random() < 0.8 and left > due * 1.1 else 0.0
        if rng.random() < (0.8 if world.faults.are_late else 0.2):
            skip, due = left - rng.uniform(0.46, max(0.6, min(3.0, due / 8))), 0.0
        if world.faults.lose_pairs and rng.random() < 0.5:
            skip = left + rng.uniform(1.0, 600.0)
        world.park(max(0.0, skip) + rng.uniform(0.0, 0.25) * due, process.leaving)
        if world.time >= until or process.leaving.happened:
            break
        way = ways.get(session.user, by_function)
        pool = [*own[session.user], *(session.handed if world.store.kind != "memory" else [])]
        token = rng.choice((session.first, pool[-1], rng.choice(pool)))
        if way is not by_function:
            token = way.held() or token
        timeout = 30.0 if how == "auth" else rng.choice((0.3, 1.0, 5.0, 30.0, 30.0, None))
        asked = None
        if not session.is_circle and rng.random() < 0.15 and how != "auth":
            asked, session.asked_alike = max(2, rng.choice((session.ttl * 2, session.ttl // 2))), False
        retry = how == "auth" or rng.random() < 0.85
        call = Call(process, session, token, timeout=timeout, retry=retry, asked=asked)
        token = call.make(way)
        if token is not None:
            own[session.user].append(token)
    world.park(1e9, process.leaving)
    process.returned_at = world.time


def hurry(process: Process, sessions: list[Session], until: float) -> None:
    """Be one thread of a server that is called when something has just gone wrong."""
    world, rng = process.world, process.world.random
    for _ in range(10):
        if not process.leaving.happened:
            world.park(1e9, world.jolted)
        if world.time >= until or process.leaving.happened:
            break
        world.park(rng.choice((0.0, 0.001, 0.01, 0.1, 1.0)) * rng.random(), process.leaving)
        session, timeout = rng.choice(sessions), rng.choice((0.3, 5.0, 30.0))
        token = rng.choice((session.first, session.first, *session.handed))
        Call(process, session, token, timeout=timeout, retry=rng.random() < 0.85, asked=None).make(by_function)
    world.park(1e9, process.leaving)
    process.returned_at = world.time


def insist(process: Process, session: Session, until: float) -> None:
    """Be one thread of a server that is called all the time, and cannot reach any service when a token is due."""
    world, rng = process.world, process.world.random
    world.park(max(0.0, session.left() - rng.uniform(-5.0, 5.0)), process.leaving)
    if process.cut_off_until < 0.0:
        process.cut_off_until = world.time + rng.uniform(30.0, 90.0)
        world.faults.happened.append("process is cut off")
    while world.time < min(until, process.cut_off_until) and not process.leaving.happened:
        token = rng.choice((session.first, *session.handed))
        Call(process, session, token, timeout=rng.choice((5.0, 10.0)), retry=True, asked=None).make(by_function)
        world.park(rng.uniform(0.0, 1.0), process.leaving)
    world.park(1e9, process.leaving)
    process.returned_at = world.time


def serve_long(process: Process, session: Session, times: int, footprints: list[int]) -> None:
    """Refresh a session again and again, and tell what is remembered each time."""
    world = process.world
    token = session.first
    for _ in range(times):
        world.park(max(1.0, session.left() - world.random.uniform(5.0, 20.0)))
        call = Call(process, session, token, timeout=30.0, retry=True, asked=None)
        token = call.make(by_function) or token
        footprints.append(judge.footprint(process))
    process.returned_at = world.time


def run_once(process: Process, session: Session, timeout: float | None, results: list[Any]) -> None:
    """Be a script: one call, and the end."""
    call = Call(process, session, session.first, timeout=timeout, retry=True, asked=None)
    results.append(call.make(by_function))
    process.returned_at = process.world.time


def cron(world: World, machine: Machine, session: Session, period: float, until: float) -> None:
    """Start a script every so often."""
    number = 0
    while world.time < until:
        number += 1
        script = start(world, f"script {number}", machine, min(2 * period, session.ttl / 2))
        timeout = world.random.choice((5.0, 30.0, 30.0, None))
        world.spawn(script, "main", lambda s=script, t=timeout: run_once(s, session, t, []))
        world.park(period)


def leave(process: Process, session: Session) -> None:
    """Sign a user out, and try again if that fails."""
    world, rng = process.world, process.world.random
    if rng.random() < 0.25:
        _sign_out_by_hand(process, session)
    else:
        session.is_leaving, session.signed_out = True, session.signed_out or session.is_circle
        timeout = rng.choice((1.0, 5.0, 30.0, 30.0, None))
        auth = ByAuth(process, session, timeout)
        for _ in range(6):
            world.say(f"{session.user} signs out, timeout={timeout}")
            Call(process, session, session.first, timeout=timeout, retry=True, asked=None).make(auth.sign_out)
            session.refusals.clear()  # they are forgotten too
            if session.left_at < math.inf or process.leaving.happened:
                break
            world.park(rng.choice((0.1, 2.0, 30.0, 120.0)), process.leaving)
        if session.left_at < math.inf:
            world.say(f"{session.user} is signed out")
            session.forgotten_at = session.left_at
            world.spawn(None, "watcher", lambda: _watch(world, session))
    process.returned_at = world.time


def _watch(world: World, session: Session) -> None:
    """Look whether a session outlives its sign-out."""
    while True:
        if judge.outlives(world, session):
            world.park(2.0)
        else:
            world.park(1e9, session.exchanged)


def _sign_out_by_hand(process: Process, session: Session) -> None:
    """Sign a user out: end the session at the service, and forget it."""
    world = process.world
    session.server.sign_out(session)
    world.say(f"{session.user} signs out")
    names: Any = {"url": session.server.url, "jwt": session.first}
    if session.is_circle:
        names = {"refresh_token": session.first.refresh_token, "device_id": "device-1", "base_url": CIRCLE}
        names |= {"user_id": session.user} if _by_user_id(session) else {"user_token": session.first.user_token}
    try:
        process.cache.forget(**names)
    except (OSError, RefreshError, InterruptError) as error:
        world.say(f"could not forget: {error}")
    else:
        session.forgotten_at = world.time
