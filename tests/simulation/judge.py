"""What must not happen: each function looks at one moment, knows the truth, and says what is wrong with it."""

from __future__ import annotations

import base64
import functools
import json
import math
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from refresher import RefreshError, _rules
from refresher.services import Request
from refresher.testing import Answer
from refresher.tokens import UserToken

from .world import Process, World

if TYPE_CHECKING:
    from .service import Session

SLACK = 0.25  # seconds that a call may take longer than its timeout
PAUSES = (60, 300, 3600)  # seconds between two questions about a dead session


@functools.lru_cache(maxsize=4096)
def _times(jwt: str) -> tuple[float, float]:
    known = json.loads(base64.urlsafe_b64decode(jwt.split(".")[1] + "=="))
    return known["iat"], known["exp"]


def expiry(token: Any) -> float:
    """Tell when an access token expires, in seconds since 1970."""
    return _times(token.user_token if isinstance(token, UserToken) else token)[1]


def life(token: Any) -> float:
    """Tell for how long an access token was issued."""
    issued, expires = _times(token.user_token if isinstance(token, UserToken) else token)
    return expires - issued


def content(answer: Answer) -> str:
    """Give the part of an answer that may have tokens in it."""
    body = answer.body.decode() if isinstance(answer.body, bytes) else json.dumps(answer.body)
    return body + answer.headers.get("Set-Cookie", "")


def window(token: Any, ahead: float = 0.0) -> float:
    """Tell how many seconds before its end a token is refreshed at the earliest."""
    return max(min(60.0, life(token) / 10), min(ahead, life(token) / 2))


def last_moments(token: Any, ahead: float = 0.0) -> float:
    """Tell how many seconds before its end a token may be refreshed though that cannot be written down."""
    return max(0.3, min(10.0, window(token, ahead) / 3))


def is_sign_out(request: Request) -> bool:
    """Tell whether a request is to end a session."""
    return request.url.endswith("/_logout")


def plain(secret: Any) -> Any:
    """Take a secret out of its wrapper."""
    return secret.reveal() if hasattr(secret, "reveal") else secret


def scope(session: Session) -> str:
    """Tell what a Retry-After is about: a service, with the one API key that all use."""
    return session.server.url


# What is sent


def addressee(world: World, request: Request) -> Session:
    """Find out whose a request is. It must carry what is theirs to their service, and nothing else."""
    sent = plain(request.secret)
    found = next((session for session in world.sessions if sent in session.secrets), None)
    if found is None:
        raise AssertionError("a request with a token that nobody has ever had")
    if not request.url.startswith(found.server.url + "/"):
        world.violated("sent to a stranger", f"{found.user}'s token to {request.url}")
    carried = " ".join([request.url, *map(str, map(plain, [*request.headers.values(), *request.cookies.values()]))])
    carried += (plain(request.body) or b"").decode()
    for other in world.sessions:
        if other is not found and any(secret in carried for secret in other.secrets):
            world.violated("another user's token was sent", f"{other.user}'s with {found.user}'s")
    return found


def retry_after(world: World, process: Process, session: Session) -> None:
    """What a service asked to be left alone by must leave it alone."""
    early = process.not_before.get(scope(session), 0.0) - world.time
    if early > 0.05:
        world.violated("Retry-After ignored", f"{session.user}: asked again {early:.1f} s too early")


def spending(world: World, process: Process, session: Session, request: Request, began: float) -> None:
    """Nothing is spent that cannot be kept, but in a token's last moments."""
    store = world.store
    if process.machine.offset and session.server.url not in process.told:
        return  # it cannot know what the last moments are
    if "clock is set" in world.faults.happened:
        return  # one of its two clocks must be wrong, and it cannot know which
    is_newest = request.spends and plain(request.secret) == session.newest_secret and not session.is_circle
    if is_newest and store.troubled() and store.trouble_since < began - 0.05:
        limit = last_moments(session.newest, process.ahead) + 1.5  # clocks are not known better than that
        limit += min(world.time - store.trouble_since, 10.0)  # what is slow to say no has to be asked the earlier
        if process.wrote_at < world.time - 15.0 and session.left() > limit and session.is_alive():
            world.violated("spent though it could not be kept", f"{session.user}: the store {store.trouble}")


