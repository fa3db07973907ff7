"""The commands ``refresher kuzzle``, ``circle`` and ``forget``, as cron and people run them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import itertools
import json
import logging
import os
import pty
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import pytest
import requests
import time_machine
from cryptography.fernet import Fernet
from helpers import call_with, wait_until

from refresher import FileStore, KuzzleToken, TokenCache, UserToken, _cli, refresh_kuzzle_token, refresh_user_token
from refresher._cli import main
from refresher._flight import Flight
from refresher._rules import Attempt, Instant
from refresher._runtime import REAL
from refresher._text import fingerprint, key_of
from refresher.services import kuzzle as kuzzle_service
from refresher.testing import Answer, Clock

COMMAND = Path(sys.executable).with_name("refresher")
KEY = "A" * 43 + "="
STATE = Path(".local", "state", "refresher")
WHEN = r"refresher: \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ "


@pytest.fixture
def jwt(kuzzle, monkeypatch):
    """The token that stands in the environment."""
    jwt = kuzzle.login()
    kuzzle.clock.advance(1)
    monkeypatch.setenv("KUZZLE_JWT", jwt)
    return jwt


@pytest.fixture
def pair(circle, monkeypatch):
    """The tokens and the API key that stand in the environment."""
    pair = circle.sign_in()
    monkeypatch.setenv("CIRCLE_WEB3_API_KEY", circle.api_key)
    monkeypatch.setenv("CIRCLE_USER_TOKEN", pair.user_token)
    monkeypatch.setenv("CIRCLE_REFRESH_TOKEN", pair.refresh_token)
    monkeypatch.setenv("CIRCLE_DEVICE_ID", "device-1")
    return pair


@pytest.fixture
def run(capsys):
    """Run a command line; get its exit status, its output and its complaints."""

    def run(*argv):
        try:
            status = main([str(each) for each in argv])
        except SystemExit as end:
            status = end.code
        return (status, *capsys.readouterr())

    return run


def start(*argv, **options):
    """Start the installed command."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([COMMAND, *argv], text=True, **{**streams, **options})


