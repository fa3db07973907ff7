"""What to do next about a chain."""

from __future__ import annotations

import json
import math

import attrs
import pytest
from helpers import jwt_with
from hypothesis import given
from hypothesis import strategies as st

from refresher import (
    KuzzleToken,
    MemoryStore,
    RefreshError,
    SignInRequiredError,
    TokenCache,
    UnavailableError,
    _rules,
    refresh_kuzzle_token,
)
from refresher._rules import (
    NOTHING_LEFT,
    Attempt,
    Chain,
    Instant,
    Left,
    Lock,
    Step,
    View,
    birth_hold,
    last_moments,
    left_elsewhere,
    left_here,
    lock_patience,
    next_step,
    pause_after,
    read,
    read_alias,
    silence,
    window,
    write_alias,
)
from refresher._text import key_of
from refresher.services.kuzzle import credential as kuzzle_credential

NOW = Instant(wall=1000.0, steady=50.0, boot="this boot")
BORN = 1_700_000_000
INF = math.inf


def credential(user="foo", lifetime=3600, **changes):
    jwt = "kauth-" + jwt_with({"_id": user, "iat": BORN, "exp": BORN + lifetime})
    return kuzzle_credential(**{"url": "http://kuzzle", "jwt": jwt, **changes})


def newest(**changes):
    return credential(**changes).unspent()


# Instants


@pytest.mark.parametrize(
    ("then", "age", "likely_age"),
    [
        pytest.param(Instant(990.0, 40.0, "this boot"), 10.0, 10.0, id="the same boot"),
        pytest.param(Instant(5000.0, 40.0, "this boot"), 10.0, 10.0, id="the wall clock was set back"),
        pytest.param(Instant(990.0, 55.0, "this boot"), 0.0, 0.0, id="just now"),
        pytest.param(Instant(990.0, 60.0, "this boot"), None, 10.0, id="later than now, as no moment can be"),
        pytest.param(Instant(990.0, 40.0, "another"), None, 10.0, id="another boot"),
        pytest.param(Instant(1010.0, 40.0, "another"), None, -10.0, id="another boot with a clock ahead"),
    ],
)
def test_age(then, age, likely_age):
    """Within one boot the steady clock tells an age, and elsewhere the wall clock tells a likely one."""
    assert (then.age(NOW), then.likely_age(NOW)) == (age, likely_age)


def test_instant_is_read_back():
    """An instant is read as it was written."""
    assert Instant.read(json.loads(json.dumps(attrs.asdict(NOW)))) == NOW


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"wall": None, "steady": 1, "boot": "b"}, id="no wall clock"),
        pytest.param({"wall": 1, "steady": "1", "boot": "b"}, id="a text"),
        pytest.param({"wall": True, "steady": 1, "boot": "b"}, id="a flag"),
        pytest.param({"wall": math.nan, "steady": 1, "boot": "b"}, id="not a number"),
        pytest.param({"wall": 10**400, "steady": 1, "boot": "b"}, id="400 digits"),
        pytest.param({"wall": 1, "steady": -1e16, "boot": "b"}, id="long before the Big Bang"),
    ],
)
def test_instant_that_is_none(values):
    """What is no moment is not read as one."""
    with pytest.raises(ValueError, match="no moment"):
        Instant.read(values)


# Chains


@pytest.mark.parametrize(
    ("lifetime", "asked_for", "requested", "expected"),
    [
        pytest.param(3600, None, None, True, id="whatever the service chooses"),
        pytest.param(3600, 7200.0, None, True, id="whatever the service chooses, after a lifetime"),
        pytest.param(3600, None, 3600.0, True, id="what the service chose"),
        pytest.param(3600, None, 3600.1, False, id="more than the service chose"),
        pytest.param(3600, 7200.0, 7200.0, True, id="what was asked for, though the service gave less"),
        pytest.param(3600, 7200.0, 7200.1, False, id="more than was asked for"),
        pytest.param(3600, 7200.0, 60.0, True, id="less than was asked for"),
        pytest.param(3600, 7200.0, INF, False, id="for ever"),
        pytest.param(3600, INF, INF, True, id="for ever again"),
    ],
)
def test_covers(lifetime, asked_for, requested, expected):
    """A token will do for a call that wants no longer lifetime than that token was asked to have."""
    chain = Chain(key="k", newest=newest(), requested=NOW, lifetime=lifetime - 1, asked_for=asked_for)
    assert chain.covers(requested) is expected