def departing(world: World, mail: Any, pending: list[Any]) -> None:
    """Nobody spends what another is spending, or has spent long ago, if the store could tell."""
    process, session, secret, store = mail.process, mail.session, plain(mail.request.secret), world.store
    if is_sign_out(mail.request):
        return
    same = [one for one in pending if one.process is process and plain(one.request.secret) == secret]
    may_repeat = not session.is_circle and any(call.retry for call in session.calls if call.process is process)
    if same and may_repeat:  # a request that has had no answer for long is sent again, whoever has one on the way
        is_soon = expiry(secret) - world.wall() < 25.0 + abs(process.machine.offset)
        if all(world.time - one.departed_at >= (2.5 if is_soon else 10.0) for one in same):
            return
    # A pointer that leads to another user hides that two names are those of one session.
    is_known = session.forgotten_at == math.inf and "swapped" not in store.lost
    if same and is_known and not session.is_leaving:
        world.violated("two exchanges of one token", f"{session.user}: at once, by {process.name}")
    if session.in_last_moments:  # then whoever has the lock is passed by
        return
    if session.is_circle or session.signed_out or store.kind == "memory" or store.lost or process.machine.offset:
        return
    if store.hung_until > world.time - 20.0 or any(one.machine.offset for one in world.processes):
        return
    others = [one for one in pending if one.process is not process and plain(one.request.secret) == secret]
    for other in others:
        holder = other.process
        is_awake = holder.alive and holder.asleep_for == 0.0 == process.asleep_for
        was_well = not any(kind.startswith("store") for kind in world.faults.happened)
        is_later = secret == session.newest_secret and world.time - other.departed_at > 1.0
        left, urgent = session.left(), last_moments(session.newest, process.ahead) + 1.5
        # Neither may have passed the other's lock by, before it began to connect.
        slow = 5.0 if "service is slow to connect" in world.faults.happened else 0.0
        # A token's life counts from when it was asked for, however late it came.
        slow += max([*session.receipts.values(), session.asked_at]) - session.asked_at
        times = left, left + world.time - other.departed_at
        if is_awake and was_well and is_later and not any(-1.0 - slow <= one <= urgent + slow for one in times):
            world.violated("two exchanges of one token", f"{session.user}: at once")
    # Who was suspended a moment ago takes the store for one that hangs.
    known = session.kept and world.time - max(session.kept_at, process.asleep_until) > 3.0 and session.is_alive()
    if known and secret != session.newest_secret and not store.troubled() and store.well_since < world.time - 5.0:
        left = expiry(secret) - world.wall()
        if not -1.0 < left < _rules.LAST_MOMENTS + _rules.LONGEST_DELAY + 0.5:
            world.violated(
                "a spent token is spent again", f"{session.user}: {world.time - session.kept_at:.1f} s later"
            )