def finish(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def shell(script, **variables):
    """Run a script in which "$refresher" is the command."""
    environment = {**os.environ, "refresher": str(COMMAND), **variables}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return finish(subprocess.Popen(["sh", "-c", script], text=True, env=environment, **streams))


def give_input(monkeypatch, data):
    """Put bytes on standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


# What is printed


def test_kuzzle_json(kuzzle, jwt, run):
    """JSON is the default: what from_dict() reads."""
    status, out, err = run("kuzzle", kuzzle.url, "--expires-in", "2h")
    token = KuzzleToken.from_dict(json.loads(out))
    assert (status, err) == (0, "")
    assert out.count("\n") == 1
    assert token.jwt != jwt
    assert token.ttl.total_seconds() == 7200
    assert kuzzle.knows(token.jwt)


def test_kuzzle_arguments(kuzzle, jwt, run):
    """Options become arguments."""
    run("kuzzle", kuzzle.url, "--strategy", "local", "--trigger-events")
    assert kuzzle.requests[0].query == {"strategy": ["local"], "triggerEvents": [""]}


@pytest.mark.parametrize(
    ("given", "sent"),
    [("7200", "7200s"), ("7200 ", "7200 s"), ("1.5", "1.5s"), ("2h", "2h"), ("7200000ms", "7200000ms"), ("-1", "-1")],
)
def test_lifetime(kuzzle, jwt, run, given, sent):
    """A bare number is seconds, as with the other options. Anything else goes to Kuzzle as it is."""
    status, _, err = run("kuzzle", kuzzle.url, "--expires-in", given)
    assert (status, err) == (0, "")
    assert kuzzle.requests[0].query == {"expiresIn": [sent]}


def test_circle_json(circle, pair, run):
    """The same of a pair."""
    status, out, err = run("circle", "--base-url", circle.url)
    token = UserToken.from_dict(json.loads(out))
    assert (status, err) == (0, "")
    assert circle.knows(token)
    assert token.refresh_token != pair.refresh_token


def test_token(kuzzle, circle, jwt, pair, run):
    """The bare token."""
    assert kuzzle.knows(run("kuzzle", kuzzle.url, "--output", "token")[1].removesuffix("\n"))
    _, out, _ = run("circle", "--base-url", circle.url, "--output", "token")
    assert out.removesuffix("\n") in circle._user_tokens


def test_env(kuzzle, circle, jwt, pair):
    """Lines for a shell, in a form that ends a script when the command fails."""
    script = f"""
        set -e
        one=$("$refresher" kuzzle {kuzzle.url} --output env)
        two=$("$refresher" circle --base-url {circle.url} --output env)
        eval "$one"
        eval "$two"
        echo "$KUZZLE_JWT $CIRCLE_USER_TOKEN $CIRCLE_REFRESH_TOKEN $CIRCLE_ENCRYPTION_KEY"
        one=$("$refresher" kuzzle http://127.0.0.1:1 --no-retry --output env)
        echo not reached
    """
    status, out, _ = shell(script)
    jwt, user_token, refresh_token, encryption_key = out.split()
    assert status == 75
    assert kuzzle.knows(jwt)
    assert user_token in circle._user_tokens
    assert refresh_token in circle._pairs
    assert encryption_key


def test_env_is_quoted():
    """Whatever a token consists of, a shell runs none of it."""
    jwt = "kauth-$(exit)`exit`';exit;'\"&|<>*?"
    token = KuzzleToken("foo", jwt, expires_at=None, ttl=None)
    credential = kuzzle_service.credential(url="http://host", jwt="old")
    lines = _cli._written(credential, token, "env").reveal()
    assert shell(f'{lines}\nprintf %s "$KUZZLE_JWT"') == (0, jwt, "")


def test_headers(kuzzle, circle, jwt, pair, run):
    """Headers for a request that is made with the token."""
    _, of_kuzzle, _ = run("kuzzle", kuzzle.url, "--output", "headers")
    assert kuzzle.knows(of_kuzzle.removeprefix("Authorization: Bearer ").removesuffix("\n"))
    _, of_circle, _ = run("circle", "--base-url", circle.url, "--output", "headers")
    first, second = of_circle.splitlines()
    assert first == f"Authorization: Bearer {circle.api_key}"
    assert second.removeprefix("X-User-Token: ") in circle._user_tokens


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(kuzzle, jwt):
    """curl reads them from its standard input, so that no token is an argument."""
    script = f'"$refresher" kuzzle {kuzzle.url} --output headers | curl --silent --header @- {kuzzle.url}/_me'
    status, out, err = shell(script)
    assert (status, err) == (0, "")
    assert json.loads(out)["result"]["_id"] == "foo"


# What is read


def test_user_id(circle, pair, run, monkeypatch):
    """A user id may stand for the user token."""
    monkeypatch.delenv("CIRCLE_USER_TOKEN")
    status, out, _ = run("circle", "--base-url", circle.url, "--user-id", "user-1")
    assert status == 0
    assert circle.knows(UserToken.from_dict(json.loads(out)))


@pytest.mark.parametrize("form", ["{}\n", '{{"jwt": "{}"}}', '{{"result": {{"jwt": "{}"}}}}', "\ufeff{}"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_from_standard_input(kuzzle, jwt, run, monkeypatch, form, encoding):
    """A token bare, as JSON or in Kuzzle's answer, if the environment has none. PowerShell writes it in UTF-16."""
    monkeypatch.delenv("KUZZLE_JWT")
    give_input(monkeypatch, form.format(jwt).removeprefix("\ufeff" * (encoding == "utf-16")).encode(encoding))
    assert run("kuzzle", kuzzle.url)[0] == 0
    assert kuzzle.requests[0].headers["Authorization"] == f"Bearer {jwt}"


@pytest.mark.parametrize("form", ["{}", '{{"data": {}}}'], ids=["printed", "Circle's answer"])
def test_pair_from_standard_input(circle, pair, run, monkeypatch, form):
    """What was printed can be the input of another day, on another machine. What Circle answered can be, too."""
    monkeypatch.delenv("CIRCLE_USER_TOKEN")
    monkeypatch.delenv("CIRCLE_REFRESH_TOKEN")
    token = refresh_user_token(**call_with(circle, pair), cache=None)
    give_input(monkeypatch, form.format(json.dumps(token.to_dict())).encode())
    assert run("circle", "--base-url", circle.url)[0] == 0
    assert circle.requests[-1].json()["refreshToken"] == token.refresh_token


@pytest.mark.parametrize("missing", ["user_token", "refresh_token"])
@pytest.mark.parametrize(
    "form", ['{{"userToken": "{0.user_token}", "refreshToken": "{0.refresh_token}"}}', "{1}\n"], ids=["JSON", "bare"]
)
def test_half_a_pair_from_standard_input(circle, pair, run, monkeypatch, missing, form):
    """What the environment has counts, and standard input has the rest, bare or as JSON."""
    monkeypatch.delenv(f"CIRCLE_{missing.upper()}")
    given = attrs.evolve(circle.sign_in("user-2"), **{missing: getattr(pair, missing)})
    give_input(monkeypatch, form.format(given, getattr(pair, missing)).encode())
    assert run("circle", "--base-url", circle.url)[0] == 0
    assert circle.requests[-1].json()["refreshToken"] == pair.refresh_token
    assert circle.requests[-1].headers["X-User-Token"] == pair.user_token


def ask(monkeypatch, answers):
    """Be at a terminal, and answer what is asked there."""
    prompts = []

    def answer(prompt):
        prompts.append(prompt)
        if (found := answers.get(prompt)) is None:
            raise EOFError
        return found

    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(io.BytesIO()))
    monkeypatch.setattr("getpass.getpass", answer)
    return prompts


def test_a_terminal_is_asked(kuzzle, jwt, run, monkeypatch):
    """At a terminal the token is asked for, and not shown."""
    monkeypatch.delenv("KUZZLE_JWT")
    ask(monkeypatch, {"jwt: ": jwt})
    assert run("kuzzle", kuzzle.url)[0] == 0


def test_a_terminal_is_asked_for_all(circle, pair, run, monkeypatch):
    """All that is missing is asked for."""
    for name in ("CIRCLE_WEB3_API_KEY", "CIRCLE_USER_TOKEN", "CIRCLE_REFRESH_TOKEN", "CIRCLE_DEVICE_ID"):
        monkeypatch.delenv(name)
    answers = {"userToken: ": pair.user_token, "refreshToken: ": pair.refresh_token}
    answers = {"API key: ": circle.api_key, "device id: ": "device-1", **answers}
    prompts = ask(monkeypatch, answers)
    assert run("circle", "--base-url", circle.url)[0] == 0
    assert prompts == list(answers)


def test_a_terminal_is_asked_for_the_rest(circle, pair, run, monkeypatch):
    """What the environment has is not asked for."""
    monkeypatch.delenv("CIRCLE_REFRESH_TOKEN")
    prompts = ask(monkeypatch, {"refreshToken: ": pair.refresh_token})
    assert run("circle", "--base-url", circle.url)[0] == 0
    assert prompts == ["refreshToken: "]


def test_a_terminal_says_nothing(run, monkeypatch):
    """Who ends the input gives no token."""
    ask(monkeypatch, {})
    status, _, err = run("kuzzle", "http://127.0.0.1:1")
    assert status == 2
    assert err.count("\n") == 1
    assert "KUZZLE_JWT is not set" in err


@pytest.mark.parametrize(
    "given", [b"", b"{}", b"[]", b"[", b'{"result": null}', b'{"jwt": ""}', b'{"jwt": 5}', b'{"jwt": null}']
)
def test_no_token(run, monkeypatch, given):
    """Where no token is, that is said."""
    give_input(monkeypatch, given)
    status, _, err = run("kuzzle", "http://127.0.0.1:1")
    assert status == 2
    assert err.count("\n") == 1
    assert "KUZZLE_JWT is not set, and standard input has no jwt" in err


@pytest.mark.parametrize("form", ['"{}"', "KUZZLE_JWT={}", '{{"jwt":"{}"}}', "{{'jwt': '{}'}}"])
def test_more_than_the_token(kuzzle, jwt, run, monkeypatch, form):
    """A token with something around it is not sent, and nobody is told to sign in again."""
    monkeypatch.setenv("KUZZLE_JWT", form.format(jwt))
    status, out, err = run("kuzzle", kuzzle.url)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "jwt must be the token alone" in err or "jwt must not be empty or have white space" in err
    assert jwt not in err
    assert kuzzle.requests == []


@pytest.mark.parametrize("given", ["k\xe4uth-1\n".encode("latin-1"), b"\xff\xfek", b"\0\xd8" * 9, bytes(range(200))])
def test_strange_input(run, monkeypatch, given):
    """Bytes that are no text are no token."""
    give_input(monkeypatch, given)
    status, _, err = run("kuzzle", "http://127.0.0.1:1", "--no-retry")
    assert (status, err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    "name", ["CIRCLE_USER_TOKEN", "CIRCLE_REFRESH_TOKEN", "CIRCLE_WEB3_API_KEY", "CIRCLE_DEVICE_ID"]
)
def test_no_pair(run, pair, monkeypatch, name):
    """The same of each that Circle needs."""
    monkeypatch.delenv(name)
    give_input(monkeypatch, b"")
    status, _, err = run("circle")
    assert (status, err.count("\n")) == (2, 1)
    assert name in err


def test_no_api_key(run, pair, monkeypatch):
    """A key that is missing can be set. No option takes it."""
    monkeypatch.delenv("CIRCLE_WEB3_API_KEY")
    give_input(monkeypatch, b"")
    status, _, err = run("circle")
    assert status == 2
    assert err.endswith(": the API key is missing: set CIRCLE_WEB3_API_KEY\n")


# Where things are kept


@pytest.mark.parametrize(
    ("platform", "environment", "folder"),
    [
        ("linux", {}, ".local/state/refresher"),
        ("linux", {"XDG_STATE_HOME": "{home}/elsewhere"}, "elsewhere/refresher"),
        ("linux", {"XDG_STATE_HOME": "elsewhere"}, ".local/state/refresher"),
        ("darwin", {"XDG_STATE_HOME": "{home}/elsewhere"}, "Library/Application Support/refresher"),
        ("win32", {"LOCALAPPDATA": "{home}/local"}, "local/refresher"),
        ("win32", {}, "AppData/Local/refresher"),
    ],
)
def test_default_store(monkeypatch, tmp_path, platform, environment, folder):
    """The platform's folder for state. A relative one counts as not set."""
    monkeypatch.setattr(sys, "platform", platform)
    for name in ("XDG_STATE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(home=tmp_path))
    assert _cli._folder() == tmp_path / folder


def test_store(kuzzle, jwt, run, tmp_path):
    """A folder of one's own."""
    first = run("kuzzle", kuzzle.url, "--store", tmp_path / "mine")
    assert run("kuzzle", kuzzle.url, "--store", tmp_path / "mine") == first
    assert len(kuzzle.requests) == 1
    assert not (tmp_path / STATE).exists()
    run("kuzzle", kuzzle.url)
    assert (tmp_path / STATE).exists()


@pytest.fixture(params=[None, ""], ids=["unset", "empty"])
def homeless(request, monkeypatch):
    """A user who has no home."""

    def nobody(_):
        raise KeyError

    monkeypatch.delenv("HOME") if request.param is None else monkeypatch.setenv("HOME", request.param)
    monkeypatch.setattr("pwd.getpwuid", nobody)


def test_no_home(kuzzle, jwt, run, homeless, tmp_path):
    """Without a home, the store has to be named."""
    status, out, err = run("kuzzle", kuzzle.url)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "--store" in err
    assert run("kuzzle", kuzzle.url, "--store", tmp_path)[0] == 0
    assert run("kuzzle", "--help")[0] == 0


def spoil_folder(folder, _):
    folder.write_text("a file")


def spoil_name(folder, _):
    folder.symlink_to(folder)


def spoil_entry(folder, _):
    (folder / "refresher" / "ab").mkdir(parents=True, mode=0o700)
    (folder / "refresher" / "ab" / "refresher-abcd.entry").symlink_to(folder / "nowhere")


def let_others_write(folder, _):
    (folder / "refresher").mkdir(parents=True)
    (folder / "refresher").chmod(0o777)


def be_somebody_else(folder, monkeypatch):
    (folder / "refresher").mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)


def fill_disk(_, monkeypatch):
    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)


