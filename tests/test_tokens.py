"""The results."""

from __future__ import annotations

import copy
import pickle
from datetime import UTC, datetime, timedelta, timezone
from types import SimpleNamespace

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from IPython.lib.pretty import pretty

from refresher import InvalidArgumentError, KuzzleToken, UserToken
from refresher._text import Secret, hide, key_of, masked, reveal

WHEN = datetime(2026, 11, 21, 20, 38, 47, 300000, UTC)
KUZZLE = KuzzleToken("foo", "kauth-planted", WHEN, timedelta(hours=1))
CIRCLE = UserToken("planted-user", "planted-key", "<b>user-1</b>", "planted-refresh", WHEN)
TOKENS = pytest.mark.parametrize("token", [KUZZLE, CIRCLE], ids=["kuzzle", "circle"])


@TOKENS
def test_copies(token):
    """A token survives pickling, copying and its own JSON."""
    assert pickle.loads(pickle.dumps(token)) == token
    assert copy.copy(token) == copy.deepcopy(token) == token
    assert type(token).from_dict(token.to_dict()) == token
    assert hash(copy.copy(token)) == hash(token)


@TOKENS
def test_frozen(token):
    """A token does not change, and has no room for anything else."""
    for field in (*attrs.fields_dict(type(token)), "other"):
        with pytest.raises(AttributeError):
            setattr(token, field, "x")


@TOKENS
def test_no_secret_shows(token):
    """Neither text nor notebook shows a secret; a fingerprint tells two of them apart."""
    for shown in (repr(token), str(token), f"{token}", token._repr_html_()):
        assert "planted" not in shown
        assert "&lt;secret " in shown or "<secret " in shown
    first = attrs.fields(type(token))[1 if token is KUZZLE else 0].name
    other = attrs.evolve(token, **{first: "kauth-planted2"})
    assert other != token
    assert repr(other) != repr(token)
    assert repr(attrs.evolve(token)) == repr(token)


@TOKENS
@pytest.mark.parametrize("wrap", [lambda token: token, lambda token: [token]], ids=["alone", "in a list"])
def test_no_secret_shows_in_a_failed_test(token, wrap):
    """Pytest tells how two of them differ, in full, and shows no secret."""
    other = attrs.evolve(token, expires_at=WHEN + timedelta(hours=1))
    with pytest.raises(AssertionError) as caught:
        assert wrap(token) == wrap(other)
    assert "<secret " in str(caught.value)
    assert "planted" not in str(caught.value)
    assert token != "planted"


def test_terminal_escapes():
    """A user may choose an id that would do something to a terminal. It is spelled out there."""
    assert "\x1b" not in pretty(attrs.evolve(KUZZLE, kuid="\x1b[2Jéa"))
    assert r"\x1b[2Jéa" in pretty(attrs.evolve(KUZZLE, kuid="\x1b[2Jéa"))


def test_odd_secrets():
    """What is no string is not shown either."""
    assert repr(KuzzleToken("foo", b"planted", None, None)).count("<secret>") == 1
    assert "planted" not in repr(attrs.evolve(CIRCLE, encryption_key="planted\ud800"))


def test_json():
    """The services' own names and units."""
    assert KUZZLE.to_dict() == {
        "_id": "foo",
        "expiresAt": 1795293527300,
        "jwt": "kauth-planted",
        "ttl": 3600000,
    }
    assert KuzzleToken("foo", None, None, None).to_dict() == {"_id": "foo", "expiresAt": -1, "ttl": -1}
    assert CIRCLE.to_dict() == {
        "userToken": "planted-user",
        "encryptionKey": "planted-key",
        "userID": "<b>user-1</b>",
        "refreshToken": "planted-refresh",
        "expiresAt": 1795293527300,
    }
    assert UserToken("u", None, None, "r", WHEN).to_dict() == {
        "userToken": "u",
        "refreshToken": "r",
        "expiresAt": 1795293527300,
    }


def test_time_in_another_zone():
    """An expiry in any zone is written down as the instant it is."""
    there = WHEN.astimezone(timezone(timedelta(hours=5)))
    assert (
        KuzzleToken("foo", "x", there, timedelta(1)).to_dict() == KuzzleToken("foo", "x", WHEN, timedelta(1)).to_dict()
    )


