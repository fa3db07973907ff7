"""The commands ``refresher kuzzle`` and ``refresher circle``, as cron and people run them."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import time_machine
from helpers import call_with

from refresher import FileStore, KuzzleToken, UserToken, refresh_user_token
from refresher._cli import main
from refresher.testing import Answer, Clock

COMMAND = Path(sys.executable).with_name("refresher")
STATE = Path(".local", "state", "refresher")


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


def test_circle_json(circle, pair, run):
    """The same of a pair."""
    status, out, err = run("circle", "--base-url", circle.url)
    token = UserToken.from_dict(json.loads(out))
    assert (status, err) == (0, "")
    assert circle.knows(token)
    assert token.refresh_token != pair.refresh_token


@pytest.mark.parametrize("output", ["token", "env"])
def test_output(kuzzle, circle, jwt, pair, run, output):
    """The bare token, or lines that a shell and the command itself can read."""
    _, of_kuzzle, _ = run("kuzzle", kuzzle.url, "--output", output)
    _, of_circle, _ = run("circle", "--base-url", circle.url, "--device-id", "device-1", "--output", output)
    if output == "token":
        assert kuzzle.knows(of_kuzzle.rstrip("\n"))
        assert of_circle.rstrip("\n") in circle._user_tokens
        return
    script = f'{of_kuzzle}\n{of_circle}\necho "$KUZZLE_JWT $CIRCLE_USER_TOKEN $CIRCLE_REFRESH_TOKEN"'
    values = subprocess.run(["sh", "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert kuzzle.knows(values[0])
    assert values[1] in circle._user_tokens
    assert values[2] in circle._pairs
    assert "\nCIRCLE_ENCRYPTION_KEY=" in of_circle


def test_user_id(circle, pair, run, monkeypatch):
    """A user id may stand for the user token."""
    monkeypatch.delenv("CIRCLE_USER_TOKEN")
    status, out, _ = run("circle", "--base-url", circle.url, "--user-id", "user-1")
    assert status == 0
    assert circle.knows(UserToken.from_dict(json.loads(out)))


@pytest.mark.parametrize("form", ["{}\n", '{{"jwt": "{}"}}'])
def test_from_standard_input(kuzzle, jwt, run, monkeypatch, form):
    """A token bare or as JSON, if the environment has none."""
    monkeypatch.delenv("KUZZLE_JWT")
    monkeypatch.setattr(sys, "stdin", io.StringIO(form.format(jwt)))
    assert run("kuzzle", kuzzle.url)[0] == 0
    assert kuzzle.requests[0].headers["Authorization"] == f"Bearer {jwt}"


def test_pair_from_standard_input(circle, pair, run, monkeypatch):
    """What was printed can be the input of another day, on another machine."""
    monkeypatch.delenv("CIRCLE_REFRESH_TOKEN")
    token = refresh_user_token(**call_with(circle, pair), cache=None)
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(token.to_dict())))
    assert run("circle", "--base-url", circle.url)[0] == 0
    assert circle.requests[-1].json()["refreshToken"] == token.refresh_token


def test_from_a_person(kuzzle, jwt, run, monkeypatch):
    """At a terminal the token is asked for, and not shown."""
    monkeypatch.delenv("KUZZLE_JWT")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("getpass.getpass", lambda prompt: jwt if prompt == "jwt: " else "")
    assert run("kuzzle", kuzzle.url)[0] == 0


# Where things are kept


@pytest.mark.parametrize(
    ("platform", "environment", "folder"),
    [
        ("linux", {}, ".local/state/refresher"),
        ("linux", {"XDG_STATE_HOME": "{home}/elsewhere"}, "elsewhere/refresher"),
        ("darwin", {}, "Library/Application Support/refresher"),
    ],
)
def test_default_store(kuzzle, jwt, run, monkeypatch, tmp_path, platform, environment, folder):
    """The platform's folder for state."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(home=tmp_path))
    assert run("kuzzle", kuzzle.url)[0] == 0
    assert list((tmp_path / folder / "refresher").glob("refresher-*.entry"))


def test_store(kuzzle, jwt, run, tmp_path):
    """A folder of one's own."""
    first = run("kuzzle", kuzzle.url, "--store", tmp_path / "mine")
    assert run("kuzzle", kuzzle.url, "--store", tmp_path / "mine") == first
    assert len(kuzzle.requests) == 1
    assert not (tmp_path / STATE).exists()


def spoil_folder(folder):
    folder.write_text("a file")


def spoil_entry(folder):
    FileStore(folder).set("key", "value", 60)
    (folder / "refresher" / "refresher-broken.entry").symlink_to(folder / "nowhere")