@pytest.mark.parametrize("spoil", [spoil_folder, spoil_name, spoil_entry, let_others_write, be_somebody_else])
def test_store_that_cannot_be_used(kuzzle, jwt, run, tmp_path, monkeypatch, spoil):
    """What can't be saved is not refreshed."""
    spoil(tmp_path / "mine", monkeypatch)
    status, out, err = run("kuzzle", kuzzle.url, "--store", tmp_path / "mine")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "the store (--store, REFRESHER_KEY) can't be used: " in err
    assert kuzzle.requests == []


def test_disk_that_is_full(kuzzle, jwt, run, monkeypatch):
    """A token that needs no refresh is printed, one that is valid too, and any other has to wait."""
    _, first, _ = run("kuzzle", kuzzle.url)
    fill_disk(None, monkeypatch)
    assert run("kuzzle", kuzzle.url) == (0, first, "")
    assert run("status", "kuzzle", kuzzle.url)[0] == 0
    kuzzle.clock.advance(3300)
    with time_machine.travel(time.time() + 3300):
        status, out, err = run("kuzzle", kuzzle.url)
    assert (status, out) == (0, first)
    told = "the store (--store) can't be written: [Errno 28] No space left on device"
    assert re.fullmatch(f"{WHEN}kuzzle .*: {re.escape(told)}, going on with the old token\n", err)
    monkeypatch.setenv("KUZZLE_JWT", kuzzle.login("bar", ago=1800))
    for command in (["kuzzle"], ["forget", "kuzzle"]):
        status, out, err = run(*command, kuzzle.url)
        assert (status, out, err.count("\n")) == (75, "", 1)
        assert told in err
    assert len(kuzzle.requests) == 1


@pytest.mark.parametrize("name", ["", "~nosuchuser/x", "/proc/nowhere", "/dev/full", "/dev/null/x", "/proc/a\nb\x1b"])
def test_store_of_a_strange_name(kuzzle, jwt, run, tmp_path, monkeypatch, name):
    """A name that leads nowhere is one line, too."""
    monkeypatch.chdir(tmp_path)
    status, _, err = run("kuzzle", kuzzle.url, "--store", name)
    assert (status, err.count("\n")) == (2, 1)
    assert err.removesuffix("\n").isprintable()
    assert list(tmp_path.iterdir()) == []


def test_no_current_folder(kuzzle, jwt, tmp_path):
    """Nor does it matter if the current folder is gone."""
    script = 'mkdir "$HOME/gone" && cd "$HOME/gone" && rmdir ../gone && "$refresher" kuzzle "$url" --store here'
    status, _, err = shell(script, url=kuzzle.url)
    assert (status, err.count("\n")) == (2, 1)


def test_store_that_is_busy(kuzzle, jwt, run, tmp_path):
    """A store that another process holds on to is one to try later."""
    run("kuzzle", kuzzle.url, "--store", tmp_path)
    with (tmp_path / "refresher" / "pr" / "refresher.guard").open() as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        status, _, err = run("kuzzle", kuzzle.url, "--store", tmp_path)
    assert (status, err.count("\n")) == (75, 1)
    assert "another process has locked the store: try again later" in err