def test_infinite_token_covers_all():
    """A token that is good for ever will do for everybody, and who asks for no lifetime takes any."""
    infinite = credential().following(KuzzleToken("foo", "kauth-x", None, None))
    assert Chain(key="k", newest=infinite, lifetime=INF).covers(INF)
    assert Chain(key="k", newest=infinite, lifetime=INF, asked_for=60.0).covers(120.0)  # a strategy chose it
    assert Chain(key="k").covers(None)


WRITTEN = Chain(key="k", generation=3, newest=newest(), requested=NOW, took=0.5, lifetime=3599.0)


@pytest.mark.parametrize("asked_for", [None, 7200.0, INF])
def test_chain_is_read_back(asked_for):
    """A chain is read as it was written, whoever of its user reads it."""
    chain = attrs.evolve(WRITTEN, asked_for=asked_for).with_text()
    assert read("k", chain.text, credential(lifetime=60)) == chain


def test_infinite_chain_is_read_back():
    """A chain whose token is good for ever is read as it was written, too."""
    infinite = credential().following(KuzzleToken("foo", "kauth-x", None, None))
    chain = attrs.evolve(WRITTEN, newest=infinite, lifetime=INF).with_text()
    assert read("k", chain.text, credential()) == chain


def test_tombstone_is_read_back():
    """A chain that was forgotten has a generation and no token."""
    tombstone = Chain(key="k", generation=5).with_text()
    assert json.loads(tombstone.text) == {"generation": 5, "chain": "k", "ended": False}
    assert read("k", tombstone.text, credential()) == tombstone
    with pytest.raises(ValueError, match="no chain"):  # it is of another session, which may have ended
        read("another", tombstone.text, credential())


def test_chain_without_its_token_is_written_as_a_tombstone():
    """Without a result or the time it was asked for, no token is written down."""
    tombstone = Chain(key="k", generation=1).with_text()
    for chain in (
        attrs.evolve(tombstone, newest=credential(), requested=NOW),
        attrs.evolve(tombstone, newest=newest()),
    ):
        assert chain.with_text().text == tombstone.text


def test_entry_shows_no_secret():
    """The entry has the token, and its representation does not."""
    chain = WRITTEN.with_text()
    secret = chain.newest.secret.reveal()
    assert secret in chain.text
    assert secret not in repr(chain)


def entry(**changes):
    return json.dumps({**json.loads(WRITTEN.with_text().text), **changes})


NO_CHAINS = [
    pytest.param("", id="nothing"),
    pytest.param(b"\xff", id="bytes"),
    pytest.param("[]", id="a list"),
    pytest.param("{}", id="no members"),
    pytest.param(entry(generation="3"), id="a text for a generation"),
    pytest.param(entry(generation=True), id="a flag for a generation"),
    pytest.param(entry(generation=-1), id="a negative generation"),
    pytest.param(entry(generation=2**53), id="a generation that a double cannot count"),
    pytest.param(entry(token=None), id="null for a token"),
    pytest.param(entry(token="kauth-x"), id="a text for a token"),
    pytest.param(entry(token={"_id": "foo"}), id="half a token"),
    pytest.param(entry(token=newest(user="bar").token.to_dict()), id="another user's token"),
    pytest.param(entry(token={**newest().token.to_dict(), "jwt": None}), id="a token without its jwt"),
    pytest.param(entry(requested=None), id="null for a moment"),
    pytest.param(entry(requested={"wall": 10**400, "steady": 1, "boot": ""}), id="400 digits"),
    pytest.param(entry(requested={"wall": 1, "steady": 1}), id="a moment of no boot"),
    pytest.param('{"generation": 3, "token": ' + "9" * 5000 + "}", id="more digits than Python reads"),
]


@pytest.mark.parametrize("text", NO_CHAINS)
def test_no_chain(text):
    """An entry that is malformed or of another user is not believed."""
    with pytest.raises(ValueError, match=r"no chain|must be|no moment"):
        read("k", text, credential())


def test_no_entry():
    """Where there is no entry there is no chain."""
    assert read("k", None, credential()) is None