def test_notebook():
    """A notebook shows the time left, as a table or as text; what a service sent is not taken for HTML."""
    soon = datetime.now(UTC) + timedelta(hours=2, milliseconds=-1)
    left = 'style="text-align: left"'
    row = f"<tr><th {left}>time left</th><td {left}>"
    assert f"{row}1:59:59</td>" in attrs.evolve(KUZZLE, expires_at=soon)._repr_html_()
    assert f"{row}0:00:00</td>" in attrs.evolve(KUZZLE, expires_at=datetime(2020, 1, 1, tzinfo=UTC))._repr_html_()
    assert f"{row}unlimited</td>" in KuzzleToken("foo", None, None, None)._repr_html_()
    assert "&lt;b&gt;user-1&lt;/b&gt;" in CIRCLE._repr_html_()
    assert ">UserToken</caption>" in CIRCLE._repr_html_()


def test_terminal():
    """IPython in a terminal shows the same as text."""
    token = attrs.evolve(KUZZLE, expires_at=datetime(2020, 1, 2, 3, 4, 5, tzinfo=UTC), ttl=timedelta(hours=2))
    shown = []
    token._repr_pretty_(SimpleNamespace(text=shown.append), cycle=False)
    assert shown[0].splitlines() == [
        "KuzzleToken",
        "  kuid        foo",
        f"  jwt         {masked(KUZZLE.jwt)}",
        "  expires_at  2020-01-02 03:04:05 UTC",
        "  ttl         2:00:00",
        "  time left   0:00:00",
    ]


@pytest.mark.parametrize(
    ("kind", "changes", "member"),
    [
        pytest.param(KuzzleToken, {"_id": None}, "_id", id="no user"),
        pytest.param(KuzzleToken, {"jwt": "planted token"}, "jwt", id="no token"),
        pytest.param(KuzzleToken, {"expiresAt": None}, "expiresAt", id="no expiry"),
        pytest.param(KuzzleToken, {"ttl": "planted"}, "ttl", id="no lifetime"),
        pytest.param(UserToken, {"userToken": None}, "userToken", id="no user token"),
        pytest.param(UserToken, {"refreshToken": ""}, "refreshToken", id="no refresh token"),
        pytest.param(UserToken, {"expiresAt": "planted"}, "expiresAt", id="no end"),
        pytest.param(UserToken, {"encryptionKey": ["planted"]}, "encryptionKey", id="no encryption key"),
        pytest.param(UserToken, {"userID": ["planted"]}, "userID", id="no user id"),
    ],
)
def test_from_other_dicts(kind, changes, member):
    """A member that is missing or malformed is named, and not shown."""
    values = (KUZZLE if kind is KuzzleToken else CIRCLE).to_dict()
    with pytest.raises(InvalidArgumentError, match=f"^{member} must ") as caught:
        kind.from_dict({**values, **changes})
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize("name", ["Jean\u00a0Luc", "\U0001f469\u200d\U0001f4bb", "a\tb\n", "\ud800", "x" * 2000])
def test_any_id(name):
    """No token is lost over the characters of its user's id, or of what else is only passed on."""
    assert KuzzleToken.from_dict({**KUZZLE.to_dict(), "_id": name}).kuid == name
    pair = UserToken.from_dict({**CIRCLE.to_dict(), "userID": name, "encryptionKey": name})
    assert (pair.user_id, pair.encryption_key) == (name, name)


@given(
    expires_at=st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    ttl=st.integers() | st.just(1e18),
)
def test_any_time(expires_at, ttl):
    """Any number of milliseconds gives a token, and the token its own JSON."""
    token = KuzzleToken.from_dict({"_id": "foo", "expiresAt": expires_at, "ttl": ttl})
    assert KuzzleToken.from_dict(token.to_dict()) == token


@pytest.mark.parametrize("value", ["planted", b"planted", {"jwt": "planted"}], ids=lambda value: type(value).__name__)
def test_secret_shows_nothing(value):
    """A wrapped secret shows nothing, wherever it is held."""
    secret = Secret(value)
    for shown in (repr(secret), str(secret), f"{secret}", repr({"secret": [secret]})):
        assert "planted" not in shown
    assert secret.reveal() is reveal(secret) is reveal(value) is value


def test_secrets_are_compared():
    """Secrets are equal if what they hold is, and survive copies."""
    assert Secret("a") == Secret("a") != Secret("b")
    assert Secret("a") != "a"
    assert {Secret("a"): 1}[Secret("a")] == 1
    assert pickle.loads(pickle.dumps(Secret("a"))) == copy.deepcopy(Secret("a")) == Secret("a")
    assert repr(Secret("a")) != repr(Secret("b"))


def test_hide():
    """Only what is not wrapped yet is wrapped, and nothing stays nothing."""
    assert hide(None) is None
    assert hide("a") == Secret("a")
    assert hide(secret := Secret("a")) is secret


def test_keys():
    """A key is a hash of all parts, wrapped or not, and tells none of them."""
    assert key_of("a", "b") == key_of("a", Secret("b")) != key_of("ab")
    assert len(key_of("planted\ud800")) == 64