def content_of(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_encrypted(kuzzle, jwt, run, tmp_path, monkeypatch):
    """With a key in the environment, the store can't be read without it. Keys can be changed."""
    old, new = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    monkeypatch.setenv("REFRESHER_KEY", old)
    first = run("kuzzle", kuzzle.url, "--output", "token")
    assert first[0] == 0
    assert first[1].strip().encode() not in content_of(tmp_path)
    monkeypatch.setenv("REFRESHER_KEY", f"{new} {old}")
    assert run("kuzzle", kuzzle.url, "--output", "token") == first
    assert len(kuzzle.requests) == 1


def test_no_key(kuzzle, jwt, run, monkeypatch):
    """Without the key, nothing is sent, and the store keeps what it has."""
    monkeypatch.setenv("REFRESHER_KEY", key := Fernet.generate_key().decode())
    first = run("kuzzle", kuzzle.url, "--output", "token")
    kuzzle.clock.advance(2)
    monkeypatch.delenv("REFRESHER_KEY")
    status, _, err = run("kuzzle", kuzzle.url)
    assert (status, err.count("\n"), len(kuzzle.requests)) == (2, 1, 1)
    assert "REFRESHER_KEY is not set: this session was saved with a key" in err
    monkeypatch.setenv("REFRESHER_KEY", key)
    assert run("kuzzle", kuzzle.url, "--output", "token") == first


@pytest.mark.parametrize("before", [None, "B" * 42 + "A="], ids=["no key", "another key"])
def test_other_key(kuzzle, jwt, run, monkeypatch, before):
    """A key that does not fit is a mistake in the environment. Nothing is sent, and the store keeps what it has."""
    with monkeypatch.context() as patch:
        patch.setenv("REFRESHER_KEY", before) if before else None
        first = run("kuzzle", kuzzle.url, "--output", "token")
    with monkeypatch.context() as patch:
        patch.setenv("REFRESHER_KEY", Fernet.generate_key().decode())
        for command in (["kuzzle"], ["status", "kuzzle"], ["forget", "kuzzle"]):
            for token in (jwt, first[1].strip()):
                patch.setenv("KUZZLE_JWT", token)
                status, out, err = run(*command, kuzzle.url)
                assert (status, out, err.count("\n")) == (2, "", 1)
                assert "REFRESHER_KEY does not fit" in err
    if before:
        monkeypatch.setenv("REFRESHER_KEY", before)
    assert run("kuzzle", kuzzle.url, "--output", "token") == first
    assert len(kuzzle.requests) == 1


@pytest.mark.parametrize(
    "key", ["", " ", "planted", "a" * 43 + "planted", "plant\u00e9d", f"{KEY},", f'"{KEY}"', f"{KEY}x"]
)
def test_wrong_key(kuzzle, jwt, run, monkeypatch, key):
    """A key that is none is not named."""
    monkeypatch.setenv("REFRESHER_KEY", key)
    status, out, err = run("kuzzle", kuzzle.url)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "REFRESHER_KEY" in err
    assert "plant" not in err
    assert kuzzle.requests == []


def test_without_cryptography(kuzzle, jwt, run, monkeypatch):
    """Without what it needs for that, the command says what to install."""
    monkeypatch.setenv("REFRESHER_KEY", Fernet.generate_key().decode())
    monkeypatch.setitem(sys.modules, "cryptography.fernet", None)
    status, _, err = run("kuzzle", kuzzle.url)
    assert (status, err.count("\n")) == (2, 1)
    assert "pip install 'refresher[crypto]'" in err
    assert kuzzle.requests == []


# How a session is forgotten


def test_forget_kuzzle(kuzzle, jwt, run, tmp_path):
    """Nothing of a session stays in the store, and the next run begins anew."""
    _, out, _ = run("kuzzle", kuzzle.url, "--output", "token")
    assert out.strip().encode() in content_of(tmp_path)
    assert run("forget", "kuzzle", kuzzle.url) == (0, "", "")
    assert out.strip().encode() not in content_of(tmp_path)
    assert run("kuzzle", kuzzle.url)[0] == 77
    assert len(kuzzle.requests) == 2


@pytest.mark.parametrize("who", [[], ["--user-id", "user-1"]])
def test_forget_circle(circle, pair, run, monkeypatch, tmp_path, who):
    """The same of Circle. No API key is needed for it."""
    _, out, _ = run("circle", "--base-url", circle.url, *who, "--output", "token")
    assert out.strip().encode() in content_of(tmp_path)
    monkeypatch.delenv("CIRCLE_WEB3_API_KEY")
    assert run("forget", "circle", "--base-url", circle.url, *who) == (0, "", "")
    assert out.strip().encode() not in content_of(tmp_path)


def test_forget_what_nobody_knows(kuzzle, jwt, run):
    """What is not there can be forgotten."""
    assert run("forget", "kuzzle", kuzzle.url) == (0, "", "")
    assert kuzzle.requests == []


# How it stands with a session


def test_status_of_kuzzle(kuzzle, jwt, run):
    """What is known of a session, without a request; with --check Kuzzle is asked, which spends nothing."""
    status, out, _ = run("status", "kuzzle", kuzzle.url)
    assert (status, json.loads(out)["state"], json.loads(out)["user"]) == (0, "unknown", "foo")
    _, token, _ = run("kuzzle", kuzzle.url, "--output", "token")
    status, out, _ = run("status", "kuzzle", kuzzle.url)
    shown = json.loads(out)
    assert (status, shown["state"], shown["generation"]) == (0, "fresh", 1)
    assert len(kuzzle.requests) == 1
    assert jwt not in out
    assert token.strip() not in out
    status, out, _ = run("status", "kuzzle", kuzzle.url, "--check", "--output", "table")
    assert status == 0
    assert dict(line.split(maxsplit=1) for line in out.splitlines())["valid"] == "True"
    assert kuzzle.requests[-1].path == "/_checkToken"
    assert kuzzle.requests[-1].headers["X-Kuzzle-Request-Id"], "its logs name the check"
    requests.post(f"{kuzzle.url}/_logout", headers={"Authorization": f"Bearer {token.strip()}"}, timeout=9)
    status, out, _ = run("status", "kuzzle", kuzzle.url, "--check")
    assert (status, json.loads(out)["valid"]) == (77, False)
    assert run("status", "kuzzle", kuzzle.url)[0] == 0


def test_status_of_the_due(kuzzle, jwt, run):
    """A token is due when the next run refreshes it: by default with less than six minutes left."""
    run("kuzzle", kuzzle.url)
    for seconds, state, sent in ((3200, "fresh", 1), (3300, "due", 2)):
        with time_machine.travel(time.time() + seconds):
            assert json.loads(run("status", "kuzzle", kuzzle.url)[1])["state"] == state
            run("kuzzle", kuzzle.url)
            assert len(kuzzle.requests) == sent


def test_status_of_circle(circle, pair, run, monkeypatch):
    """The same of Circle. No API key is needed for it."""
    run("circle", "--base-url", circle.url)
    monkeypatch.delenv("CIRCLE_WEB3_API_KEY")
    status, out, _ = run("status", "circle", "--base-url", circle.url)
    assert (status, json.loads(out)["state"], json.loads(out)["user"]) == (0, "fresh", "user-1")
    assert len(circle.requests) == 1


def test_status_is_no_verdict_on_junk(kuzzle, jwt, run):
    """An answer that does not say whether the token is valid does not say that it is not."""
    kuzzle.suffer("incomplete")
    status, out, err = run("status", "kuzzle", kuzzle.url, "--check")
    assert (status, out, err.count("\n")) == (69, "", 1)


def test_status_during_a_refresh_elsewhere(kuzzle, jwt, run, tmp_path):
    """A token that another process spends meanwhile is invalid, and its session is not."""
    store = tmp_path / "store"
    cache, receive, kuzzle.grace = TokenCache(FileStore(store)), kuzzle.receive, 0.1

    def late(request):
        kuzzle.receive = receive
        refresh_kuzzle_token(kuzzle.url, jwt, cache=cache)
        kuzzle.clock.advance(1)
        return receive(request)

    kuzzle.receive = late
    status, out, _ = run("status", "kuzzle", kuzzle.url, "--check", "--store", store)
    assert (status, json.loads(out)["valid"], json.loads(out)["generation"]) == (0, True, 1)


def test_status_of_a_strange_user(kuzzle, run, monkeypatch):
    """A table cannot control a terminal, whatever a token calls its user."""
    monkeypatch.setenv("KUZZLE_JWT", kuzzle.login("\x1b[31m\nstate fresh", ago=60))
    status, out, _ = run("status", "kuzzle", kuzzle.url, "--output", "table")
    assert (status, len(out.splitlines()), out.replace("\n", "").isprintable()) == (0, 6, True)


def test_status_of_the_dead(kuzzle, jwt, run):
    """Who has to sign in again is told by the exit status, and so is that Kuzzle is down."""
    requests.post(f"{kuzzle.url}/_logout", headers={"Authorization": f"Bearer {jwt}"}, timeout=9)
    assert run("kuzzle", kuzzle.url)[0] == 77
    status, out, _ = run("status", "kuzzle", kuzzle.url)
    assert (status, json.loads(out)["state"]) == (77, "refused")
    kuzzle.stop()
    status, out, err = run("status", "kuzzle", kuzzle.url, "--check")
    assert (status, out) == (75, "")
    assert "Kuzzle could not be reached" in err


# What is complained about


@pytest.mark.parametrize(
    ("answer", "status", "complaint"),
    [
        pytest.param("security.token.invalid", 77, "sign in again", id="the session has ended"),
        pytest.param("api.process.overloaded", 75, "try again later", id="busy"),
        pytest.param(b"", 75, "did not answer", id="no answer"),
        pytest.param(Answer(200, b"<html>"), 69, "check the URL", id="not Kuzzle"),
        pytest.param("security.token.ttl_exceeded", 2, "check the arguments", id="not allowed"),
    ],
)
def test_status(kuzzle, jwt, run, answer, status, complaint):
    """The exit status tells cron what to do; one line tells a person when what happened to which session."""
    if isinstance(answer, str):
        kuzzle.fail_next(answer)
    else:
        kuzzle.next_answers.append(answer)
    got, out, err = run("kuzzle", kuzzle.url, "--no-retry", "--quiet")
    assert (got, out, err.count("\n")) == (status, "", 1)
    host = kuzzle.url.removeprefix("http://")
    assert re.match(f"{WHEN}kuzzle {host} {fingerprint(jwt)}: Kuzzle ", err)
    assert complaint in err


def test_circle_status(circle, pair, run):
    """The same of Circle."""
    circle.fail_next(401)
    status, _, err = run("circle", "--base-url", circle.url)
    host = circle.url.removeprefix("http://")
    session = fingerprint(pair.refresh_token)
    assert status == 2
    what = "Circle refused the request: check the arguments, keys and rights"
    assert re.fullmatch(rf"{WHEN}circle {host} {session}: {what} \(401, 401\)\n", err)


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param([], id="nothing"),
        pytest.param(["kuzzle"], id="no URL"),
        pytest.param(["kuzzle", "URL", "planted"], id="too much"),
        pytest.param(["kuzzle", "URL", "--jwt=planted"], id="unknown"),
        pytest.param(["kuzzle", "URL", "--output", "planted"], id="output"),
        pytest.param(["kuzzle", "URL", "--output", "plan'ted (choose from planted)"], id="quotes"),
        pytest.param(["kuzzle", "URL", "--output", "plan\nted"], id="a line break"),
        pytest.param(["kuzzle", "URL", "--timeout", "planted"], id="timeout"),
        pytest.param(["kuzzle", "URL", "--timeout", "0"], id="no time"),
        pytest.param(["kuzzle", "URL", "--timeout", "999999999d"], id="too much time"),
        pytest.param(["kuzzle", "URL", "--plant3d"], id="no option's name"),
        pytest.param(["kuzzle", "http://127.0.0.1:1", "--ahead", "999999999d"], id="too far ahead"),
        pytest.param(["kuzzle", "URL", "--quiet=planted"], id="a flag"),
        pytest.param(["kuzzle", "planted url"], id="URL"),
        pytest.param(["kuzzle", "http://user:planted@host"], id="password"),
        pytest.param(["kuzzle", "http://127.0.0.1:1", "--expires-in", "planted"], id="lifetime"),
        pytest.param(["planted"], id="command"),
        pytest.param(["forget"], id="no service"),
        pytest.param(["forget", "planted"], id="service"),
        pytest.param(["forget", "kuzzle", "URL", "--timeout", "5"], id="an option of others"),
        pytest.param(["circle", "--base-url", "http://planted"], id="plain http"),
        pytest.param(["circle", "--user-id", "plan\nted"], id="user id"),
        pytest.param(["circle", "--user-id", ""], id="no user id"),
    ],
)
def test_usage(run, argv, jwt, pair):
    """What is wrong is named in one line, and not quoted: it may be a token in the wrong place."""
    status, out, err = run(*argv)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("refresher: ")
    assert "plan" not in err