@pytest.mark.parametrize("text", NO_CHAINS)
def test_malformed_entry_is_overwritten(kuzzle, text):
    """An answer is written over an entry that nobody can read, so that others find it."""
    first = kuzzle.login(ago=1800)
    store = MemoryStore()
    store.set(kuzzle_credential(url=kuzzle.url, jwt=first).keys[0], text, 1000)
    for _ in range(2):
        token = refresh_kuzzle_token(kuzzle.url, first, cache=TokenCache(store), timeout=0.5)
    assert kuzzle.knows(token.jwt)
    assert len(kuzzle.requests) == 1


@pytest.mark.parametrize(
    ("changes", "took", "asked_for"),
    [
        pytest.param({"took": -5}, 0.0, None, id="less than no time"),
        pytest.param({"took": 10**300}, 86400.0, None, id="longer than a day"),
        pytest.param({"took": 10**400, "lifetime": 10**400}, 86400.0, None, id="400 digits"),
        pytest.param({"took": "x", "asked_for": "x"}, 0.0, None, id="texts"),
        pytest.param({"asked_for": -1}, 0.5, INF, id="for ever"),
    ],
)
def test_times_in_an_entry(changes, took, asked_for):
    """Times in an entry are kept within bounds."""
    chain = read("k", entry(**changes), credential())
    assert (chain.took, chain.asked_for) == (took, asked_for)


@pytest.mark.parametrize(
    ("lifetime", "expected"),
    [
        pytest.param(100.0, 100.0, id="shorter than the token's own"),
        pytest.param(1e300, 3599.0, id="longer than the token's own"),
        pytest.param(None, 3599.0, id="for ever"),
        pytest.param("x", 3599.0, id="no number"),
    ],
)
def test_lifetime_in_an_entry(lifetime, expected):
    """An entry does not let a token live for longer than the token itself says."""
    assert read("k", entry(lifetime=lifetime), credential()).lifetime == expected


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["generation", "token", "requested", "wall", "steady", "boot", "_id", "jwt"])
                | st.sampled_from(["by", "at", "is_open", "refusals", "error", "pause", "took", "message"]),
                inner,
            )
        ),
    )
)
def test_any_entry(value):
    """Whatever a store holds is read, or told to be none."""
    text = json.dumps(value)
    try:
        chain = read("k", text, credential())
    except ValueError:
        pass
    else:
        assert chain.newest is None or chain.newest.token.kuid == "foo"
    attempt = Attempt.read(text)
    assert attempt is None or isinstance(attempt.refusal("key", NOW), SignInRequiredError | None)
    assert read_alias(text, credential()) is None


# Aliases


CHAIN = key_of("chain")


def test_alias():
    """A pointer from a token leads to its chain."""
    assert read_alias(write_alias(CHAIN, credential()), credential()) == CHAIN


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(None, id="none"),
        pytest.param("", id="an empty one"),
        pytest.param("[]", id="a list"),
        pytest.param(json.dumps({"chain": CHAIN}), id="no proof"),
        pytest.param(json.dumps({"chain": CHAIN, "proof": None}), id="null for a proof"),
        pytest.param(
            json.dumps({"chain": CHAIN, "proof": key_of("other", credential().secret)}),
            id="the proof of another chain",
        ),
        pytest.param(write_alias(CHAIN, credential("bar")), id="another token's"),
        pytest.param(write_alias("../chain", credential()), id="a path, by who has the token"),
        pytest.param(write_alias(CHAIN + "\n", credential()), id="a line break"),
        pytest.param(
            json.dumps({"chain": CHAIN, "proof": key_of(CHAIN, credential().keys[0])}),
            id="made of what stores know",
        ),
    ],
)
def test_pointer_into_another_chain(text):
    """Who does not have a token's secret cannot point from it to another chain."""
    assert read_alias(text, credential()) is None


def test_alias_tells_no_secret():
    """A pointer holds hashes only."""
    assert credential().secret.reveal() not in write_alias("chain", credential())


# Attempts

REFUSED = Attempt(by="one", at=NOW)
REFUSED = REFUSED.refused("key", SignInRequiredError("no", provider="kuzzle"))


def refused(**changes):
    return attrs.evolve(REFUSED, errors={"key": attrs.evolve(REFUSED.errors["key"], **changes)})


def later(seconds):
    return Instant(NOW.wall + seconds, NOW.steady + seconds, NOW.boot)


