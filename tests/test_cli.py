"""The command line."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

import refresher
from refresher import _cli
from refresher._cli import main


def test_demo(capsys):
    """The demo tells of both refreshes and shows no secret."""
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "POST /_refreshToken?expiresIn=2h" in out
    assert "POST /v1/w3s/users/token/refresh" in out
    assert re.search(r"old token <secret \w{8}>: refused\n +new token <secret \w{8}>: good", out)
    assert "the same pair again: yes" in out
    assert re.search(r"kauth-|eyJ|fake-secret", out) is None
    # What was sent is the old token, what came is another.
    assert len(set(re.findall("<secret (.*?)>", out))) == 8


@pytest.mark.parametrize("proxy", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_demo_behind_a_proxy(proxy):
    """A proxy, which the fakes are out of reach for, is not asked for them."""
    environment = {**os.environ, proxy: "http://127.0.0.1:1", "no_proxy": "example.com"}
    command = [sys.executable, "-m", "refresher", "demo"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_version(capsys):
    """--version tells the version."""
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"refresher {refresher.__version__}\n"


def test_usage(capsys):
    """Without a command, the command line ends with status 2 and says on standard error where help is."""
    with pytest.raises(SystemExit, match="2"):
        main([])
    line = "refresher: the following arguments are required: COMMAND (see refresher --help)\n"
    assert capsys.readouterr().err == line


def test_module():
    """python -m refresher is the same command."""
    done = subprocess.run(
        [sys.executable, "-m", "refresher", "demo"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("KUZZLE.")


def test_wait_is_told_once_a_second(monkeypatch):
    """And wiped out in the end."""
    run, now, told = _cli._Run(), [0.0], []
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(_cli, "time", clock)
    monkeypatch.setattr(run, "show_wait", lambda what, _: told.append((round(now[0]), what)))
    run.wait(lambda: now[0] < 0.9, "soon")
    assert told == []
    now[0] = 0.0
    run.wait(lambda: True, "the answer", 3.5)
    assert told == [(1, "the answer"), (2, "the answer"), (3, "the answer"), (4, "")]


def test_signal_that_is_lost(monkeypatch):
    """Python loses what hits the end of an import or a ``__del__``. Then a later signal ends the run."""
    run, now = _cli._Run(), 0.0
    monkeypatch.setattr(_cli.time, "monotonic", lambda: now)
    run.is_ready = True
    for now, ends in ((5.0, True), (5.5, False), (6.5, True), (6.6, False)):  # noqa: B007
        with pytest.raises(_cli._EndedError) if ends else contextlib.nullcontext():
            run.end(signal.SIGTERM, None)
    run.is_over, now = True, 60.0
    run.end(signal.SIGTERM, None)
    assert run.ended_by == "SIGTERM"