def test_choices(run):
    """A wrong choice shows those there are."""
    assert run("kuzzle", "URL", "--output", "yaml")[2] == (
        "refresher: argument --output: must be 'json', 'token', 'env', 'headers' (see refresher kuzzle --help)\n"
    )
    assert run("yaml")[2] == (
        "refresher: argument COMMAND: must be 'kuzzle', 'circle', 'status', 'forget', 'demo' (see refresher --help)\n"
    )
    assert run("kuzzle", "URL", "--timeout", "soon")[2] == (
        "refresher: argument --timeout: must be like 30, 30s, 15m or 2h (see refresher kuzzle --help)\n"
    )


def test_unknown_options(run):
    """An option's name is told, without its value, and the help is that of the command."""
    hint = "secrets go into the environment, or standard input (see refresher kuzzle --help)"
    assert run("kuzzle", "URL", "--jwt=planted", "planted", "--expires_in", "--to-json", "1")[2] == (
        f"refresher: unrecognized arguments --jwt --to-json; {hint}\n"
    )
    assert run("status", "circle", "--timeout", "5")[2].endswith("(see refresher status circle --help)\n")


@pytest.mark.parametrize("given", ["0", "0s", "999999999d"])
def test_timeouts(run, given):
    """No time, and more than a computer can wait, are no timeout. How to wait forever is not told: one cannot."""
    status, _, err = run("kuzzle", "URL", "--timeout", given)
    assert status == 2
    assert err.endswith(": --timeout must be more than 0 and less than 292 years, such as 30s, 15m or 2h\n")


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("30", 30), ("30s", 30), ("15m", 900), ("2h", 7200), ("1d", 86400), ("0.5", 0.5), ("1.5h", 5400), ("0", 0)],
)
def test_durations(given, seconds):
    """A duration is a number of seconds, or has a unit."""
    assert _cli._duration(given) == seconds


@pytest.mark.parametrize("given", ["", "s", "-1", "1w", "1 m", "1e3", "nan", "inf", ".5", "5.", "\u0663", "1s\n"])
def test_no_durations(run, jwt, given):
    """Anything else is not."""
    status, _, err = run("kuzzle", "URL", f"--timeout={given}")
    assert status == 2
    assert "must be like 30" in err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ("kuzzle", "circle", "forget", "demo", "75", "77", "REFRESHER_KEY")),
        (["kuzzle"], ("--expires-in", "--store", "--ahead", "--output", "--quiet", "75", "77", "KUZZLE_JWT")),
        (["circle"], ("--device-id", "--user-id", "CIRCLE_WEB3_API_KEY", "CIRCLE_REFRESH_TOKEN", "CIRCLE_USER_TOKEN")),
        (["forget"], ("kuzzle", "circle")),
        (["forget", "kuzzle"], ("URL", "--store")),
        (["forget", "circle"], ("--device-id", "--store")),
        (["demo"], ("service",)),
    ],
)
def test_help(run, monkeypatch, command, words):
    """Help names each option, each exit status and each variable, on a terminal of the usual width."""
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run(*command, "--help")
    assert (status, err) == (0, "")
    assert [word for word in words if word not in out] == []
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_warnings(kuzzle, jwt, run, quiet, monkeypatch):
    """Who goes on with a valid token, while the service is down, is told so, unless it's to be quiet."""
    monkeypatch.setattr("refresher._exchange._rules.SHORTEST_PAUSE", 0.01, raising=False)
    first = run("kuzzle", kuzzle.url)
    kuzzle.clock.advance(3300)
    kuzzle.fail_next("api.process.overloaded", 20)
    with time_machine.travel(time.time() + 3300):
        status, out, err = run("kuzzle", kuzzle.url, "--timeout", "0.5", *quiet)
    assert (status, out) == first[:2]
    assert err.count("\n") == (0 if quiet else 1)
    assert quiet or "going on with the old token" in err
    assert quiet or re.match(f"{WHEN}kuzzle ", err)


def test_warning_of_the_store(kuzzle, jwt, run, tmp_path):
    """That an entry cannot be read is told, once."""
    folder = tmp_path / "store"
    run("kuzzle", kuzzle.url, "--store", folder)
    FileStore(folder).set(key_of("kuzzle:2", kuzzle.url, jwt), "no entry", 60)
    status, _, err = run("kuzzle", kuzzle.url, "--store", folder, "--timeout", "0.5")
    assert status != 0
    assert [line for line in err.splitlines() if line.endswith("FileStore has an entry that cannot be read")] != []


def test_another_run_has_the_lock(kuzzle, jwt, run, tmp_path):
    """A run that has sent nothing itself goes on with a valid token."""
    first = run("kuzzle", kuzzle.url, "--store", tmp_path / "store")
    FileStore(tmp_path / "store").acquire(key_of("kuzzle:2", kuzzle.url, jwt), "another", 60)
    kuzzle.clock.advance(3300)
    with time_machine.travel(time.time() + 3300):
        status, out, err = run("kuzzle", kuzzle.url, "--store", tmp_path / "store", "--timeout", "0.5")
    assert (status, out) == first[:2]
    told = "Time is up, and another process is refreshing the Kuzzle token: call again, going on with the old token"
    assert err.endswith(f": {told}\n")
    assert len(kuzzle.requests) == 1


def test_a_lifetime_that_is_refused(kuzzle, jwt, run):
    """It is told at once, and not when the token has expired that is printed meanwhile."""
    run("kuzzle", kuzzle.url)
    kuzzle.fail_next("security.rights.forbidden")
    status, out, err = run("kuzzle", kuzzle.url, "--quiet", "--expires-in", "30d")
    assert (status, out) == (2, "")
    assert "check the arguments, keys and rights" in err


@pytest.mark.parametrize("ago", [0, 3600])
def test_another_run_may_have_spent_the_token(kuzzle, jwt, run, tmp_path, ago):
    """What another has just announced to be spent is not printed, though it is valid by its own dates."""
    folder = tmp_path / "store"
    newest = json.loads(run("kuzzle", kuzzle.url, "--store", folder)[1])["jwt"]
    store = FileStore(folder)
    store.acquire(key_of("kuzzle:2", kuzzle.url, jwt), "another", 60)
    attempt = Attempt(by="another", at=Instant(time.time() + 3300 - ago, REAL.steady() - ago, REAL.boot), is_open=True)
    store.set(f"{key_of('kuzzle:2', kuzzle.url, newest)}-attempt", attempt.write(), 7200)
    kuzzle.clock.advance(3300)
    with time_machine.travel(time.time() + 3300):
        status, out, err = run("kuzzle", kuzzle.url, "--store", folder, "--timeout", "0.5")
    assert (status, bool(out)) == ((0, True) if ago else (75, False))
    assert "another process is refreshing the Kuzzle token: call again" in err


def test_answer_that_comes_too_late_for_its_token(kuzzle, jwt, run):
    """A token that has expired when its answer comes is not printed."""
    kuzzle.delay_next(2.5)
    status, out, err = run("kuzzle", kuzzle.url, "--timeout", "0.5", "--expires-in", "2s")
    assert (status, out) == (75, "")
    assert "did not answer in time" in err


def test_no_answer_to_a_run_with_a_valid_token(kuzzle, jwt, run):
    """It is not printed: it may have been spent."""
    run("kuzzle", kuzzle.url)
    kuzzle.clock.advance(3300)
    kuzzle.lose_next()
    with time_machine.travel(time.time() + 3300):
        status, out, _ = run("kuzzle", kuzzle.url, "--timeout", "0.5", "--no-retry")
    assert (status, out) == (75, "")


def test_answer_that_is_lost_after_the_time_is_up(kuzzle, jwt, run, monkeypatch):
    """Nor is a valid token printed then, though the flight is gone before it has told what it sent."""
    let_go = Flight._let_go
    monkeypatch.setattr(Flight, "_let_go", lambda self: (time.sleep(0.3), let_go(self))[1])
    run("kuzzle", kuzzle.url)
    kuzzle.clock.advance(3300)

    def lose(request):
        given = kuzzle.truly(request)
        time.sleep(1.5)
        return (given, b"")[1]

    kuzzle.next_answers.append(lose)
    with time_machine.travel(time.time() + 3300):
        status, out, _ = run("kuzzle", kuzzle.url, "--timeout", "0.5")
    assert (status, out) == (75, "")