@pytest.mark.parametrize(
    "attempt",
    [
        pytest.param(Attempt(by="one", at=NOW), id="one that failed"),
        pytest.param(attrs.evolve(REFUSED, is_open=True), id="an open one"),
        pytest.param(Attempt(by="one", at=NOW, pause=30.0), id="with a pause"),
        pytest.param(Attempt(by="one", at=NOW, seen=(NOW, 7.5)), id="one that was looked for"),
        pytest.param(REFUSED, id="a refusal"),
    ],
)
def test_attempt_is_read_back(attempt):
    """An attempt is read as it was written."""
    assert Attempt.read(attempt.write()) == attempt


def attempt_text(**changes):
    return json.dumps({**json.loads(REFUSED.write()), **changes})


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(None, id="none"),
        pytest.param("", id="an empty one"),
        pytest.param("{}", id="no members"),
        pytest.param(attempt_text(at=None), id="no time"),
        pytest.param(attempt_text(at={"wall": 1, "steady": 10**400, "boot": ""}), id="400 digits"),
        pytest.param(attempt_text(seen={"wall": 1, "steady": 1, "boot": ""}), id="no age"),
        pytest.param(attempt_text(seen=["x", 1]), id="no moment"),
        pytest.param(attempt_text(errors=5), id="a number for an error"),
        pytest.param(attempt_text(errors={"key": "no"}), id="a text for an error"),
    ],
)
def test_no_attempt(text):
    """What cannot be read counts as nothing tried."""
    assert Attempt.read(text) is None


@pytest.mark.parametrize(
    ("number", "refusals", "pause"),
    [
        pytest.param(-5, 0, 0.0, id="less than nothing"),
        pytest.param(10**299, 1000, 86400.0, id="300 digits"),
        pytest.param(10**400, 1000, 86400.0, id="400 digits"),
        pytest.param("x", 0, 0.0, id="no number"),
        pytest.param(2.9, 2, 2.9, id="a fraction"),
    ],
)
def test_numbers_of_an_attempt(number, refusals, pause):
    """Numbers in an attempt are kept within bounds."""
    attempt = Attempt.read(attrs.evolve(refused(count=number), pause=number).write())
    assert (attempt.errors["key"].count, attempt.pause) == (refusals, pause)


@pytest.mark.parametrize(("age", "expected"), [(-5, 0.0), (10**400, 86400.0), ("x", 0.0), (7, 7.0)])
def test_age_of_an_attempt(age, expected):
    """So is the age that it is known to have."""
    assert Attempt.read(attempt_text(seen=[attrs.asdict(NOW), age])).seen == (NOW, expected)


@pytest.mark.parametrize("truth", [1, "yes", None, False])
def test_only_true_is_open(truth):
    """Only true says that an attempt is under way."""
    assert not Attempt.read(attempt_text(is_open=truth)).is_open


@pytest.mark.parametrize(
    ("refusals", "age", "expected"),
    [
        pytest.param(0, 0, False, id="none"),
        pytest.param(1, 0, True, id="the first"),
        pytest.param(1, 59.9, True, id="the first, for a minute"),
        pytest.param(1, 60, False, id="the first, after a minute"),
        pytest.param(2, 299.9, True, id="the second, for five minutes"),
        pytest.param(2, 300, False, id="the second, after five minutes"),
        pytest.param(3, 3599.9, True, id="the third, for an hour"),
        pytest.param(3, 3600, False, id="the third, after an hour"),
        pytest.param(1000, 3599.9, True, id="any later, for an hour"),
        pytest.param(1000, 3600, False, id="any later, after an hour"),
    ],
)
def test_refusal_is_remembered(refusals, age, expected):
    """A refusal is remembered for longer each time, with all that it said."""
    error = refused(count=refusals).refusal("key", later(age))
    assert (error is not None) is expected
    if expected:
        assert type(error) is SignInRequiredError
        assert (str(error), error.provider, error.spent) == ("no", "kuzzle", None)


@pytest.mark.parametrize(("ahead", "counts"), [(4.9, True), (5.1, False)])
def test_refusal_of_the_future(ahead, counts):
    """A refusal of another machine may seem to be of the future. It does not count for ever, or for hours."""
    there = refused(at=Instant(NOW.wall + ahead, 0.0, "another"))
    assert (there.refusal("key", NOW) is not None) is counts