def exchange(world: World, process: Process, session: Session, request: Request, answer: Answer) -> None:
    """The service has acted. Note what it did."""
    if is_sign_out(request):
        is_newest = plain(request.secret) == session.newest_secret
        world.say(f"POST {session.user}: sign-out{'' if is_newest else ' of an old token'}, {answer.status}")
        session.signed_out |= answer.status == 200 and is_newest
        session.must_stay |= answer.status == 403
        return
    if answer.status != 200:
        world.say(f"POST {session.user}: refused, {answer.status}")
        if answer.status in (401, 404) and not world.faults.happened and session.is_alive():
            world.violated("two exchanges of one token", session.user)
        return
    if session.is_circle:
        data = answer.body["data"]  # type: ignore[index]
        if not request.spends:
            session.secrets[data["userToken"]] = None
            return
        new: Any = UserToken.from_dict({"refreshToken": plain(request.secret), **data})
        is_new = new.user_token not in session.pairs
    else:
        new = json.loads(answer.body)["result"].get("jwt")  # type: ignore[arg-type]
        new = new or answer.headers["Set-Cookie"].partition(";")[0].partition("=")[2]
        is_new = True
        if new == plain(request.secret):
            world.violated("exchanged in the second of its birth", f"{session.user}: the token came back, and dies")
    if not is_new:
        world.say(f"POST {session.user}: the answer to an earlier request")
        return
    world.counts["exchanges"] += 1
    left = session.left()
    world.say(f"POST {session.user}: exchanged, {left:.2f} s before its end")
    as_usual = (
        session.asked_alike
        and not session.is_leaving
        and not world.faults.happened
        and not any(p.machine.offset for p in world.processes)
    )
    if session.newest is not session.first and left > window(session.newest, process.ahead) + 1.25 and as_usual:
        world.violated("refreshed though it was fresh", f"{session.user}: {left:.1f} s before its end")
    session.spent_alone = process is world.store.victim and bool(world.store.troubled())
    session.succeed(new, left < last_moments(session.newest, process.ahead) + 0.5)


def answered(world: World, process: Process, session: Session, request: Request, answer: Answer) -> None:
    """An answer has arrived. A dead session may be asked about again after a minute, five, an hour."""
    refused = not is_sign_out(request) and (answer.status == 401 or (session.is_circle and answer.status == 404))
    happened = " ".join(world.faults.happened)
    if (
        not refused
        or session.is_alive()
        or any(word in happened for word in ("kill", "suspend", "boot", "store", "request", "interrupt"))
    ):
        return
    machine = process.machine
    session.refused.append((machine.offset, world.time))
    asked_with = plain(request.headers.get("X-User-Token", request.secret))
    key = asked_with, process if world.store.kind == "memory" else (machine.name, machine.boots)
    if not session.signed_out or -1.0 < session.left() < last_moments(session.newest, process.ahead) + 1.5:
        return
    is_waited_for = any(call.process is process and call.ended == math.inf for call in session.calls)
    if not is_waited_for or any(mail.session is session for mail in world.network.pending):
        return  # it is no verdict yet: there may be a successor
    times = session.refusals.setdefault(key, [])
    times.append(world.time)
    for before, after, pause in zip(times, times[1:], PAUSES, strict=False):
        # A verdict of a machine whose clock is far off takes the place of this one's, and is not believed here.
        theirs = [when for offset, when in session.refused if abs(offset - machine.offset) > _rules.CLOCKS_DIFFER]
        is_replaced = any(before - 2 * _rules.SETTLED < when < after for when in theirs)
        if not is_replaced and _rules.SETTLED + 0.5 < after - before < pause - 1:  # until then it may be no verdict yet
            world.violated("a dead session is asked about", f"{session.user}: {after - before:.0f} s after")


# What callers are told


def excuse(world: World, process: Process, session: Session, token: Any) -> str:
    """Tell why a process cannot know what became of a token. "" if it can, and *session.why* tells how."""
    session.why = ""
    if session.newest is session.first:
        session.why = "nothing has been spent yet"
    elif world.store.lost and not _could_tell_anyway(world, process, session, token):
        return "a fault took entries from the store"
    elif session.spent_alone and _is_still_alone(world, session):
        return "who had it could not reach the store, and the others could"
    elif session.is_circle:
        session.why = "Circle answers a repeated request as it did before"
    elif not session.receipts:
        if session.on_the_way is None:
            return "the answer was lost"
        holder, since = session.on_the_way
        if not holder.alive or world.time - since > 55.0 or holder.asleep_until > world.time:
            return "the answer is lost"
        session.why = "the answer is still on its way"
    elif process in session.receipts:
        session.why = "this very process has had its newest token"
    elif world.store.holds(session.newest_secret):
        session.why = "the store has its newest token"
    elif session.kept:
        session.why = "the store had its newest token, and it was removed"
    elif all(_could_not_keep(world, holder, since, session) for holder, since in session.receipts.items()):
        return "whoever had it could not keep it"
    else:
        session.why = "its newest token was not written down"
    return ""