def test_session_that_is_over_behind_a_lost_pointer(kuzzle, jwt, run, tmp_path, monkeypatch):
    """A token that this run has only found, and that the service refuses, is not printed."""
    store = tmp_path / "store"

    def print_token(token, lifetime):
        monkeypatch.setenv("KUZZLE_JWT", token)
        return run("kuzzle", kuzzle.url, "--store", store, "--expires-in", lifetime, "--output", "token")

    second = print_token(jwt, "1h")[1].strip()
    FileStore(store).delete(key_of("kuzzle:2", kuzzle.url, second) + "-alias")
    kuzzle.clock.advance(2)
    third = print_token(second, "2h")[1].strip()
    requests.post(f"{kuzzle.url}/_logout", headers={"Authorization": f"Bearer {third}"}, timeout=10)
    kuzzle.clock.advance(2)
    for _ in range(2):
        status, out, _ = print_token(jwt, "3h")
        assert (status, out) == (77, "")


def test_bug(kuzzle, jwt, run, monkeypatch):
    """A bug of ours is one line that says where, and nothing of what was in hand."""

    def fail(*_, **__):
        raise TypeError("planted")

    monkeypatch.setattr(_cli, "current", fail)
    status, out, err = run("kuzzle", kuzzle.url)
    assert (status, out, err.count("\n")) == (75, "", 1)
    assert re.search(r"unexpected TypeError in test_commands.py, line \d+\n", err)
    assert "planted" not in err


def test_in_another_thread(kuzzle, jwt, run):
    """Only the main thread can handle signals. Others can do the rest."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, "kuzzle", kuzzle.url).result()[0] == 0


def test_handlers_are_put_back(kuzzle, jwt, run):
    """Who calls main() gets back its signal handlers."""
    before = {each: signal.getsignal(each) for each in _cli._SIGNALS}
    run("kuzzle", kuzzle.url)
    assert {each: signal.getsignal(each) for each in _cli._SIGNALS} == before


@pytest.mark.parametrize("output", ["json", "token", "env", "headers"])
@pytest.mark.parametrize("given", ["environment", "input", "terminal"])
def test_no_variable_shows_a_secret(kuzzle, circle, jwt, pair, run, monkeypatch, output, given):
    """No local variable of the command line holds a secret, as a debugger or a crash report would show it."""
    variables = {"KUZZLE_JWT": jwt, "CIRCLE_USER_TOKEN": pair.user_token, "CIRCLE_REFRESH_TOKEN": pair.refresh_token}
    secrets = {*variables.values(), circle.api_key}
    if given != "environment":
        for name in variables:
            monkeypatch.delenv(name)
    shown = []

    def watch(frame, event, _):
        if frame.f_code.co_filename == _cli.__file__ and event in ("call", "return"):
            texts = []
            for value in frame.f_locals.values():
                with contextlib.suppress(AttributeError):  # it is not complete yet
                    texts.append(repr(value))
            shown.extend(frame.f_code.co_name for text in texts if any(secret in text for secret in secrets))

    for argv in (["kuzzle", kuzzle.url], ["circle", "--base-url", circle.url]):
        if given == "terminal":
            ask(monkeypatch, {"jwt: ": jwt, "userToken: ": pair.user_token, "refreshToken: ": pair.refresh_token})
        if given == "input":
            values = {"jwt": jwt, "userToken": pair.user_token, "refreshToken": pair.refresh_token}
            give_input(monkeypatch, json.dumps(values).encode())
        sys.setprofile(watch)
        try:
            status, out, _ = run(*argv, "--output", output)
        finally:
            sys.setprofile(None)
        assert status == 0
        secrets |= set(re.findall(r"[\w.-]{60,}", out))
    assert shown == []


IMPORTED = """
import importlib.abc, os, signal, sys

class Killer(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *others):
        if name == "refresher._cli":
            os.kill(os.getpid(), signal.{name})

from refresher.__main__ import main
sys.meta_path.insert(0, Killer())
sys.argv = ["refresher", "demo"]
sys.exit(main())
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signal_during_the_imports(name):
    """A run that has hardly begun ends as others do: in one line, with a status that says to try again."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    script = subprocess.Popen([sys.executable, "-c", IMPORTED.format(name=name)], text=True, **streams)
    assert finish(script) == (75, "", f"refresher: ended by {name}\n")
    closed = 'exec "$python" -c "$program" 2>&-'
    assert shell(closed, python=sys.executable, program=IMPORTED.format(name=name)) == (75, "", "")


def test_signal_before_it_is_expected(kuzzle, jwt, run, monkeypatch):
    """It ends the run as soon as that can be told."""
    add = logging.Logger.addHandler

    def add_late(logger, handler):
        if isinstance(handler, _cli._Run):
            os.kill(os.getpid(), signal.SIGTERM)
        add(logger, handler)

    monkeypatch.setattr(logging.Logger, "addHandler", add_late)
    status, out, err = run("kuzzle", kuzzle.url)
    assert (status, out) == (75, "")
    assert re.fullmatch(f"{WHEN.strip()}: ended by SIGTERM\n", err)
    assert not kuzzle.requests


# Streams in any state


FAILURES = [
    pytest.param("<&-", "", 0, id="standard input is closed"),
    pytest.param("<&-", "KUZZLE_JWT=", 2, id="standard input is closed, and needed"),
    pytest.param(">&-", "", 2, id="standard output is closed"),
    pytest.param(">/dev/full", "", 75, id="standard output is full"),
    pytest.param("2>&-", "", 0, id="standard error is closed"),
    pytest.param("2>/dev/full", "", 0, id="standard error is full"),
    pytest.param("2>&-", "url=http://127.0.0.1:1", 75, id="standard error is closed, and needed"),
    pytest.param("2>/dev/full", "url=http://127.0.0.1:1", 75, id="standard error is full, and needed"),
    pytest.param("2>&- >&-", "", 2, id="both are closed"),
    pytest.param("2>/dev/full >/dev/full", "", 75, id="both are full"),
    pytest.param("<&- 2>&- >&-", "", 2, id="all are closed"),
    pytest.param("", "PYTHONIOENCODING=ascii", 0, id="ASCII"),
    pytest.param("</dev/urandom", "KUZZLE_JWT=", 2, id="standard input is noise"),
]


@pytest.mark.parametrize(("streams", "variable", "status"), FAILURES)
def test_streams(kuzzle, jwt, streams, variable, status):
    """Whatever the standard streams are, the status is right, and a complaint is one line if it can be told."""
    got, out, err = shell(f'{variable or ":"}; "$refresher" kuzzle "$url" --no-retry {streams}', url=kuzzle.url)
    assert got == status
    assert ("jwt" in out) == (status == 0)
    assert err.count("\n") == (status != 0 and "2>" not in streams)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("into", ["a file", "a pipe"])
def test_output_that_fits_in_part(kuzzle, jwt, tmp_path, unbuffered, into):
    """A token that was written in part is no success, with Python's own buffers or without."""
    whole = finish(start("kuzzle", kuzzle.url))[1]
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while into == "a pipe":
            os.write(write, b"x" * 100)
    # Nor could coverage write what it measures.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    with (tmp_path / "out").open("w") as file:
        done = subprocess.run(
            [COMMAND, "kuzzle", kuzzle.url],
            env={**environment, "PYTHONUNBUFFERED": unbuffered},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, resource.RLIM_INFINITY)),
            stdout=file if into == "a file" else write,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    os.close(read)
    os.close(write)
    assert (done.returncode, done.stderr.count("\n")) == (75, 1)
    assert "standard output: " in done.stderr
    assert "Nothing is lost: run this again" in done.stderr


@pytest.mark.parametrize("command", ["kuzzle $url", "status kuzzle $url", "demo", "--help", "--version"])
def test_output_that_nobody_takes(kuzzle, jwt, command):
    """A reader that is gone, and a full disk, are told in one line. A token is kept; nothing else could be lost."""
    argv = command.replace("$url", kuzzle.url).split()
    with Path("/dev/full").open("w") as full:
        processes = [start(*argv, stdout=full), start(*argv)]
    processes[1].stdout.close()
    processes[1].stdout = None
    for process in processes:
        status, _, err = finish(process)
        assert (status, err.count("\n")) == (75, 1)
        assert "standard output: " in err
        assert ("Nothing is lost: run this again" in err) == command.startswith("kuzzle")
    assert len(kuzzle.requests) <= 1


