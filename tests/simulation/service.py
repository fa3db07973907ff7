"""Kuzzle and Circle without sockets, the way to them, and what they know of each session: the truth."""

from __future__ import annotations

import json
import math
import random
import sys
from email.message import Message
from email.utils import formatdate
from typing import Any
from urllib.parse import urlsplit

from refresher.services import LOST, UNREACHED, Caller, Reply, Request, failure
from refresher.testing import Answer, Clock, FakeCircle, FakeKuzzle, Received

from . import judge
from .world import Event, Process, World

KUZZLES = ("http://kuzzle.test:7512", "http://other.test:7512")
CIRCLE = "https://api.circle.com"
API_KEY = "TEST_API_KEY:fake-id:fake-secret"


class Session:
    """A sign-in, and what came of it."""

    def __init__(self, server: Server, user: str, ttl: int, first: Any) -> None:
        self.server, self.user, self.ttl = server, user, ttl
        self.first = self.newest = first  # a jwt, or a UserToken
        self.secrets: dict[str, None] = {}  # all that a request may carry for it, and for no other
        self.pairs: dict[str, Any] = {}  # Circle's, by user token
        self.handed: list[Any] = []  # what callers got and the store had then
        self.asked_alike = True  # whether all callers ask for tokens of the same lifetime
        self.by_user_id = 0.0  # how many of its callers name the user, and not the user token
        self.calls: list[Any] = []
        self.refusals: dict[Any, list[float]] = {}  # by credential
        self.refused: list[tuple[float, float]] = []  # on machines with which clocks, and when
        self.signed_out = self.judged = False
        self.is_leaving = False  # whether its user wants to sign out
        self.spent_alone = False  # by who alone could not reach the store, and could announce nothing
        self.must_stay = False  # whether its service has refused to sign it out
        self.left_at = math.inf  # when that was done, as far as the core says
        self.exchanged = Event(server.world)  # the next time that it is
        self.forgotten_at = math.inf
        self.swallowed_at = -math.inf  # when a request was lost last, without a word
        self.disturbed_at = -math.inf  # when its service last was out of order for it
        self.spent_at = self.asked_at = 0.0
        self.departed_at = -math.inf
        self._begin(first)
        self.kept, self.kept_at = (
            True,
            0.0,
        )  # whether the newest token has ever been in the store, and since when

    def _begin(self, newest: Any) -> None:
        """Go on with a new token."""
        self.newest, self.kept = newest, False
        self.affirmed_at = -math.inf  # when somebody who has it was asked with the first token, and saw to the store
        self.receipts: dict[Process, float] = {}  # who got an answer with it, and when
        self.slept_before: dict[Process, float] = {}  # how long each of them had been suspended until then
        self.on_the_way: tuple[Process, float] | None = None  # who is to get one, and since when
        self.in_last_moments = False  # whether it was asked for when it had to be
        for secret in [newest] if isinstance(newest, str) else [newest.user_token, newest.refresh_token]:
            self.secrets[secret] = None
        if not isinstance(newest, str):
            self.pairs[newest.user_token] = newest

    @property
    def newest_secret(self) -> str:
        return self.secret_of(self.newest)

    def secret_of(self, token: Any) -> str:
        """Give what tells a token from the others of its session."""
        if isinstance(token, str):
            return token
        return token.refresh_token if self.server.rotates else token.user_token

    @property
    def is_circle(self) -> bool:
        return not isinstance(self.first, str)

    def succeed(self, newest: Any, in_last_moments: bool) -> None:
        """Its newest token was exchanged for another."""
        self._begin(newest)
        self.exchanged.set()
        self.exchanged = Event(self.server.world)
        self.in_last_moments, self.spent_at = in_last_moments, self.server.world.time
        self.asked_at = min(self.departed_at, self.spent_at)  # when that was asked for

    def left(self) -> float:
        """Tell for how many more seconds its newest access token is good."""
        return judge.expiry(self.newest) - self.server.world.wall()

    def is_alive(self, seconds: float = 0.0) -> bool:
        """Tell whether its newest token is good, and can be refreshed, for so many seconds more."""
        return not self.signed_out and self.server.can_refresh(self) and (self.is_circle or self.left() > seconds)