def _is_still_alone(world: World, session: Session) -> bool:
    """Tell whether who spent a token without the store cannot have written the new one down."""
    is_well = not world.store.troubled() and world.store.well_since < world.time - 5.0
    return not is_well or not all(holder.alive for holder in session.receipts)


def _could_tell_anyway(world: World, process: Process, session: Session, token: Any) -> bool:
    """Tell whether what a fault took from the store was known elsewhere, or must have been put back by now."""
    if session.is_circle:
        return False
    if process in session.receipts and process.links(token, session.newest):
        return True
    was_put_back = token == session.first and world.store.lost_at < session.affirmed_at < world.time - 1.2
    return was_put_back and len(world.store.chains(session.secrets)) < 2


def _could_not_keep(world: World, holder: Process, since: float, session: Session) -> bool:
    """Tell whether nobody can help it that a process had a token and the store never got it."""
    store = world.store
    until = min(holder.ended_at, world.time)
    slept = holder.asleep_for - session.slept_before[holder]
    well_since = until if store.troubled() else min(store.well_since, until)
    troubled = max(0.0, well_since - since)  # for how long it could not be written, or an upper bound of that
    if holder.alive:  # it writes as soon as it can; what was asked for without the store is not announced there
        return slept > (1.0 if session.in_last_moments and troubled else 60.0) or (
            troubled > 55.0 and until - well_since < 20.0
        )
    if holder.how == "killed":
        return until - since < 2.0 + troubled + slept
    # It has ended by itself, and was to write until then.
    return session.in_last_moments or (troubled > until - since - 2.0 and store.trouble_since > session.asked_at - 2.0)


def told_to_sign_in(world: World, call: Any) -> None:
    """Somebody was told to sign in."""
    session, process = call.session, call.process
    has_left = session.is_leaving and (world.store.kind == "memory" or world.store.holds('"ended": true'))
    if session.is_alive(2.0) and not has_left and not excuse(world, process, session, call.token):
        world.violated(f"told to sign in: {session.why}", f"{session.user} is alive, {process.name} was told")


def death(world: World, session: Session) -> None:
    """A session in use, with its service in order, must not end because nobody refreshed it in time."""
    dead_for = -session.left()
    if session.judged or session.signed_out or session.is_leaving or session.is_circle or dead_for < 0:
        return
    session.judged = True
    died = world.time - dead_for
    due = 0.4 * min(60.0, (life(session.newest) - 1) / 10)
    # After a fault, only its service may keep a token from being refreshed in its last moments.
    # A token's last second may be over sooner than it seems: a service counts in whole ones.
    share = 1 / 8 if any(kind != "clock is set" for kind in world.faults.happened) else 1
    for call in session.calls:
        process = call.process
        last = share * min(due, process.ahead or due)
        undisturbed = died - due - 1
        knows_for = call.began - min(call.knows_since, session.receipts.get(process, call.began))
        if (
            call.began <= died - (1.5 if knows_for <= 1.2 else 1.05 if world.faults.happened else 0.45)
            and (call.began >= died - last or (call.ended > died - 0.1 and last > 0.5))
            and call.knows
            and call.knows_time
            and (call.timeout is None or call.timeout > 1.0)
            and not call.interrupted
            and (call.retry or not any(kind.startswith("store") for kind in world.faults.happened))
            and max(session.disturbed_at, session.server.disturbed_at) < undisturbed
            and (session.swallowed_at == -math.inf or call.began < died - 1.5 > session.swallowed_at + 2.5)
            and process.ended_at > died
            and process.asleep_for == call.asleep
            and process.cut_off_until < undisturbed
            and (process in session.receipts or world.store.disturbed_at < undisturbed)
            and (process in session.receipts or world.store.hung_until < undisturbed - 30.0)
            and (world.store.hung_until < call.began or call.began <= died - 2.5)  # after a second, it is passed by
            and (not world.store.lost or process.links(call.token, session.newest))
        ):
            early = f"{process.name} called {died - call.began:.2f} s before its end"
            world.violated("let die", f"{session.user}, {session.ttl} s: {early}")
            return