@pytest.mark.parametrize("spoil", [spoil_folder, spoil_entry])
def test_store_that_cannot_be_used(kuzzle, jwt, run, tmp_path, spoil):
    """What can't be saved is not refreshed."""
    spoil(tmp_path / "mine")
    status, out, err = run("kuzzle", kuzzle.url, "--store", tmp_path / "mine")
    assert (status, out) == (2, "")
    assert err.startswith("refresher: the store can't be used: ")
    assert err.count("\n") == 1
    assert kuzzle.requests == []


def test_store_that_is_being_swept(kuzzle, jwt, run, tmp_path, monkeypatch):
    """What another run has just removed is no hindrance."""
    FileStore(tmp_path / "mine").set("key", "value", 60)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda entry, mode: Path(entry).unlink())
        assert run("kuzzle", kuzzle.url, "--store", tmp_path / "mine")[0] == 0


def test_full_disk(kuzzle, jwt, run, tmp_path, monkeypatch):
    """Nor where the disk is full."""
    monkeypatch.setattr(Path, "write_bytes", lambda *_: os.open("/dev/full/x", os.O_RDONLY))
    assert run("kuzzle", kuzzle.url)[0] == 2
    assert kuzzle.requests == []
    assert [path.name for path in (tmp_path / STATE).rglob("*")] == ["refresher"]


def test_without_filelock(kuzzle, jwt, run, monkeypatch):
    """Without what the store needs, the command says what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, err = run("kuzzle", kuzzle.url)
    assert status == 2
    assert "pip install 'refresher[file]'" in err
    assert kuzzle.requests == []


# How it ends


@pytest.mark.parametrize(
    ("answer", "status", "complaint"),
    [
        pytest.param("security.token.invalid", 77, "sign in again", id="the session has ended"),
        pytest.param("api.process.overloaded", 75, "try later", id="busy"),
        pytest.param(b"", 75, "did not answer", id="no answer"),
        pytest.param(Answer(200, b"<html>"), 69, "look at the URL", id="not Kuzzle"),
        pytest.param("security.token.ttl_exceeded", 2, "look at the arguments", id="not allowed"),
    ],
)
def test_status(kuzzle, jwt, run, answer, status, complaint):
    """The exit status tells cron what to do, and one line tells a person."""
    if isinstance(answer, str):
        kuzzle.fail_next(answer)
    else:
        kuzzle.next_answers.append(answer)
    got, out, err = run("kuzzle", kuzzle.url, "--no-retry")
    assert (got, out, err.count("\n")) == (status, "", 1)
    assert err.startswith("refresher: Kuzzle ")
    assert complaint in err


def test_circle_status(circle, pair, run):
    """The same of Circle."""
    circle.fail_next(401)
    status, _, err = run("circle", "--base-url", circle.url)
    assert status == 2
    assert err == "refresher: Circle refused the request: look at the arguments, keys and rights (401, 401)\n"


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param(["kuzzle"], id="no URL"),
        pytest.param(["kuzzle", "URL", "planted"], id="too much"),
        pytest.param(["kuzzle", "URL", "--jwt=planted"], id="unknown"),
        pytest.param(["kuzzle", "URL", "--output", "planted"], id="output"),
        pytest.param(["kuzzle", "URL", "--output", "plan'ted"], id="quotes"),
        pytest.param(["kuzzle", "URL", "--timeout", "planted"], id="timeout"),
        pytest.param(["kuzzle", "URL", "--quiet=planted"], id="a flag"),
        pytest.param(["kuzzle", "planted url"], id="URL"),
        pytest.param(["kuzzle", "http://127.0.0.1:1", "--expires-in", "planted"], id="lifetime"),
        pytest.param(["planted"], id="command"),
        pytest.param(["circle", "--base-url", "http://planted"], id="plain http"),
        pytest.param(["circle", "--user-id", "plan\nted"], id="user id"),
    ],
)
def test_usage(run, argv, jwt, pair):
    """What is wrong is named, and not quoted: it may be a token in the wrong place."""
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert "refresher" in err
    assert "plan" not in err


@pytest.mark.parametrize("given", ["", "{}", "[]", '{"jwt": ""}', '{"jwt": 5}'])
def test_no_token(run, monkeypatch, given):
    """Where no token is, that is said."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(given))
    status, _, err = run("kuzzle", "http://127.0.0.1:1")
    assert status == 2
    assert "KUZZLE_JWT is not set, and standard input has no jwt" in err or given == "[]"


@pytest.mark.parametrize("name", ["CIRCLE_USER_TOKEN", "CIRCLE_REFRESH_TOKEN", "CIRCLE_WEB3_API_KEY"])
def test_no_pair(run, pair, monkeypatch, name):
    """The same of each that Circle needs."""
    monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    status, _, err = run("circle")
    assert status == 2
    assert "CIRCLE_" in err