@pytest.mark.parametrize(("ahead", "left"), [(0, 47.0), (-40, 7.0), (-50, 0.0), (2, 47.0), (3600, 0.0)])
def test_pause_left(ahead, left):
    """A machine whose clock is hours ahead does not make others pause for hours."""
    told = Attempt(by="one", at=Instant(NOW.wall + ahead, 0.0, "another"), pause=47.0)
    assert told.pause_left(NOW) == left


@pytest.mark.parametrize(
    "said",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"message": "no", "nonsense": 1}, id="more than an error has"),
        pytest.param({"message": "no", "id": {"a": 1}}, id="an object"),
        pytest.param({"message": "no", "id": json.loads(500 * "[" + 500 * "]")}, id="deep lists"),
        pytest.param({"message": "no\nINFO auth: admin has signed in"}, id="two lines"),
        pytest.param({"message": "\x1b[2J"}, id="an escape sequence"),
        pytest.param({"message": 1001 * "x"}, id="a thousand letters"),
    ],
)
def test_refusal_without_words(said):
    """A refusal counts only if it is what a service says: who writes to the store writes to no log or terminal."""
    refusal = {**json.loads(REFUSED.write())["errors"]["key"], "said": said}
    assert Attempt.read(attempt_text(errors={"key": refusal})) is None


@pytest.mark.parametrize(
    ("changes", "age", "expected"),
    [
        pytest.param({}, 1, True, id="another's"),
        pytest.param({"is_open": False}, 1, False, id="one that has ended"),
        pytest.param({"by": "me"}, 1, False, id="one's own"),
        pytest.param({}, 59.9, True, id="almost too long ago"),
        pytest.param({}, 60, False, id="too long ago"),
    ],
)
def test_is_under_way(changes, age, expected):
    """An attempt of somebody else may still bring an answer, for a limited time."""
    attempt = attrs.evolve(Attempt(by="one", at=NOW, is_open=True), **changes)
    assert attempt.is_under_way("me", 60.0, age) is expected


# How long a token is valid


@pytest.mark.parametrize(
    ("lifetime", "wall", "age", "expected"),
    [
        pytest.param(INF, 1000, 10, Left(INF, INF), id="for ever"),
        pytest.param(100, 1010, 10, Left(90, 90), id="the clocks agree"),
        pytest.param(100, 8210, 10, Left(-7110, 90), id="the wall clock was set forward"),
        pytest.param(100, -6000, 10, Left(90, 90), id="the wall clock was set back"),
        pytest.param(100, 1200, 200, Left(-100, -100), id="expired"),
    ],
)
def test_left_here(lifetime, wall, age, expected):
    """On the machine that asked for a token, a clock that was set makes it due early and never late."""
    now = Instant(wall, 50.0 + age, "this boot")
    assert left_here(lifetime, NOW, now, age) == expected


NOBODY_KNOWS = -math.inf, -math.inf, False


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        pytest.param({"lifetime": INF}, Left(INF, INF), id="for ever"),
        pytest.param({}, Left(90, 90), id="only when it was first seen"),
        pytest.param({"expiry": 1050}, Left(50, 90), id="it tells, and the local clock may be wrong"),
        pytest.param({"expiry": 500}, Left(-500, 90), id="expired, or the local clock is ahead"),
        pytest.param({"expiry": 9000}, Left(90, 90), id="the local clock is behind"),
        pytest.param({"expiry": 1050, "service_now": (1020, 1020, True)}, Left(29, 30), id="by the service's clock"),
        pytest.param(
            {"expiry": 9000, "service_now": (1020, 1020, True)}, Left(89, 90), id="no longer than its lifetime"
        ),
        pytest.param(
            {"expiry": 1050, "service_now": (1020, 8000, True)}, Left(-6951, 30), id="a local clock was set meanwhile"
        ),
        pytest.param({"expiry": 1050, "service_now": (1020, 1020, False)}, Left(29, 50), id="by a Date of a proxy's"),
        pytest.param({"expiry": 1050, "service_now": (900, 900, False)}, Left(50, 90), id="by a Date that is behind"),
        pytest.param({"expiry": 990, "service_now": (1020, 1020, False)}, Left(-31, -10), id="over by both clocks"),
        pytest.param({"service_now": (1020, 1020, True)}, Left(90, 90), id="it does not tell"),
        pytest.param({"requested": Instant(960, 0, "another")}, Left(60, 60), id="when it was asked for"),
        pytest.param({"requested": Instant(800, 0, "another")}, Left(-100, -100), id="asked for long ago"),
        pytest.param({"requested": Instant(8000, 0, "another")}, Left(90, 90), id="asked for in the future"),
        pytest.param({"requested": Instant(960, 0, "another"), "expiry": 1050}, Left(50, 50), id="the earlier of both"),
        pytest.param(
            {"requested": Instant(960, 0, "another"), "expiry": 1050, "service_now": (970, 970, True)},
            Left(79, 80),
            id="the service's clock before all others",
        ),
    ],
)
def test_left_elsewhere(known, expected):
    """Elsewhere the service's clock counts, to the second, and without it the least of all that is known."""
    arguments = {
        "lifetime": 100,
        "expiry": None,
        "requested": None,
        "service_now": (-math.inf, -math.inf, False),
        **known,
    }
    lifetime, expiry, requested = (arguments.pop(name) for name in ("lifetime", "expiry", "requested"))
    assert left_elsewhere(lifetime, expiry, requested, NOW, seen_for=10, **arguments) == expected