def has_left(world: World, call: Any) -> None:
    """A sign-out says that it is done. It has to wait for others who are refreshing the token."""
    session, store = call.session, world.store
    if not session.is_alive() or session.must_stay or store.lost or store.disturbed_at > call.began - 60.0:
        return
    if session.spent_at > world.time - 55.0 and not session.kept:
        mails = [mail for mail in world.network.pending if mail.session is session and mail.brings_newest()]
        holders = {*session.receipts, *(mail.process for mail in mails)} - {call.process}
        # Who was suspended has lost the lock, and signs out later what it has.
        if any(holder.alive and holder.asleep_until < session.spent_at for holder in holders):
            world.violated("does not wait for a refresh", f"{session.user} has left, and has a new token since then")


def outlives(world: World, session: Session) -> bool:
    """Tell whether a session is still alive that was signed out. Once all is quiet, it must not be."""
    if not session.is_alive():
        return False
    if session.must_stay:
        return True
    server, store, holders = session.server, world.store, session.receipts
    rests = [session.left_at, session.disturbed_at, server.disturbed_at, store.disturbed_at, store.lost_at]
    rests += [*holders.values(), *(holder.asleep_until for holder in holders)]
    is_on_the_way = any(mail.session is session for mail in world.network.pending) or session.on_the_way is not None
    if is_on_the_way or world.time - max(rests) < 15.0 or store.lost or not holders:
        return True
    if not all(_could_not_end(world, holder, since, session) for holder, since in holders.items()):
        names = ", ".join(f"{holder.name} ({holder.how or 'alive'})" for holder in holders)
        world.violated("outlives its sign-out", f"{session.user}, {session.left():.0f} s left, {names} had the token")
    return True


def _could_not_end(world: World, holder: Process, since: float, session: Session) -> bool:
    """Tell whether nobody can help it that a process had a token of a session that was signed out."""
    if holder.alive:
        return world.store.well_since - since > 55.0
    return _could_not_keep(world, holder, since, session)


def handed_out(world: World, call: Any, token: Any) -> None:
    """A call has got a token: it must be of this user, and work."""
    session = call.session
    secret = session.secret_of(token)
    if secret not in session.secrets:
        world.violated("another user's token was handed out", f"to {session.user}")
        return
    _note_affirmed(world, call, secret)
    world.say(f"{session.user}: got a token{'' if secret == session.newest_secret else ', not the newest'}")
    if session.server.is_good(token) or call.slept() or not call.knows_time or call.process.woke(2.0):
        if token == session.newest and session.kept and token not in session.handed:
            session.handed.append(token)
        return
    if session.signed_out:
        is_known = call.began > session.forgotten_at + 1.0 and not session.is_circle  # Circle has no sign-out
        if is_known and not world.faults.happened:
            world.violated("handed out after it was forgotten", session.user)
        return
    stale = expiry(token) <= world.wall() - 1.0  # a service's clock is known to the second
    happened = " ".join(world.faults.happened)
    was_well = "store" not in happened and not (session.is_circle and "suspend" in happened)
    is_spent = session.kept and secret != session.newest_secret
    if stale or (is_spent and was_well and world.time - session.kept_at > 2.5):
        world.violated(
            "a dead token was handed out", f"{session.user}: {'it had expired' if stale else 'it was spent'}"
        )