@pytest.mark.parametrize(
    ("command", "status"),
    [("kuzzle $url", 2), ("status kuzzle $url", 2), ("demo", 2), ("--help", 2), ("forget kuzzle $url", 0)],
)
def test_closed_output(kuzzle, jwt, command, status):
    """All commands that print something end alike if standard output is closed: the environment is wrong."""
    command = command.replace("$url", kuzzle.url)
    got, _, err = shell(f'"$refresher" {command} >&-')
    assert (got, err.count("\n")) == (status, status // 2)
    assert "run this again" not in err


# As cron runs it


def test_two_days_of_cron(kuzzle, run, monkeypatch, tmp_path):
    """Every five minutes, with the same first token: one exchange a lifetime, always a living token."""
    begin = int(time.time())
    with time_machine.travel(begin, tick=False) as now:
        kuzzle.clock = Clock()
        monkeypatch.setenv("KUZZLE_JWT", kuzzle.login(ago=60))
        seen = []
        for minute in range(0, 48 * 60, 5):
            now.move_to(begin + minute * 60)
            status, out, err = run("kuzzle", kuzzle.url, "--output", "token")
            assert (status, err) == (0, "")
            if not seen or out != seen[-1]:
                seen.append(out)
            assert kuzzle.knows(out.strip())
    assert len(kuzzle.requests) == len(seen)
    assert 48 <= len(seen) <= 48 * 1.12


def test_overlapping_runs(kuzzle, jwt):
    """Runs at once print one token, from one exchange."""
    kuzzle.delay_next(0.5)
    with ThreadPoolExecutor(8) as pool:
        results = set(pool.map(lambda _: finish(start("kuzzle", kuzzle.url)), range(8)))
    ((status, out, err),) = results
    assert (status, err) == (0, "")
    assert kuzzle.knows(json.loads(out)["jwt"])
    assert len(kuzzle.requests) == 1


def test_killed_while_it_waits(circle, pair, run):
    """A run that is killed is no loss at Circle: the next one gets the same answer."""
    circle.delay_next(1)
    process = start("circle", "--base-url", circle.url)
    wait_until(lambda: circle.requests)
    process.kill()
    finish(process)
    status, out, _ = run("circle", "--base-url", circle.url)
    assert status == 0
    assert circle.knows(UserToken.from_dict(json.loads(out)))
    assert len(circle._answered) == 1


def test_killed_before_it_is_sent(kuzzle, jwt, run):
    """Nor is one that is killed before it has sent anything, while it holds the lock."""
    kuzzle.stop()
    process = start("kuzzle", kuzzle.url)
    wait_until(lambda: list((Path.home() / STATE).rglob("*.lock")))
    process.kill()
    finish(process)
    kuzzle.start()
    assert run("kuzzle", kuzzle.url)[0] == 0


def test_slow_answer(kuzzle, jwt, run):
    """What is printed is the new token, also if its answer comes when the time is up."""
    kuzzle.delay_next(1.5)
    status, out, err = run("kuzzle", kuzzle.url, "--timeout", "0.5", "--output", "token")
    assert (status, err) == (0, "")
    assert kuzzle.knows(out.strip())
    assert len(kuzzle.requests) == 1


def test_slow_answer_while_the_old_token_is_valid(kuzzle, jwt, run):
    """The old token is not printed while a request is under way that spends it."""
    _, old, _ = run("kuzzle", kuzzle.url, "--output", "token")
    kuzzle.clock.advance(3300)
    kuzzle.delay_next(3)
    with time_machine.travel(time.time() + 3300):
        status, out, err = run("kuzzle", kuzzle.url, "--output", "token")
    assert (status, err) == (0, "")
    assert out != old
    assert kuzzle.knows(out.strip())


def test_no_answer_in_time(kuzzle, jwt, run, monkeypatch):
    """If it does not come, the run is to be repeated."""
    monkeypatch.setattr(_cli, "TokenCache", lambda *given, **options: TokenCache(*given, **options, lease=1.0))
    kuzzle.delay_next(3)
    status, out, err = run("kuzzle", kuzzle.url, "--timeout", "0.5")
    assert (status, out, err.count("\n")) == (75, "", 1)
    assert "did not answer" in err


@pytest.fixture
def disk_that_fills_up(kuzzle, monkeypatch):
    """A disk that is full when a new token has come, until that is tried no more."""
    monkeypatch.setattr(_cli, "_SAVING", 1.0)
    monkeypatch.setattr(_cli, "TokenCache", lambda *given, **options: TokenCache(*given, **options, lease=1.0))

    def fill(request):
        fill_disk(None, monkeypatch)
        return kuzzle.truly(request)

    kuzzle.next_answers.append(fill)


def test_token_that_cannot_be_saved(kuzzle, jwt, run, disk_that_fills_up):
    """It is printed, and standard error says that there is no other copy, also if the command is to be quiet."""
    status, out, err = run("kuzzle", kuzzle.url, "--output", "token", "--quiet")
    assert (status, err.count("\n")) == (0, 1)
    assert kuzzle.knows(out.strip())
    assert re.match(f"{WHEN}kuzzle .*: the new token could not be saved: keep what was printed", err)


def test_token_that_can_neither_be_saved_nor_printed(kuzzle, jwt, run, disk_that_fills_up, monkeypatch):
    """The status says that nothing was printed, and the complaint does not call that no loss."""
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        status, _, err = run("kuzzle", kuzzle.url, "--quiet")
    assert (status, err.count("\n")) == (75, 1)
    assert "Nor could the new token be saved" in err


def test_token_that_is_saved_later(kuzzle, jwt, run, disk_that_fills_up, monkeypatch):
    """What could be saved at last is not complained about."""
    sync = os.fsync

    def empty_disk(*_):
        monkeypatch.setattr(os, "fsync", sync)
        return "printed"

    monkeypatch.setattr(_cli, "_written", empty_disk)
    assert run("kuzzle", kuzzle.url, "--quiet") == (0, "printed", "")


# How a signal ends it


def next_run(kuzzle, run):
    """Run the command again: get a token that works, without another request."""
    requests = len(kuzzle.requests)
    status, out, _ = run("kuzzle", kuzzle.url, "--output", "token")
    assert status == 0
    assert kuzzle.knows(out.strip())
    assert len(kuzzle.requests) == requests
    return out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("times", [1, 2])
def test_ended_while_an_answer_is_under_way(kuzzle, jwt, run, number, times):
    """A run that is ended takes the answer to what it has sent, and prints it. One more signal changes nothing."""
    kuzzle.delay_next(1)
    process = start("kuzzle", kuzzle.url, "--output", "token")
    wait_until(lambda: kuzzle.requests)
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.1)
    assert finish(process) == (0, next_run(kuzzle, run), "")


def test_ended_by_many_signals(kuzzle, monkeypatch):
    """Signals of all kinds, from when it is sent until the process is gone: also while Python comes to its end."""
    for number in range(1, 4):
        monkeypatch.setenv("KUZZLE_JWT", kuzzle.login(f"user-{number}"))
        kuzzle.clock.advance(1)
        kuzzle.delay_next(0.3)
        process = start("kuzzle", kuzzle.url, "--output", "token")
        wait_until(lambda number=number: len(kuzzle.requests) == number)
        for each in itertools.cycle([signal.SIGTERM, signal.SIGINT, signal.SIGHUP]):
            if process.poll() is not None:
                break
            process.send_signal(each)
            time.sleep(0.0005)
        status, out, err = finish(process)
        assert (status, err) == (0, "")
        assert kuzzle.knows(out.strip())


def test_ended_while_python_ends(kuzzle, jwt):
    """The answer is taken as well if it comes after the run has failed for another reason."""
    program = """
import sys, threading, time
from refresher import _cli
_cli._Run.wait = lambda *_: None
sys.exit(_cli.main())
"""
    kuzzle.delay_next(3)
    command = [sys.executable, "-c", program, "kuzzle", kuzzle.url, "--timeout", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: kuzzle.requests)
    complaint = process.stderr.readline()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        process.send_signal(number)
        time.sleep(0.1)
    assert finish(process) == (75, "", "")
    assert "and the refresh goes on: call again" in complaint
    assert kuzzle.knows(finish(start("kuzzle", kuzzle.url, "--output", "token"))[1].strip())