def test_nothing_left():
    """Of a token that is not there, nothing is left."""
    assert NOTHING_LEFT.least == NOTHING_LEFT.most < 0


# When it is refreshed


@pytest.mark.parametrize(
    ("lifetime", "key", "ahead", "expected"),
    [
        pytest.param(3600, "00000000ff", None, 60, id="a minute"),
        pytest.param(100, "00000000ff", None, 10, id="a tenth of a short life"),
        pytest.param(3600, "80000000ff", None, 42, id="less for some"),
        pytest.param(INF, "00000000ff", None, 60, id="of what never ends: more is always left"),
        pytest.param(INF, "80000000ff", 600.0, 600, id="of what never ends, as told"),
        pytest.param(3600, "80000000ff", 600.0, 600, id="as told"),
        pytest.param(3600, "80000000ff", 0.0, 0, id="told to use all of it"),
        pytest.param(3600, "80000000ff", 9999.0, 1800, id="at most half a life"),
    ],
)
def test_window(lifetime, key, ahead, expected):
    """A token is refreshed in its last minute or tenth, and tokens of one birth not all at once."""
    assert window(lifetime, key, ahead) == expected


def test_windows_differ():
    """The window is between two fifths of the most and all of it."""
    assert window(3600, "f" * 64, None) == pytest.approx(24)
    assert 24 <= window(3600, key_of("one"), None) != window(3600, key_of("two"), None) <= 60


@pytest.mark.holds
@pytest.mark.parametrize(
    ("known", "expected"),
    [
        pytest.param({"birth": None}, 0.0, id="no birth that matters"),
        pytest.param({}, 1.0, id="first seen just now"),
        pytest.param({"age": 0.25}, 0.75, id="seen for a while"),
        pytest.param({"age": 5.0}, 0.0, id="seen for long"),
        pytest.param({"service_now": (100.9, 100.9, True)}, 1.0, id="the service's clock shows that second"),
        pytest.param(
            {"service_now": (101.0, 101.0, True)},
            1.0,
            id="the service's clock shows the next second, but not all of its clocks may",
        ),
        pytest.param({"service_now": (106.0, 106.0, True)}, 0.0, id="the service's clock shows a later second"),
        pytest.param({"service_now": (7200.0, 7200.0, False)}, 1.0, id="a proxy's Date shows a later second"),
        pytest.param({"service_now": (99.0, 99.0, True)}, 1.0, id="the service's clock is behind"),
        pytest.param({"service_now": (100.9, 500.0, True)}, 1.0, id="a local clock was set meanwhile"),
    ],
)
def test_birth_hold(known, expected):
    """A token is held back for the second of its birth, unless it is known to be over."""
    assert birth_hold(**{"birth": 100.0, "age": 0.0, "service_now": NOBODY_KNOWS, **known}) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("time_left", "expected"),
    [(math.inf, 10.0), (30.0, 10.0), (8.0, 4.0), (1.0, 2.5), (-1.0, 2.5), (-math.inf, 2.5)],
)
def test_silence(time_left, expected):
    """A request without an answer is sent again while there is time for that."""
    assert silence(time_left) == expected


def failed(retryable=True, retry_after=None):
    return UnavailableError("busy", retryable=retryable, retry_after=retry_after)