class _WorldClock(Clock):
    def __init__(self, world: World) -> None:
        super().__init__(0.0)
        self._world = world

    def __call__(self) -> float:
        return self._world.wall() + super().__call__()


class _Chance:
    """Stands in for the module `secrets` within the fakes: the same seed makes the same tokens."""

    def __init__(self, world: World) -> None:
        self._random = world.random

    def token_bytes(self, size: int = 32) -> bytes:
        return self._random.randbytes(size)

    def token_hex(self, size: int = 32) -> str:
        return self._random.randbytes(size).hex()

    token_urlsafe = token_hex


class Server:
    """A service, and the state that it is in."""

    def __init__(self, world: World, url: str) -> None:
        self.world, self.url = world, url
        kind: Any = FakeCircle if url == CIRCLE else FakeKuzzle
        sys.modules[kind.__module__].secrets = _Chance(world)  # type: ignore[attr-defined]
        # Whether each refresh yields a refresh token, too.
        self.rotates = url != CIRCLE or random.Random(world.seed + 3_000_003).random() < 0.8
        self.fake = kind(clock=_WorldClock(world), **({} if self.rotates else {"rotate": False}))
        self.trouble, self.trouble_until, self.disturbed_at = "", 0.0, -math.inf
        world.servers[url] = self

    def suffer(self, what: str, seconds: float) -> None:
        """Be out of order for a while."""
        self.trouble, self.trouble_until = what, self.world.time + seconds
        self.disturbed_at = max(self.disturbed_at, self.trouble_until + 1.0)  # for as long as it may say

    def troubled(self) -> str:
        """Tell what is the matter with it now."""
        return self.trouble if self.world.time < self.trouble_until else ""

    def sign_in(self, user: str, ttl: int, ago: float) -> Session:
        """Begin a session."""
        if self.url == CIRCLE:
            self.fake.clock.advance(-ago)
            first = self.fake.sign_in(user, "device-1")
            self.fake.clock.advance(ago)
        else:
            first = self.fake.login(user, f"{ttl}s", ago=ago)
        session = Session(self, user, ttl, first)
        self.world.sessions.append(session)
        return session

    def sign_out(self, session: Session) -> None:
        """End a session."""
        session.signed_out = True
        known = self.fake._pairs if session.is_circle else self.fake._sessions
        known.pop(getattr(session.newest, "refresh_token", session.newest), None)

    def can_refresh(self, session: Session) -> bool:
        if session.is_circle:
            return session.newest.refresh_token in self.fake._pairs
        return self.fake.knows(session.newest) and not self.fake._sessions[session.newest].refreshed

    def is_good(self, token: Any) -> bool:
        """Tell whether an access token would be accepted now."""
        return self.fake.knows(token)

    def act(self, request: Request) -> Answer:
        """Do what a request asks for."""
        headers, url = Message(), urlsplit(request.url)
        for name, value in {"Host": url.netloc, **request.headers}.items():
            headers[name] = judge.plain(value)
        cookies = "; ".join(f"{name}={judge.plain(value)}" for name, value in request.cookies.items() if value)
        if cookies:
            headers["Cookie"] = cookies
        return self.fake.receive(Received("POST", f"{url.path}?{url.query}", headers, judge.plain(request.body) or b""))

    def refuse(self) -> None:
        """Refuse the next request, for a reason that the user's rights are."""
        self.fake.fail_next(3 if self.url == CIRCLE else "security.rights.forbidden")