def test_ended_by_timeout(kuzzle, jwt, run):
    """GNU timeout sends two signals, one of them to all processes of the group."""
    if shutil.which("timeout") is None:
        pytest.skip("timeout is not installed")
    for _ in range(4):
        kuzzle.delay_next(3.5)
        requests = len(kuzzle.requests)
        status, out, err = shell(f'timeout 3 "$refresher" kuzzle {kuzzle.url} --output token --ahead 1d')
        if len(kuzzle.requests) > requests:  # otherwise the machine is slow
            break
    assert (status, err) == (124, "")
    assert out == next_run(kuzzle, run)


def test_ended_by_a_terminal_that_closes(kuzzle, jwt, run, tmp_path):
    """A terminal that closes sends several signals, and nothing can be printed any more."""
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    tmux = ["tmux", "-S", str(tmp_path / "socket"), "-f", "/dev/null"]
    kuzzle.delay_next(1.5)
    subprocess.run([*tmux, "new-session", "-d", f"exec {shlex.join([str(COMMAND), 'kuzzle', kuzzle.url])}"], check=True)
    wait_until(lambda: kuzzle.requests)
    subprocess.run([*tmux, "kill-server"], check=True)
    time.sleep(2.5)
    next_run(kuzzle, run)


def in_a_terminal(*argv, **options):
    """Start the command with a terminal of its own, which is yielded too."""
    leader, follower = pty.openpty()
    streams = {"stdin": follower, "stderr": follower, "stdout": subprocess.PIPE, **options}
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen(["setsid", "--ctty", COMMAND, *argv], text=True, env=environment, **streams)
    os.close(follower)
    return process, leader


def read_all(leader, until="\0"):
    """Read what a terminal shows."""
    shown = b""
    while until.encode() not in shown and select.select([leader], [], [], 30)[0]:
        try:
            shown += os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
    return shown.decode()


def test_ended_by_ctrl_c(kuzzle, jwt, run):
    """Ctrl-C twice."""
    kuzzle.delay_next(2.5)
    process, leader = in_a_terminal("kuzzle", kuzzle.url, "--output", "token")
    wait_until(lambda: kuzzle.requests)
    for _ in range(2):
        os.write(leader, b"\x03")
        time.sleep(0.2)
    shown = read_all(leader)
    os.close(leader)
    status, out, _ = finish(process)
    assert (status, out) == (0, next_run(kuzzle, run))
    assert "A request was sent. Its answer is awaited" in shown
    assert shown.endswith("\r\x1b[K")
    assert "\n" not in shown


def test_ctrl_c_at_the_prompt(kuzzle, jwt, monkeypatch):
    """Who is asked for a token may leave."""
    monkeypatch.delenv("KUZZLE_JWT")
    process, leader = in_a_terminal("kuzzle", kuzzle.url)
    read_all(leader, "jwt: ")
    os.write(leader, b"\x03")
    shown = read_all(leader)
    os.close(leader)
    assert finish(process)[:2] == (75, "")
    assert "ended by SIGINT" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("key", [b"\n", b"\x04"], ids=["Enter", "Ctrl-D"])
def test_nothing_at_the_prompt(kuzzle, jwt, monkeypatch, key):
    """Who gives no token is told so, in one line. The terminal, which would show one now, is read no more."""
    monkeypatch.delenv("KUZZLE_JWT")
    process, leader = in_a_terminal("kuzzle", kuzzle.url)
    read_all(leader, "jwt: ")
    os.write(leader, key)
    shown = read_all(leader)
    os.close(leader)
    assert finish(process)[:2] == (2, "")
    assert re.fullmatch(rf"\s*{WHEN}kuzzle: KUZZLE_JWT is not set, and standard input has no jwt\r\n", shown)


@pytest.fixture
def black_hole():
    """An address that takes no connection and refuses none."""
    with contextlib.ExitStack() as sockets:
        server = sockets.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            client = sockets.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("server", ["down", "busy", "silent"])
def test_ended_while_nothing_is_under_way(kuzzle, jwt, black_hole, server, number):
    """A run that has sent nothing, or was answered, ends at once, and says no more."""
    kuzzle.fail_next("api.process.overloaded", 99)
    url = {"down": "http://127.0.0.1:1", "busy": kuzzle.url, "silent": black_hole}[server]
    process = start("kuzzle", url, *(["--quiet"] if number == signal.SIGHUP else []))
    wait_until(lambda: list((Path.home() / STATE).rglob("*.lock")))
    time.sleep(0.7)
    process.send_signal(number)
    began = time.monotonic()
    status, out, err = finish(process)
    assert time.monotonic() - began < 1.5
    assert (status, out) == (75, "")
    host = url.removeprefix("http://")
    assert re.fullmatch(rf"{WHEN}kuzzle {host} {fingerprint(jwt)}: ended by {number.name}\n", err)


def test_ended_while_it_reads(kuzzle):
    """Nor does a run wait for its input any more."""
    process = start("kuzzle", kuzzle.url, stdin=subprocess.PIPE)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    status, _, err = finish(process)
    assert time.monotonic() - began < 5
    assert status == 75
    assert re.fullmatch(rf"{WHEN}kuzzle: ended by SIGTERM\n", err)


def test_ended_demo():
    """The demo too."""
    process = start("demo")
    time.sleep(0.35)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) in (0, 75, -signal.SIGTERM)  # before main(), Python is in charge
    assert "Traceback" not in finish(process)[2]


def test_ignored_signals(kuzzle, jwt):
    """What is ignored stays so: under nohup, and in the background."""
    kuzzle.delay_next(1)
    process = start("kuzzle", kuzzle.url, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_until(lambda: kuzzle.requests)
    process.send_signal(signal.SIGHUP)
    assert finish(process)[0] == 0


def test_without_some_signals(kuzzle, jwt):
    """Windows has fewer signals."""
    program = "import signal; del signal.SIGHUP, signal.SIGPIPE; from refresher import _cli; exit(_cli.main())"
    command = [sys.executable, "-c", program, "kuzzle", kuzzle.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# At a terminal


def at_a_terminal(*argv, kind="xterm"):
    """Run the command with its standard error on a terminal; tell what that showed."""
    leader, follower = pty.openpty()
    process = start(*argv, stderr=follower, env={**os.environ, "TERM": kind})
    os.close(follower)
    shown = read_all(leader)
    os.close(leader)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out, shown


def test_countdown(kuzzle, jwt):
    """A wait of more than a second says what it waits for, how long, and is wiped out in the end."""
    kuzzle.fail_next("api.process.overloaded", 3)
    kuzzle.delay_next(2.5)
    status, out, shown = at_a_terminal("kuzzle", kuzzle.url, "--timeout", "20")
    assert status == 0
    assert kuzzle.knows(json.loads(out)["jwt"])
    lines = shown.split("\r\x1b[K")
    assert lines[0] == lines[-1] == ""
    assert len(lines) >= 4
    assert re.search("Kuzzle (may have issued this token just now|is busy or down)", lines[1])
    assert all("Kuzzle is busy or down" in line for line in lines[2:-1])
    assert max(map(len, lines)) <= 79
    assert re.match("Waiting, 1[89] s left", lines[1])


def test_check_that_waits(kuzzle, jwt):
    """What a check waits for is wiped out, too."""
    kuzzle.fail_next("api.process.overloaded")
    status, _, shown = at_a_terminal("status", "kuzzle", kuzzle.url, "--check")
    lines = shown.split("\r\x1b[K")
    assert status == 0
    assert "Kuzzle is busy or down" in lines[1]
    assert lines[-1] == ""


def test_no_countdown(kuzzle, jwt):
    """None for one that is to be quiet, none on a terminal that cannot wipe it out, none for a run that is quick."""
    kuzzle.delay_next(1.5)
    assert at_a_terminal("kuzzle", kuzzle.url, "--quiet")[2] == ""
    kuzzle.delay_next(1.5)
    assert at_a_terminal("kuzzle", kuzzle.url, "--ahead", "1d", "--expires-in", "2h", kind="dumb")[2] == ""
    assert at_a_terminal("kuzzle", kuzzle.url)[2] == ""