@pytest.mark.parametrize(
    ("error", "attempts", "time_left", "drawn", "expected"),
    [
        pytest.param(failed(retryable=False), 1, 30, 0.5, None, id="not to be tried again"),
        pytest.param(RefreshError("x"), 1, 30, 0.5, None, id="an error that does not tell"),
        pytest.param(failed(), 1, 30, 1.0, 0.2, id="the first"),
        pytest.param(failed(), 2, 30, 1.0, 0.4, id="the second"),
        pytest.param(failed(), 2, 30, 0.25, 0.1, id="less, as drawn"),
        pytest.param(failed(), 2, 30, 0.0, 0.0, id="none, as drawn"),
        pytest.param(failed(), 10, 30, 1.0, 5.0, id="five seconds at most"),
        pytest.param(failed(), 5000, INF, 1.0, 5.0, id="many attempts"),
        pytest.param(failed(), 10, 3.0, 1.0, 2.9, id="the last attempt comes just before the deadline"),
        pytest.param(failed(), 1, 0.11, 1.0, 0.01, id="just before it"),
        pytest.param(failed(), 1, 0.1, 1.0, None, id="too late"),
        pytest.param(failed(), 1, -5.0, 1.0, None, id="far too late"),
        pytest.param(failed(retry_after=20.0), 1, 30, 1.0, 20.0, id="as told"),
        pytest.param(failed(retry_after=0.0), 9, 30, 1.0, 5.0, id="told to come at once, as many are"),
        pytest.param(failed(retry_after=29.9), 1, 30, 1.0, None, id="told to come too late"),
        pytest.param(failed(retry_after=1e9), 1, INF, 1.0, 1e9, id="told to come late, and nobody is in a hurry"),
    ],
)
def test_pause_after(error, attempts, time_left, drawn, expected):
    """Pauses grow, obey the service, and leave time for a last attempt."""
    assert pause_after(error, attempts, time_left, drawn) == (None if expected is None else pytest.approx(expected))


# What to do

DUE = Left(20.0, 20.0)
LAST_MOMENTS = Left(2.0, 2.0)
MAYBE_EXPIRED = Left(-7000.0, 20.0)
EXPIRED = Left(-1.0, -1.0)
REFUSAL = SignInRequiredError("refused")


def view(left=DUE, **changes):
    known = {
        "window": 60.0,
        "wanted": False,
        "readable": True,
        "lock": Lock.OURS,
        "patience": lock_patience(left, 60.0),
        "refusal": None,
        "hold": 0.0,
        "pause": 0.0,
    }
    return View(left=left, **{**known, **changes})