class Network:
    """Carries requests, and what comes back."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.next = ""  # what is to happen to the next request
        self.pending: list[_Mail] = []  # what was sent, and whose answer is awaited
        self.late_until = 0.0  # when the last late answer arrives

    def send(self, process: Process, request: Request, caller: Caller) -> Reply:
        """Carry out a request, as `Runtime.send` has to."""
        world = self.world
        world.step("send")
        session = judge.addressee(world, request)
        server, began = session.server, world.time
        judge.retry_after(world, process, session)
        self._connect(process, session, request, caller)
        world.step("depart")
        caller.depart()
        world.say(f"POST {session.user}: departs")
        judge.spending(world, process, session, request, began)
        sent_at, how, self.next = process.now(), self.next, ""
        process.departures += 1
        mail = _Mail(world, process, session, request)
        judge.departing(world, mail, self.pending)
        self.pending.append(mail)
        session.departed_at = world.time
        if how == "acts late":
            session.disturbed_at = world.time + 20.0
            wait = world.random.choice((0.5, 2.0, 5.0, 15.0))
            world.spawn(None, "service", lambda: (world.park(wait), mail.deliver("")))
        elif server.troubled().startswith("busy"):
            mail.turn_away()
        elif world.time < process.cut_off_until:  # it waits for long
            mail.lost_at = mail.due = world.time + 300.0
        else:
            mail.deliver(how)
        try:
            world.step("answer")
            self._await(mail, process, request, caller)
        finally:
            self.pending.remove(mail)
            session.departed_at = world.time
        return mail.open(sent_at)

    def _connect(self, process: Process, session: Session, request: Request, caller: Caller) -> None:
        world, server = self.world, session.server
        takes = world.random.uniform(0.001, 0.02)
        if server.troubled() == "slow to connect":
            takes = world.random.uniform(0.5, 5.0)
        elif server.troubled() == "unreachable":
            takes = 75.0
        is_cut_off = world.time < process.cut_off_until and not world.faults.swallowed
        refused = server.troubled() == "down" or is_cut_off
        if server.troubled():
            session.disturbed_at = world.time + takes
        done = process.steady() + takes
        while (left := min(done, caller.answer_by()) - process.steady()) > 0:
            world.park(max(0.001, min(left, 1.0)))
        if refused or takes == 75.0 or process.steady() < done:
            world.say(f"POST {session.user}: could not connect")
            world.jolt()
            raise failure(UNREACHED, request, reason="simulated")

    def _await(self, mail: _Mail, process: Process, request: Request, caller: Caller) -> None:
        """Wait for an answer, for as long as is asked for."""
        world = self.world
        while not mail.arrived():
            world.reading = True
            left = caller.answer_by() - process.steady()
            world.reading = False
            if left <= 0 or mail.is_lost():
                world.say(f"POST {mail.session.user}: no answer")
                world.jolt()
                if mail.is_lost() or world.time - mail.departed_at > 50.0:
                    mail.give_up()
                raise failure(LOST, request, reason="simulated")
            world.park(min(left, 0.5, max(0.001, mail.due - world.time)), mail.written)
            caller.idle()


class _Mail:
    """A request that was sent, and its answer."""

    def __init__(self, world: World, process: Process, session: Session, request: Request) -> None:
        self.world, self.process, self.session, self.request = world, process, session, request
        self.written, self.departed_at, self.slept_before = Event(world), world.time, process.asleep_for
        self.answer: Answer | None = None
        self.due = self.lost_at = math.inf
        self.not_before: float | None = None  # what its Retry-After means

    def arrived(self) -> bool:
        return self.answer is not None and self.due <= self.world.time

    def is_lost(self) -> bool:
        return self.lost_at <= self.world.time or (self.lost_at < math.inf and self.world.faults.healed)

    def deliver(self, how: str) -> None:
        """Let the service act, and its answer travel."""
        world, session, server = self.world, self.session, self.session.server
        if how and how != "request lost":
            session.disturbed_at = world.time
        self.due = world.time + world.random.uniform(0.004, 0.08)
        if how == "request lost":
            self._lose(acted=False)
        elif how == "fails":
            if world.random.random() < 0.5:
                self._act()
            self.answer = Answer(world.random.choice((500, 502, 504)), b"", _date(world))
        else:
            if how == "refused":
                server.refuse()
            self.answer = self._act()
            if how == "doubled":
                again = self._act()
                self.answer = again if world.random.random() < 0.5 else self.answer
        if how == "reply lost":
            self._lose(acted=True)
        elif how == "reply late":
            late = world.random.choice((1.0, 4.0, 12.0, 30.0, 70.0)) * world.random.uniform(0.7, 1.3)
            self.due, session.disturbed_at = self.due + late, world.time + late
            world.network.late_until = max(world.network.late_until, self.due)
        if self.brings_newest():
            session.on_the_way = (self.process, world.time)
        self.written.set()
        self.written = Event(world)  # from now on it is a matter of time

    def _act(self) -> Answer:
        answer = self.session.server.act(self.request)
        judge.exchange(self.world, self.process, self.session, self.request, answer)
        return answer

    def brings_newest(self) -> bool:
        """Tell whether the answer has the newest token in it."""
        return self.answer is not None and self.session.newest_secret in judge.content(self.answer)

    def _lose(self, *, acted: bool) -> None:
        """Let no answer come: the connection breaks, soon or never."""
        self.give_up()
        self.answer, self.lost_at = None, self.world.time + self.world.random.choice((0.0, 0.2, 2.0, 12.0, 300.0))
        self.due = self.lost_at
        if self.lost_at > self.world.time + 60.0 and not acted:  # it is sent again
            self.session.swallowed_at = self.world.time
        else:
            self.session.disturbed_at = self.lost_at  # it may be waited for

    def give_up(self) -> None:
        """Nobody waits for the answer any more."""
        if self.brings_newest():
            self.session.on_the_way = None

    def turn_away(self) -> None:
        """Let the service say that it is busy, and maybe until when."""
        world, server = self.world, self.session.server
        _, _, form = server.trouble.partition(", ")
        until, headers = server.trouble_until, _date(world)
        if form == "seconds":
            headers["Retry-After"] = f"{math.ceil(until - world.time)}"
        elif form == "date":
            headers["Retry-After"] = formatdate(world.epoch + until, usegmt=True)
            until -= (world.epoch + until) % 1.0
        self.not_before = until if form else None
        self.session.disturbed_at = world.time
        world.say(f"POST {self.session.user}: is busy, {headers}")
        self.answer = Answer(world.random.choice((429, 503)), b"{}", headers)
        self.due = world.time + world.random.uniform(0.004, 0.08)

    def open(self, sent_at: float) -> Reply:
        """Read the answer."""
        world, session, answer = self.world, self.session, self.answer
        assert answer is not None
        self.process.heard.setdefault(session.server.url, self.process.world.time)
        if self.brings_newest():
            if not session.is_circle:  # whose answer may be an old one
                self.process.told.add(session.server.url)
            session.receipts.setdefault(self.process, world.time)
            self.process.link(judge.plain(self.request.secret), session.newest)
            session.slept_before.setdefault(self.process, self.slept_before)
            session.on_the_way = None
        if self.not_before is not None:
            known = self.process.not_before.get(judge.scope(session), 0.0)
            self.process.not_before[judge.scope(session)] = max(known, self.not_before)
        judge.answered(world, self.process, session, self.request, answer)
        cookie = answer.headers.get("Set-Cookie", "").partition(";")[0].partition("=")
        return Reply(
            status=answer.status,
            headers=answer.headers,
            cookies={cookie[0]: cookie[2]} if cookie[1] else {},
            body=answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode(),
            requested_at=sent_at,
        )


def _date(world: World) -> dict[str, str]:
    return {"Date": formatdate(world.wall(), usegmt=True)}