def _note_affirmed(world: World, call: Any, secret: str) -> None:
    """Whoever has the newest token looks into the store after half a second, and puts back what is not there."""
    session, process, store = call.session, call.process, world.store
    is_newest = secret == session.newest_secret and process in session.receipts and call.token == session.first
    looked = store.lost_at < call.began - 1.0 and store.disturbed_at < call.began - 1.0
    if is_newest and looked and process.links(session.first, secret):
        session.affirmed_at = world.time


def unknown(world: World, call: Any, error: RefreshError) -> None:
    """A call says that something may have been spent: somebody must have sent something, or have the lock."""
    locked_until = max([until for _, until in world.store.locks.values()] + [world.store.released_at])
    long_ago = call.began - 100.0 - call.process.asleep_for
    is_sent = error.status is not None or call.session.departed_at > long_ago or world.network.pending
    # Who went ahead without the lock does not know how it stands with the one who had it. Who has signed out may meet
    # a refresh that began before.
    is_over = call.session.is_leaving or call.session.signed_out
    if not is_sent and locked_until < long_ago and not (world.store.lost or is_over):
        world.violated("an outcome is unknown though nothing was sent", call.session.user)
    call.session.refusals.clear()  # that was no verdict
    has_time = call.timeout is None or call.timeout >= (30.0 if world.faults.swallowed else 15.0)
    could_ask = has_time and call.process.cut_off_until < call.began and not call.slept() and call.session.is_alive()
    could_ask = could_ask and (call.session.is_circle or not world.faults.swallowed)
    if world.faults.cut_off and could_ask and not call.session.is_leaving and error.status is None:
        world.violated("waits for a process that cannot reach the service", f"{call.session.user}: {error}")


def gave_up(world: World, call: Any, error: Any, took: float) -> None:
    """A call has failed. It must have used its time, if trying again was allowed."""
    session = call.session
    if call.interrupted or not call.retry or error.status not in (None, 429, 502, 503, 504) or call.slept():
        return
    left = 1e9 if call.timeout is None else call.timeout - took
    # A date has whole seconds, and another machine's clock may be ahead by some.
    spare = 1.0 if len({one.machine.offset for one in world.processes}) == 1 else 1.0 + _rules.CLOCKS_DIFFER
    wait = max(one.not_before.get(scope(session), 0.0) for one in world.processes) - world.time + spare
    store = world.store
    if store.troubled() or store.well_since > call.began or store.lost:
        return
    if left > max(1.0, wait):
        kind = "gives up, as a less patient call did" if left > 5 else "gives up, as its pause would be too long"
        world.violated(kind, f"{session.user}: {left:.1f} s of {call.timeout} left: {error}")


def footprint(process: Process) -> int:
    """Count what a process remembers: the members of all containers in its cache and its own store."""
    count, found, seen = 0, [process.cache], {id(process), id(process.world)}
    while found:
        one = found.pop()
        if id(one) in seen or isinstance(one, (str, bytes, type)):
            continue
        seen.add(id(one))
        if isinstance(one, Mapping):
            count, found = count + len(one), [*found, *dict(one).values()]
        elif isinstance(one, (list, set, tuple, deque)):
            count, found = count + len(one), [*found, *one]
        elif type(one).__module__.startswith("refresher") and hasattr(one, "__dict__"):
            found += vars(one).values()
    return count


def growth(world: World, process: Process, footprints: list[int]) -> None:
    """What is remembered must not grow with the length of a chain."""
    third = len(footprints) // 3  # memory needs a while to fill
    before, after = (max(footprints[n * third : (n + 1) * third], default=0) for n in (1, 2))
    if third > 13 and after > before * 1.1 + 5:
        world.violated("memory grows", f"{process.name} remembers {before} things, and then {after}")
    if world.store.largest > _rules.ROOM + 1000:
        world.violated("an entry grows", f"{world.store.largest} characters")