def test_help(run):
    """Help names each option, each exit status and each variable."""
    _, kuzzle, _ = run("kuzzle", "--help")
    _, circle, _ = run("circle", "--help")
    for word in ("--expires-in", "--store", "--ahead", "--output", "--quiet", "75", "77", "KUZZLE_JWT"):
        assert word in kuzzle
    for word in ("--device-id", "--user-id", "CIRCLE_WEB3_API_KEY", "CIRCLE_REFRESH_TOKEN"):
        assert word in circle


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_warnings(kuzzle, jwt, run, quiet, monkeypatch):
    """Who goes on with a token that lives, while the service is down, is told so, unless it's to be quiet."""
    monkeypatch.setattr("refresher._exchange._SHORTEST_PAUSE", 0.01)
    first = run("kuzzle", kuzzle.url)
    kuzzle.clock.advance(3300)
    kuzzle.fail_next("api.process.overloaded", 20)
    with time_machine.travel(time.time() + 3300):
        status, out, err = run("kuzzle", kuzzle.url, "--timeout", "0.5", *quiet)
    assert (status, out) == first[:2]
    assert err.count("\n") == (0 if quiet else 1)
    assert quiet or "going on with the old token" in err


# As cron runs it


def test_a_week_of_cron(kuzzle, run, monkeypatch, tmp_path):
    """Every minute of a week, with the same first token: one exchange a lifetime, always a living token."""
    begin = int(time.time())
    with time_machine.travel(begin, tick=False) as now:
        kuzzle.clock = Clock()
        monkeypatch.setenv("KUZZLE_JWT", kuzzle.login(ago=60))
        seen = []
        for minute in range(7 * 24 * 60):
            now.move_to(begin + minute * 60)
            status, out, err = run("kuzzle", kuzzle.url, "--output", "token")
            assert (status, err) == (0, "")
            if not seen or out != seen[-1]:
                seen.append(out)
            assert kuzzle.knows(out.strip())
    assert len(kuzzle.requests) == len(seen)
    assert 7 * 24 <= len(seen) <= 7 * 24 * 1.12
    # What has expired is swept away: the last token, what leads to it, and locks.
    assert sum(not path.name.endswith(".lock") for path in (tmp_path / STATE).iterdir()) < 7 * 24 * 1.2


def test_overlapping_runs(kuzzle, jwt):
    """Runs at once print one token, from one exchange."""
    kuzzle.delay_next(0.5)
    with ThreadPoolExecutor(8) as pool:
        results = set(pool.map(lambda _: finish(start("kuzzle", kuzzle.url)), range(8)))
    ((status, out, err),) = results
    assert (status, err) == (0, "")
    assert kuzzle.knows(json.loads(out)["jwt"])
    assert len(kuzzle.requests) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_ended_while_it_waits(kuzzle, jwt, run, number):
    """A run that is ended in mid-exchange lets it come to its end, so the next run has the new token."""
    kuzzle.delay_next(1)
    process = start("kuzzle", kuzzle.url)
    while not kuzzle.requests:
        time.sleep(0.01)
    process.send_signal(number)
    assert finish(process) == (128 + number, "", "")
    status, out, _ = run("kuzzle", kuzzle.url, "--output", "token")
    assert status == 0
    assert kuzzle.knows(out.strip())
    assert len(kuzzle.requests) == 1


def test_killed_while_it_waits(circle, pair, run):
    """A run that is killed is no loss at Circle: the next one gets the same answer."""
    circle.delay_next(1)
    process = start("circle", "--base-url", circle.url)
    while not circle.requests:
        time.sleep(0.01)
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
    while not list((Path.home() / STATE).rglob("*.lock")):
        time.sleep(0.01)
    process.kill()
    finish(process)
    kuzzle.start()
    assert run("kuzzle", kuzzle.url)[0] == 0


def test_reader_has_gone(kuzzle, jwt):
    """Who reads the output may go: no traceback."""
    for argv in (["kuzzle", kuzzle.url], ["demo"]):
        process = start(*argv)
        process.stdout.close()
        assert process.stderr.read() == ""
        process.stderr.close()
        assert process.wait(60) == 128 + signal.SIGPIPE


# At a terminal


def at_a_terminal(*argv):
    """Run the command with its standard error on a terminal; tell what that showed."""
    leader, follower = pty.openpty()
    process = start(*argv, stderr=follower)
    os.close(follower)
    shown = b""
    while select.select([leader], [], [], 30)[0]:
        try:
            shown += os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
    os.close(leader)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out, shown.decode()


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
    assert all("Kuzzle is busy or down" in line for line in lines[1:-1])
    assert max(map(len, lines)) == 79
    assert "Waiting, 19 s left" in lines[1] or "Waiting, 18 s left" in lines[1]


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_no_countdown(kuzzle, jwt, quiet):
    """None for a run that is quick, none for one that is to be quiet."""
    if quiet:
        kuzzle.delay_next(1.5)
    assert at_a_terminal("kuzzle", kuzzle.url, *quiet)[2] == ""