FRESH = Left(1000.0, 1000.0)


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        pytest.param(view(FRESH), Step.USE, id="fresh"),
        pytest.param(view(FRESH, readable=False, refusal=REFUSAL), Step.USE, id="fresh, whatever else is wrong"),
        pytest.param(view(Left(60.0, 60.0)), Step.SEND, id="due at the start of the window"),
        pytest.param(view(FRESH, wanted=True), Step.SEND, id="fresh, and a longer one is wanted"),
        pytest.param(view(readable=False), Step.WAIT_FOR_STORE, id="no store, and valid"),
        pytest.param(view(EXPIRED, readable=False), Step.WAIT_FOR_STORE, id="no store, and expired"),
        pytest.param(view(NOTHING_LEFT, readable=False), Step.WAIT_FOR_STORE, id="no store, and unknown"),
        pytest.param(view(LAST_MOMENTS, readable=False), Step.SEND, id="no store, in the last moments"),
        pytest.param(view(MAYBE_EXPIRED, readable=False), Step.SEND, id="no store, and perhaps expired"),
        pytest.param(
            view(FRESH, wanted=True, readable=False), Step.WAIT_FOR_STORE, id="no store, and a longer one is wanted"
        ),
        pytest.param(view(refusal=REFUSAL), Step.REFUSE, id="refused"),
        pytest.param(view(refusal=REFUSAL, lock=Lock.UNTRIED), Step.REFUSE, id="refused, before the lock"),
        pytest.param(view(EXPIRED, refusal=REFUSAL, readable=False), Step.WAIT_FOR_STORE, id="refused, no store"),
        pytest.param(view(lock=Lock.UNTRIED), Step.LOCK, id="no lock yet"),
        pytest.param(view(LAST_MOMENTS, lock=Lock.UNTRIED), Step.LOCK, id="no lock yet in the last moments"),
        pytest.param(view(lock=Lock.HELD), Step.WAIT_FOR_LOCK, id="another is at it"),
        pytest.param(view(EXPIRED, lock=Lock.HELD), Step.WAIT_FOR_LOCK, id="another is at it, and expired"),
        pytest.param(view(LAST_MOMENTS, lock=Lock.HELD), Step.SEND, id="another is at it in the last moments"),
        pytest.param(
            view(LAST_MOMENTS, lock=Lock.HELD, patience=0.2),
            Step.WAIT_FOR_LOCK,
            id="another may be done in a moment",
        ),
        pytest.param(
            view(NOTHING_LEFT, lock=Lock.HELD, patience=-0.5),
            Step.SEND,
            id="another is at it in the last moments of the caller's own",
        ),
        pytest.param(view(pause=3.0, lock=Lock.UNTRIED), Step.WAIT_FOR_SERVICE, id="no lock for a pause"),
        pytest.param(view(hold=1.0, lock=Lock.UNTRIED), Step.WAIT_FOR_BIRTH, id="no lock while it is too young"),
        pytest.param(view(lock=Lock.LOST), Step.WAIT_FOR_STORE, id="the lock cannot be had"),
        pytest.param(view(EXPIRED, lock=Lock.LOST), Step.WAIT_FOR_STORE, id="the lock cannot be had, and expired"),
        pytest.param(view(LAST_MOMENTS, lock=Lock.LOST), Step.SEND, id="no lock in the last moments"),
        pytest.param(view(pause=3.0), Step.WAIT_FOR_SERVICE, id="the service asked to wait"),
        pytest.param(view(LAST_MOMENTS, pause=3.0), Step.WAIT_FOR_SERVICE, id="asked to wait in the last moments"),
        pytest.param(view(pause=3.0, hold=1.0), Step.WAIT_FOR_SERVICE, id="the service before the birth"),
        pytest.param(view(hold=1.0), Step.WAIT_FOR_BIRTH, id="too young"),
        pytest.param(view(EXPIRED), Step.SEND, id="expired"),
        pytest.param(view(NOTHING_LEFT, wanted=True), Step.SEND, id="the caller's own"),
    ],
)
def test_next_step(known, expected):
    """Each step follows from what is known."""
    assert next_step(known) is expected


@pytest.mark.parametrize(
    ("window", "moments"),
    [
        pytest.param(60.0, 3.0, id="a long life"),
        pytest.param(16.0, 2.0, id="an eighth of a window"),
        pytest.param(0.4, 0.25, id="a short life"),
        pytest.param(0.0, 0.25, id="no window"),
        pytest.param(1800.0, 3.0, id="a long window"),
    ],
)
def test_last_moments(window, moments):
    """Last moments are an eighth of the window, a quarter of a second at least and three seconds at most."""
    assert last_moments(window) == moments
    for seconds, step in ((moments, Step.SEND), (moments + 0.01, Step.WAIT_FOR_LOCK)):
        left = Left(seconds, seconds)
        held = view(left, window=window, wanted=True, lock=Lock.HELD, patience=lock_patience(left, window))
        assert next_step(held) is step


@given(
    st.builds(
        View,
        left=st.sampled_from([FRESH, DUE, LAST_MOMENTS, MAYBE_EXPIRED, EXPIRED, NOTHING_LEFT]),
        window=st.sampled_from([0.0, 10.0, 60.0]),
        wanted=st.booleans(),
        readable=st.booleans(),
        lock=st.sampled_from(Lock),
        patience=st.sampled_from([-1.0, 0.0, 1.0, INF]),
        refusal=st.sampled_from([None, REFUSAL]),
        hold=st.sampled_from([0.0, 1.0]),
        pause=st.sampled_from([0.0, 1.0]),
    )
)
def test_what_is_spent_is_kept(known):
    """Nothing is sent that cannot be kept, under another's lock or against the service's wish."""
    step = next_step(known)
    is_certain_loss = known.left.most > 0 and known.left.least <= 3
    if step is Step.SEND:
        assert known.refusal is None
        assert known.pause == known.hold == 0
        has_lock = known.lock is Lock.OURS or (known.lock is Lock.HELD and known.patience <= 0)
        assert is_certain_loss or (known.readable and has_lock)


def test_times_fit():
    """Memory is trusted for less than a spent token lives on, and refusals are remembered longer each time."""
    assert _rules.TRUSTED < 1.0
    assert list(_rules.REFUSALS) == sorted(_rules.REFUSALS)
